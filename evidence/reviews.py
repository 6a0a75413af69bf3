"""The truncated IMDB pair with untouched test rows, for comparisons: recipe, files, and `tunesmith compare` itself."""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Place

BASE = "tunesmith/reviews-1m"
TEST_ROWS = 1000


def options_of(about: str | None) -> argparse.ArgumentParser:
    """What both parts take beside the common options."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tokens", type=int, default=128, help="last tokens kept of a review")
    parser.add_argument("--limit", type=int, help="rows of each set, to try the part out; nothing is written")
    return parser


def write_recipe(where: Place, tokens: int, limit: int | None, **more: Any) -> Path:
    """The recipe beside its data: 1,000 rows to train on, 1,000 to choose by, 1,000 of the test set for the winner."""
    folder = where.runs / (f"try-{limit}" if limit else "data")
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        part: where.asset(f"data/imdb/imdb_truncated_{part}.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
        for part in ("train", "validation")
    }
    with gzip.open(where.asset("data/imdb/imdb_test.jsonl.gz"), "rt", encoding="utf-8") as lines:
        known = {json.loads(line)["text"] for part in rows.values() for line in part}
        rest = [line.strip() for line in lines if json.loads(line)["text"] not in known]
    rows["test"] = random.Random(42).sample(rest, TEST_ROWS)
    for part, found in rows.items():
        (folder / f"{part}.jsonl").write_text("\n".join(found[:limit]) + "\n", encoding="utf-8")
    recipe = {
        "stage": "classify", "base": BASE, "threads": 1,
        "data": {"train": "train.jsonl", "eval": "validation.jsonl", "test": "test.jsonl",
                 "max_length": tokens, "on_too_long": "truncate_left"},
        "train": {"epochs": 3, "batch_examples": 16, "select_by": "accuracy"},
        "evaluate": {"prompting": {"shots": 4, "template": "Review: {text}\nSentiment: {label}",
                                   "label_words": {"0": "negative", "1": "positive"}}},
    }  # fmt: skip
    for key, value in more.items():
        recipe[key] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return path


def compare(recipe: Path, to: str, *arguments: str) -> dict[str, Any]:
    """`tunesmith compare` in the recipe's folder; what is finished is read, what was interrupted goes on."""
    command = ["compare", recipe.name, *arguments, "--to", to, "--json"]
    print(f"tunesmith {' '.join(command)}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *command], cwd=recipe.parent, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def span(entry: dict[str, Any] | None, digits: int = 3, *, sign: bool = False) -> str:
    """`0.860 [0.837, 0.880]`; a dash where there is none."""
    if entry is None:
        return "–"
    mark = "+" if sign else ""
    return f"{entry['value']:{mark}.{digits}f} [{entry['low']:{mark}.{digits}f}, {entry['high']:{mark}.{digits}f}]"


def ways(found: dict[str, Any]) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """(head, rows) of a comparison."""
    head = ("way", "accuracy, held out", "best minus it, paired", "sure", "each seed", "trained", "seconds", "peak MB",
            "file MB")  # fmt: skip
    rows = [
        (row["name"], span(row), span(row.get("behind"), sign=True),
         f"{100 * row['sure']:.1f} %" if "sure" in row else "–", " ".join(f"{v:.3f}" for v in row["values"]),
         f"{row['trainable_parameters']:,}", f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e6:,.0f}",
         f"{row['file_bytes'] / 1e6:.2f}") for row in found["rows"]
    ]  # fmt: skip
    return head, rows
