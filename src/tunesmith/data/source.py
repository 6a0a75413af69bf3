"""OfflineSource: the batches of any step as a pure function of (seed, step), so that resuming needs only the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import Ints, collate, order_at, pack


class Samples(Protocol):
    """Samples by index, with all their lengths known."""

    @property
    def lengths(self) -> Ints: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def _in_order(samples: Sequence[Sample], step: int) -> Batch:
    return collate(samples)


class OfflineSource:
    """Every row once an epoch, shuffled by (seed, epoch), `batch_examples` rows or about `batch_tokens` tokens a step.

    The last step of an epoch takes what is left. A step's rows are packed into micro-batches of at most
    `micro_batch_tokens`. `make_batch(samples, step)` collates. Where `groups [n]` is given, neighbouring samples with
    the same group are one row: shuffled as one, never split over steps or micro-batches, counted as one example.
    """

    def __init__(
        self,
        store: Samples,
        *,
        seed: int,
        num_epochs: float | None = None,
        num_steps: int | None = None,
        batch_examples: int | None = None,
        batch_tokens: int | None = None,
        micro_batch_tokens: int = 8192,
        groups: Ints | None = None,
        make_batch: Callable[[Sequence[Sample], int], Batch] = _in_order,
    ) -> None:
        assert (num_epochs is None) != (num_steps is None), "epochs or steps"
        assert (batch_examples is None) != (batch_tokens is None), "examples or tokens"
        self._store, self._seed, self._make = store, seed, make_batch
        self._examples, self._tokens, self._micro = batch_examples, batch_tokens, micro_batch_tokens
        self._bounds = _bounds(len(store), groups)
        self._lengths = np.add.reduceat(np.asarray(store.lengths), self._bounds[:-1])
        self.steps_per_epoch = len(self._starts(0))
        self.num_steps = num_steps if num_steps is not None else math.ceil((num_epochs or 0) * self.steps_per_epoch)

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of `step`, counted from 1."""
        rows = self.rows_at(step)
        lengths = [int(self._lengths[row]) for row in rows]
        parts = pack(lengths, rows, self._micro)
        return [self._make([self._store[i] for row in part for i in self.samples_of(row)], step) for part in parts]

    def samples_of(self, row: int) -> range:
        """Indices of a row's samples: one, or all of its group."""
        return range(int(self._bounds[row]), int(self._bounds[row + 1]))

    def rows_at(self, step: int) -> list[int]:
        """Rows of `step`: samples, or groups of them, by their order in the store."""
        epoch, inside = divmod(step - 1, self.steps_per_epoch)
        starts = self._starts(epoch)
        order = _order(len(self._lengths), self._seed, epoch)
        end = starts[inside + 1] if inside + 1 < len(starts) else len(order)
        return [int(i) for i in order[starts[inside] : end]]

    def at_boundary(self, step: int) -> bool:
        """True when `step` is an epoch's last."""
        return step % self.steps_per_epoch == 0

    def state(self) -> dict[str, Any]:
        """Nothing but what the order depends on."""
        return {"seed": self._seed, "rows": len(self._lengths)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to do: the step says it all."""
        assert state["rows"] == len(self._lengths) and state["seed"] == self._seed, "other data, or another seed"

    def _starts(self, epoch: int) -> Ints:
        """Where each step of the epoch begins in the epoch's order: as many steps in every epoch, none without rows."""
        num = len(self._lengths)
        if self._examples is not None:
            return np.arange(0, num, self._examples)
        assert self._tokens is not None
        total = int(self._lengths.sum())
        steps = min(max(1, round(total / self._tokens)), num)
        lengths = self._lengths[_order(num, self._seed, epoch)]
        marks = np.searchsorted(np.cumsum(lengths) - lengths, np.arange(steps) * (total / steps))
        count = np.arange(steps)
        return np.minimum(np.maximum.accumulate(marks - count) + count, num - steps + count)


def _bounds(num_samples: int, groups: Ints | None) -> Ints:
    """Where each row begins in the store, and the end: `[rows + 1]`."""
    if groups is None:
        return np.arange(num_samples + 1)
    return np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [num_samples]])


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> Ints:
    return order_at(num_rows, seed, epoch)
