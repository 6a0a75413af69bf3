"""How accuracy grows with the number of examples: a pre-trained encoder against the same one with random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from common import RECIPES, Place, interval, needs_encoder, place, rows_of, table, train, write
from transformers import AutoConfig, AutoModel

from tunesmith.model.load import load_tokenizer

SIZES = {100: 6, 300: 4, 1000: 2}
"""Examples -> epochs."""
HELD_OUT = 500


def main() -> None:
    where, _ = place("learning_curve")
    where.runs.mkdir(parents=True, exist_ok=True)
    bases = {"tuned": needs_encoder(where), "from scratch": _random(needs_encoder(where), where.runs / "random")}
    files = _files(where)
    rows = []
    for size, epochs in SIZES.items():
        found = {}
        for name, base in bases.items():
            run = where.runs / f"{name.replace(' ', '-')}-{size}"
            rate = 1e-4 if name == "tuned" else 3e-4
            found[name] = train(
                run, RECIPES / "learning_curve.yaml", f"base={base}", f"data.train={files[size]}",
                f"data.eval={files[0]}", f"train.epochs={epochs}", f"train.learning_rate={rate}",
                f"train.eval_every={epochs * -(-size // 8)}",
            )  # fmt: skip
        rows.append(_row(size, epochs, found))
    note = (
        f"The last 64 tokens of each review, all parameters, 8 reviews a step, {HELD_OUT} held-out reviews, one seed, "
        "measured after the last step. Rate 1e-4 tuned, 3e-4 from scratch. The smaller sets are balanced parts of the "
        "larger ones. 95 % intervals."
    )
    head = ("examples", "epochs", "tuned", "from scratch", "untrained head on the encoder")
    write("learning_curve", "Few examples: tuned against from scratch", note, table(head, rows))


def _row(size: int, epochs: int, found: dict[str, dict[str, Any]]) -> tuple[Any, ...]:
    after = [interval(result["after"]["accuracy"]) for result in found.values()]
    return (f"{size:,}", epochs, *after, f"{found['tuned']['before']['accuracy']['value']:.3f}")


def _random(encoder: Path, to: Path) -> Path:
    """The encoder's architecture and tokenizer with weights that have learned nothing."""
    if not to.exists():
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.from_pretrained(encoder)).save_pretrained(to)
        load_tokenizer(encoder).save_pretrained(to)
    return to


def _files(where: Place) -> dict[int, Path]:
    """Balanced training sets, each inside the next, by their size; the held-out rows under 0."""
    pair = [rows_of(where.asset(f"data/imdb/imdb_truncated_{part}.jsonl")) for part in ("train", "validation")]
    ordered = [_balanced(rows) for rows in pair]
    files = {}
    for size in (0, *SIZES):
        rows = ordered[0][:size] if size else ordered[1][:HELD_OUT]
        files[size] = where.runs / f"{size or 'eval'}.jsonl"
        files[size].write_text("".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in rows))
    return files


def _balanced(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shuffled, one of each label in turn."""
    random.Random(0).shuffle(rows)
    sides = [[row for row in rows if row["label"] == label] for label in (0, 1)]
    return [row for pair in zip(*sides, strict=False) for row in pair]


if __name__ == "__main__":
    main()
