"""What a run measured on held-out rows, apart by the file they stand in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tunesmith.evaluate.intervals import Estimate, Statistic, paired_difference, ratio

Rows = dict[str, np.ndarray]
"""File stem -> `[n, 2]`, a row of the file each: what is added up, and what it is divided by."""


def rows_by_file(run: Path, when: str, metric: str) -> Rows:
    """`when` is `before` or `after`; the windows that a row was split into are added up again."""
    kept = json.loads((run / f"{when}.json").read_text())["held_out"]["rows"][metric]
    origins = json.loads((run / "after.json").read_text())["origins"]["held_out"]
    sums: dict[str, dict[str, np.ndarray]] = {}
    for origin, row in zip(origins, kept, strict=True):
        stem = Path(origin.rpartition(":")[0]).stem
        rows = sums.setdefault(stem, {})
        rows[origin] = rows.get(origin, np.zeros(2)) + np.asarray(row, np.float64)
    return {stem: np.stack(list(rows.values())) for stem, rows in sums.items()}


def value(rows: np.ndarray) -> float:
    """The metric over these rows."""
    return Statistic("", rows, ratio).value()


def gap(before: np.ndarray, after: np.ndarray) -> Estimate:
    """after - before over the same rows, paired, with its 95 % interval."""
    return paired_difference(Statistic("", before, ratio), Statistic("", after, ratio))


def signed(found: Estimate, digits: int = 3) -> str:
    """`-0.123 [-0.200, -0.050]`."""
    return f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """A JSONL file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
