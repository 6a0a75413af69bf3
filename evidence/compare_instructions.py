"""Three ways to tune a small model on instructions, two rates, two seeds, by `compare` over methods and a grid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from common import Place, place, table, write
from reviews import compare, span

WAYS = "full,last_layers=1,lora:rank=16"
RATES = "1e-3,3e-3"
SEEDS = 2
HELD_OUT = {"eval": 100, "test": 100}
HEAD = ("best minus it, paired", "sure", "each seed", "forgets", "trained", "seconds", "peak MB")


def main() -> None:
    where, _ = place("compare_instructions")
    found = compare(
        _recipe(where), "instructions", "--tune", WAYS, "--grid", f"train.learning_rate={RATES}", "--seeds", str(SEEDS)
    )
    metric = str(found["metric"])
    test, named = found["test"]["metrics"][metric], metric.replace("_", " ")
    note = (
        f"`tunesmith compare --tune {WAYS} --grid train.learning_rate={RATES} --seeds {SEEDS}`: 1,100 instructions "
        f"less those that are asked twice, of which {HELD_OUT['eval']} are held out and {HELD_OUT['test']} are test "
        "rows, from models/tinystories-656K, 6 epochs of 8 rows a step, the best epoch kept. Intervals hold rows and "
        "seeds; differences are paired on the same rows; `forgets` is the change of the loss on text outside the task. "
        "A way that is best at the highest rate tried may be better at a still higher one. Seconds are those of a "
        "machine that others used too."
    )
    won = f"Test rows, measured once, with {found['best']}: {named} {span(test)}, n = {test['n']:,}."
    title = "Three ways to tune on instructions, two rates, two seeds"
    write(
        "compare_instructions",
        title,
        note,
        table(("way", f"{named}, held out", *HEAD), map(_row, found["rows"])),
        f"{found['recommendation']}.",
        won,
    )


def _recipe(where: Place) -> Path:
    """The recipe beside its rows, drawn once, so that all trials are judged on the same ones."""
    where.runs.mkdir(parents=True, exist_ok=True)
    rows = json.loads(where.asset("data/instruction/instruction-data.json").read_text(encoding="utf-8"))
    rows = list({_asked(row): row for row in rows}.values())  # what is asked twice would stand in two of the files
    random.Random(0).shuffle(rows)
    for part, count in HELD_OUT.items():
        _write_rows(where.runs / f"{part}.jsonl", rows[:count])
        rows = rows[count:]
    _write_rows(where.runs / "train.jsonl", rows)
    recipe = {
        "stage": "sft", "base": str(where.asset("models/tinystories-656K")), "threads": 1,
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "test": "test.jsonl", "max_length": 512},
        "train": {"epochs": 6, "batch_examples": 8, "warmup": 0.05, "schedule": "cosine", "select_by": "loss"},
        "evaluate": {"generate": {"max_tokens": 64, "examples": 40}},
    }  # fmt: skip
    path = where.runs / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return path


def _asked(row: dict[str, Any]) -> str:
    return " ".join(f"{row['instruction']} {row['input']}".casefold().split())


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    sure = "–" if "sure" not in row else "over 99.9 %" if row["sure"] > 0.999 else f"{100 * row['sure']:.1f} %"
    forgets = "–" if row["forgetting"] is None else f"{row['forgetting']:+.3f}"
    return (
        row["name"], span(row), span(row.get("behind"), sign=True), sure, " ".join(f"{v:.3f}" for v in row["values"]),
        forgets, f"{row['trainable_parameters']:,}", f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e6:,.0f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
