"""Pairs and rankings that a tiny model can learn, and a folder to train on them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny, tiny_causal

from tunesmith import api

GOOD, BAD = ("good", "fine", "great"), ("bad", "dull", "poor")


class Cut(Exception):
    """Stands for the process dying."""


def cut_after(step: int) -> Callable[[Any], None]:
    """A progress line that kills the run after `step`."""

    def show(report: Any) -> None:
        if report.step == step:
            raise Cut

    return show


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """The chosen answer praises, the rejected one does not; lengths differ both ways."""
    rows = []
    for i in range(start, start + count):
        better, worse = f"it was {GOOD[i % 3]}" + " !" * (i % 4), f"it was {BAD[i % 3]}" + " ?" * ((i + 2) % 4)
        rows.append({"prompt": f"how was film number {i}?", "chosen": better, "rejected": worse})
    return rows


def rankings(count: int) -> list[dict[str, Any]]:
    """Four answers each, two of them tied."""
    return [
        {
            "prompt": f"how was book number {i}?",
            "completions": [f"bad {i}", f"fine {i}", f"great {i}", f"good {i}"],
            "ranks": [4, 2, 1, 2],
        }
        for i in range(count)
    ]


def with_margins(rows: list[dict[str, str]], margin: float) -> list[dict[str, Any]]:
    """The same pairs, every second one with a margin."""
    return [{**row, "margin": margin if i % 2 else 0.0} for i, row in enumerate(rows)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_folder(folder: Path) -> Path:
    """A tiny base and the files `pairs.jsonl`, `more.jsonl` and `rankings.jsonl`."""
    save_tiny(tiny_causal("llama"), folder / "base")
    write(folder / "pairs.jsonl", pairs(24))
    write(folder / "more.jsonl", pairs(16, 100))
    write(folder / "rankings.jsonl", rankings(8))
    return folder


def recipe(stage: str, **sections: Any) -> dict[str, Any]:
    """A run of one or two seconds."""
    plain: dict[str, Any] = {
        "stage": stage, "base": "base", "precision": "float32", "threads": 1,
        "data": {"train": "pairs.jsonl", "eval": "more.jsonl"}, "tune": {"method": "full"},
        "train": {"epochs": 3, "batch_examples": 6, "learning_rate": 3e-3}, "evaluate": {"samples": 0},
    }  # fmt: skip
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values} if isinstance(values, dict) else values
    return plain


def start_and_cut(made: dict[str, Any], name: str, step: int) -> None:
    """Train `made` as run `name` and die after `step`."""
    with pytest.raises(Cut):
        api.train(made, run=name, show=cut_after(step))


def left(run: Path) -> dict[str, bytes]:
    """What two runs must share to the byte: trained weights, the step log, the evaluations."""
    weights = sorted((run / "final").glob("step_*/*.safetensors"))
    assert weights, f"{run} has no weights"
    return {path.name: path.read_bytes() for path in (*weights, run / "metrics.jsonl", run / "evaluations.jsonl")}
