"""Does a small tuned model beat a larger untuned one? Three small bases tuned with LoRA on 1,000 reviews, against
larger ones that are only asked, on the same reviews that no choice has seen."""

from __future__ import annotations

from typing import Any

from common import Place, needs_encoder, place, table, write
from reviews import BASE, compare, options_of, span, write_recipe

RATE = 3e-3


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--epochs", type=float, default=3)
    where, options = place("small_beats_large", parser)
    recipe = write_recipe(where, options.tokens, options.limit, tune={"method": "lora", "rank": 16})
    found = {
        name: compare(
            recipe, name, f"base={base}", f"train.learning_rate={RATE}", f"train.epochs={options.epochs}",
            "--untuned", ",".join(larger),
        )
        for name, base, larger in _pairs(where)
    }  # fmt: skip
    sections = [_note(options.tokens, options.epochs), *(_section(name, entry) for name, entry in found.items())]
    if options.limit:
        print("\n\n".join(sections))
    else:
        write("small_beats_large", "A small tuned model against larger untuned ones", *sections)


def _pairs(where: Place) -> list[tuple[str, str, list[str]]]:
    """(name, the small base to tune, larger ones to ask)."""
    small, smaller = (str(where.asset(f"models/{name}")) for name in ("tinystories-656K", "stories260K"))
    encoder = str(needs_encoder(where))
    return [
        ("stories260K", smaller, [small, BASE, encoder]),
        ("tinystories-656K", small, [BASE, encoder]),
        ("reviews-1m", BASE, [encoder]),
    ]


def _note(tokens: int, epochs: float) -> str:
    return (
        f"Tuned: LoRA of rank 16 on all linear layers, {epochs:g} epochs over 1,000 reviews (their last {tokens} "
        "tokens), the best epoch by 1,000 others. Asked: a prompt without examples (zero-shot) and with four "
        "training reviews (few-shot); the answer is the label whose likelihood gains most over the same prompt "
        "about a text that says nothing. An encoder is asked by the cosine between the mean of its last hidden "
        "states and that of the words `negative` and `positive`. All on the same 1,000 reviews of the test set; "
        "differences are paired. All of these models are small: none of the untuned ones can follow an "
        "instruction, and that a model of billions would lose as well is not shown here."
    )


def _section(name: str, found: dict[str, Any]) -> str:
    untuned = found["untuned"]
    tuned, test = untuned["tuned"], found["test"]["metrics"]["accuracy"]
    rows = [(f"{name}, tuned", f"{tuned['parameters']:,}", span(test), "–", "–")]
    rows += [
        (row["name"], f"{row['parameters']:,}", span(row), span(row["difference"], sign=True),
         "–" if row["prompt_tokens"] is None else f"{row['prompt_tokens']:,.0f}") for row in untuned["rows"]
    ]  # fmt: skip
    head = ("model", "parameters", "accuracy, test rows", "tuned minus it, paired", "prompt tokens")
    return f"## {name}\n\n{table(head, rows)}\n\n{untuned['claim']}"


if __name__ == "__main__":
    main()
