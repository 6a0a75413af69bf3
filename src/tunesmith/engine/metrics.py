"""Sums with their counts, divided once; and a log of one JSON line a step, which a resumed run cuts first."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.engine import durable
from tunesmith.errors import RunError


class Accumulator:
    """Adds `name -> (sum, count)` over micro-batches; the mean is sum over count, never a mean of means.

    Two parts (6, 3) and (2, 1) give 8 / 4 = 2. Sums and counts are numbers or tensors of one element; tensors
    are kept in float64 where they are and read once, in `means`.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[Any, Any]] = {}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Add one micro-batch's sums and counts."""
        for name, (total, count) in metrics.items():
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + _wide(total), old_count + _wide(count))

    def totals(self) -> dict[str, tuple[float, float]]:
        """`name -> (sum, count)` as numbers; this is what is summed over ranks."""
        return {name: (float(total), float(count)) for name, (total, count) in self._totals.items()}

    def means(self) -> dict[str, float]:
        """`name -> sum / count`; names whose count is 0 are left out."""
        return {name: total / count for name, (total, count) in self.totals().items() if count}

    def clear(self) -> None:
        """Forget everything, for the next step."""
        self._totals.clear()


def _wide(value: Any) -> Any:
    return value.detach().to(torch.float64) if isinstance(value, Tensor) else float(value)


class MetricsLog:
    """Append-only `metrics.jsonl`: a line is handed to the system at once, and is on the disk after `sync`.

    Before a checkpoint call `sync()` and store `size()` in its meta; on resume `cut(size)` removes the lines of
    steps that will be run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        with durable.disk_errors(self.path):
            durable.make_folder(self.path.parent)
            self._descriptor = os.open(self.path, flags, 0o644)
            durable.fsync_folder(self.path.parent)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line. JSON has no NaN: it becomes "NaN", and infinities "Infinity" and "-Infinity"."""
        plain = {name: _plain(value) for name, value in row.items()}
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        start = self.size()
        with durable.disk_errors(self.path, len(line)):
            try:
                rest = memoryview(line)
                while len(rest):
                    rest = rest[os.write(self._descriptor, rest) :]
            except BaseException:
                os.ftruncate(self._descriptor, start)  # no half a line for `tail` and `jq`
                raise

    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self._descriptor).st_size

    def sync(self) -> None:
        """Put every line on the disk."""
        with durable.disk_errors(self.path):
            os.fsync(self._descriptor)

    def cut(self, size: int) -> None:
        """Shorten the file to `size` bytes; `RunError` when it is shorter or a line would be cut in two."""
        found = self.size()
        advice = "put the run's own metrics.jsonl back, or start a new run"
        if found < size:
            raise RunError(f"{self.path}: {found} bytes found, the checkpoint was saved at {size}; {advice}")
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            raise RunError(f"{self.path}: byte {size} does not end a line, so it is not this run's file; {advice}")
        with durable.disk_errors(self.path):
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
