"""Five ways to tune, three seeds, on reviews: with the embedded base and with the MiniLM encoder, by `compare`."""

from __future__ import annotations

from common import needs_encoder, place, table, write
from reviews import BASE, compare, options_of, span, ways, write_recipe

WAYS = "full,last_layers=1,head,lora:rank=4,lora:rank=16"


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    where, options = place("compare_ways", parser)
    recipe = write_recipe(where, options.tokens, options.limit, tune={"method": "lora", "rank": 4})
    parts = []
    bases = (("the embedded base", BASE, 3e-3, options.tokens, 3), ("MiniLM", str(needs_encoder(where)), 1e-3, 64, 2))
    for name, base, rate, tokens, epochs in bases:
        found = compare(
            recipe, name.replace(" ", "-"), f"base={base}", f"train.learning_rate={rate}", f"train.epochs={epochs}",
            *([] if tokens == options.tokens else [f"data.max_length={tokens}"]), "--tune", WAYS, "--seeds",
            str(options.seeds),
        )  # fmt: skip
        test = span(found["test"]["metrics"]["accuracy"])
        parts.append("\n\n".join([
            f"## With {name}: the last {tokens} tokens of a review, {epochs} epochs", table(*ways(found)),
            f"{found['recommendation']}.",
            f"Test rows, measured once, with {found['best']}: accuracy {test}, n = "
            f"{found['test']['metrics']['accuracy']['n']:,}.",
        ]))  # fmt: skip
    note = (
        f"`tunesmith compare --tune {WAYS} --seeds {options.seeds}` on the truncated IMDB pair, 16 reviews "
        "a step, the best epoch kept. "
        "LoRA has the recipe's rate (3e-3 for the embedded base, 1e-3 for MiniLM), every other way its own "
        "default rate. Trials are judged on 1,000 held-out reviews; intervals hold rows and seeds; differences "
        "are paired on the same rows. Seconds are those of a machine that others used too."
    )
    if options.limit:
        print("\n\n".join([note, *parts]))
    else:
        write("compare_ways", "Five ways to tune, three seeds, two bases", note, *parts)


if __name__ == "__main__":
    main()
