"""Which base to start from: four of them tuned alike on the same reviews, by `compare --base`."""

from __future__ import annotations

from common import needs_encoder, place, table, write
from reviews import BASE, compare, options_of, span, ways, write_recipe

RATE = 1e-3


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=3)
    where, options = place("compare_bases", parser)
    recipe = write_recipe(where, options.tokens, options.limit, tune={"method": "lora", "rank": 16})
    short = {str(where.asset(f"models/{name}")): name for name in ("stories260K", "tinystories-656K")}
    short |= {BASE: BASE, str(needs_encoder(where)): "MiniLM"}
    found = compare(
        recipe, "bases", f"train.learning_rate={RATE}", f"train.epochs={options.epochs}", "--base", ",".join(short),
        "--seeds", str(options.seeds),
    )  # fmt: skip
    entry = found["test"]["metrics"]["accuracy"]
    chosen = (
        f"{found['recommendation']}.\n\nTest rows, measured once, with {found['best']}: accuracy {span(entry)}, "
        f"n = {entry['n']:,}."
    )
    note = (
        f"`tunesmith compare --base a,b,c,d --seeds {options.seeds}` on the truncated IMDB pair: decoders of 260,000, "
        "656,000 and 1.4 million parameters and an encoder of 22.7 million, all with LoRA of rank 16 on all linear "
        f"layers, rate {RATE:g}, the last {options.tokens} tokens of a review, {options.epochs:g} epochs, 16 reviews a "
        "step, the best epoch kept. Judged on 1,000 held-out reviews; intervals hold rows and seeds; differences are "
        "paired on the same rows. Seconds are those of a machine that others used too."
    )
    sections = [note, table(*ways(found)), chosen]
    for path, name in short.items():
        sections = [section.replace(f"base={path}", name) for section in sections]
    if options.limit:
        print("\n\n".join(sections))
    else:
        write("compare_bases", "One task, four bases", *sections)


if __name__ == "__main__":
    main()
