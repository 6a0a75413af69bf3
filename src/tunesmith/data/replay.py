"""ReplaySource: the batches of another source, and in every step rows of something else beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import pack
from tunesmith.data.source import Samples

SEED = 7919
"""Sets the draw of replayed rows apart from the order of the task's."""
COLUMN = "replay"
"""The column that weighs replayed rows; `objectives.replay` reads it."""


class Steps(Protocol):
    """The source that is added to."""

    @property
    def num_steps(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def step_batches(self, step: int) -> Sequence[Batch]: ...

    def at_boundary(self, step: int) -> bool: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Share:
    """How much is replayed: the ratio's bounds, and the seed of which rows."""

    least: float
    most: float
    seed: int = 0


class ReplaySource:
    """Every step of `task` and, after its batches, rows of `store` whose weighed count is `ratio` of the whole.

    Which rows depends on (seed, step, ratio); the ratio is adapted between steps, within [`least`, `most`], and stands
    in the source's state, so a resumed run draws the same. About as many tokens are drawn as the ratio asks for, one
    row at least; their weight makes the share exact. `count` is the objective's, `make_batch(samples, step)` collates.
    """

    def __init__(
        self,
        task: Steps,
        store: Samples,
        *,
        share: Share,
        micro_batch_tokens: int,
        count: Callable[[Batch], float],
        make_batch: Callable[[Sequence[Sample], int], Batch],
    ) -> None:
        assert 0 < share.least <= share.most < 1 and len(store) > 0, "a share, and something to replay"
        self._task, self._store, self._seed, self._count, self._make = task, store, share.seed, count, make_batch
        self._micro, self._least, self._most = micro_batch_tokens, share.least, share.most
        self.ratio = share.least

    @property
    def num_steps(self) -> int:
        """The task's."""
        return self._task.num_steps

    @property
    def steps_per_epoch(self) -> int:
        """The task's."""
        return self._task.steps_per_epoch

    def at_boundary(self, step: int) -> bool:
        """The task's."""
        return self._task.at_boundary(step)

    def step_batches(self, step: int) -> list[Batch]:
        """The task's micro-batches, then those of replayed rows with the column that weighs them."""
        batches = list(self._task.step_batches(step))
        odds = self.ratio / (1 - self.ratio)
        rows = self._drawn(step, odds * sum(batch.num_tokens for batch in batches))
        parts = pack([int(self._store.lengths[row]) for row in rows], rows, self._micro)
        replayed = [self._make([self._store[row] for row in part], step) for part in parts]
        theirs, ours = sum(map(self._count, replayed)), sum(map(self._count, batches))
        if not theirs or not ours:
            return batches
        return batches + [self._weighed(batch, odds * ours / theirs) for batch in replayed]

    def adapt(self, worst: float, limit: float, near: float) -> None:
        """Double the ratio when `worst` is above `near` of the limit, halve it when below half of that."""
        if not worst <= near * limit:
            self.ratio = min(self._most, 2 * self.ratio)
        elif worst < near * limit / 2:
            self.ratio = max(self._least, self.ratio / 2)

    def state(self) -> dict[str, Any]:
        """The task's state and the ratio."""
        return {"task": self._task.state(), "ratio": self.ratio}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._task.restore(state["task"])
        self.ratio = float(state["ratio"])

    def _drawn(self, step: int, tokens: float) -> list[int]:
        """Rows, none twice, of about so many tokens in all."""
        order = np.random.default_rng([self._seed, SEED, step]).permutation(len(self._store))
        total = np.cumsum(np.asarray(self._store.lengths)[order])
        return [int(row) for row in order[: max(1, int(np.searchsorted(total, tokens, side="right")))]]

    def _weighed(self, batch: Batch, scale: float) -> Batch:
        column = torch.full(batch.weights.shape, scale, dtype=torch.float64)
        return replace(batch, columns={**batch.columns, COLUMN: column})
