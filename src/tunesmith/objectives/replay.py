"""A task's loss with a share of something else's: replayed rows stand in batches of their own and are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tunesmith.batch import Batch, Loss, Outputs

SCALE = "replay"
"""The column, `[B, T]` of one number, that marks a batch of replayed rows: how much its loss and its count weigh."""


class Summed(Protocol):
    """What a loss is wrapped round."""

    def count(self, batch: Batch) -> float: ...

    def loss(self, outputs: Outputs, batch: Batch) -> Loss: ...


@dataclass(frozen=True, slots=True)
class WithReplay:
    """`task`, with batches that have the column `replay` weighed by it: with s · their count = r / (1 - r) · the task's
    count, the step's loss is (1 - r) · the task's mean + r · the mean of what is replayed.

    Counts of 90 and 30 and r = 0.1 want s = 1/3: (90 · task + 10 · replay) / 100. Metrics are the task's, and
    `task_loss` and `replay_loss` apart. Replayed rows have no loss in the run's row losses.
    """

    task: Summed

    def count(self, batch: Batch) -> float:
        """The task's count; of a replayed batch its weight in it."""
        return self.task.count(batch) * _scale(batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over the batch, weighed when it is replayed."""
        found, count = self.task.loss(outputs, batch), self.task.count(batch)
        if SCALE not in batch.columns:
            metrics = {**found.metrics, "task_loss": (found.sum.detach(), count)}
            return Loss(found.sum, metrics, found.rows)
        return Loss(found.sum * _scale(batch), {"replay_loss": (found.sum.detach(), count)})


def _scale(batch: Batch) -> float:
    return float(batch.columns[SCALE].flatten()[0]) if SCALE in batch.columns else 1.0
