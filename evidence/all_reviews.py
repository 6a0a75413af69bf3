"""The upper reference of the runs on 1,000 reviews: the same base tuned on all 24,996 of the IMDB training set."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from common import RECIPES, Place, interval, needs_encoder, place, step_seconds, table, train, write

from tunesmith.embedded import BASE

HELD_OUT = 2000
TOKENS = 128
WAYS = {
    BASE: ((1000, 6, 3e-3), (5000, 4, 3e-3), (0, 2, 1e-3)),
    "MiniLM": ((1000, 6, 1e-3), (0, 1, 1e-3)),
}
"""Base -> (training reviews, epochs, learning rate); 0 is all of them."""


def main() -> None:
    where, _ = place("all_reviews")
    where.runs.mkdir(parents=True, exist_ok=True)
    (files, sizes), rows = _files(where), []
    for name, ways in WAYS.items():
        base = str(needs_encoder(where)) if name == "MiniLM" else name
        for count, epochs, rate in ways:
            run = where.runs / f"{name.split('/')[-1]}-{count or 'all'}"
            result = train(
                run, RECIPES / "all_reviews.yaml", f"base={base}", f"data.train={files[count]}",
                f"data.eval={files[-1]}", f"data.max_length={TOKENS}", f"train.epochs={epochs}",
                f"train.learning_rate={rate}",
            )  # fmt: skip
            before, after = result["before"]["accuracy"], result["after"]["accuracy"]
            rows.append((name, f"{sizes[count]:,}", epochs, rate, f"{before['value']:.3f}", interval(after),
                         f"{step_seconds(run):.2f}"))  # fmt: skip
    note = (
        f"LoRA of rank 16 on all linear layers, the last {TOKENS} tokens of a review, 16 reviews a step, accuracy on "
        f"{HELD_OUT:,} reviews of the test set after the last step, 95 % intervals, one seed; runs on more reviews "
        "have more steps. DistilBERT's own figure for all of IMDB, all parameters and whole reviews, is 92.82 (Sanh et "
        "al. 2019, arXiv:1910.01108, table 2). Seconds are those of a machine that others used too."
    )
    head = ("base", "training reviews", "epochs", "rate", "untrained", "accuracy", "seconds a step")
    write("all_reviews", "1,000 reviews against all of them", note, table(head, rows))


def _files(where: Place) -> tuple[dict[int, Path], dict[int, int]]:
    """Training files by how many reviews were asked for (0: all), the held-out ones under -1; and their rows."""
    ours = _drawn(where.asset("data/imdb/imdb_train.jsonl.gz"))
    held_out = _drawn(where.asset("data/imdb/imdb_test.jsonl.gz"))
    known = {row["text"] for row in ours}
    parts = {count: ours[: count or None] for ways in WAYS.values() for count, *_ in ways}
    parts[-1] = [row for row in held_out if row["text"] not in known][:HELD_OUT]
    files = {count: where.runs / f"{'eval' if count < 0 else count or 'all'}.jsonl" for count in parts}
    for count, rows in parts.items():
        lines = (json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows)
        files[count].write_text("".join(lines), encoding="utf-8")
    return files, {count: len(rows) for count, rows in parts.items()}


def _drawn(path: Path) -> list[dict[str, Any]]:
    """All reviews of a file, in an order drawn from a seed."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
