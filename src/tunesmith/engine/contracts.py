"""What the loop asks of the parts it is given: objective, source, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from tunesmith.batch import Batch, Loss, Outputs
from tunesmith.engine.limit import Limit
from tunesmith.engine.optim import OptimSpec


class Objective(Protocol):
    """The loss as pure mathematics, in two parts."""

    def count(self, batch: Batch) -> float:
        """What the sum is divided by, known before the forward."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over the batch."""
        ...


class Source(Protocol):
    """Yields the batches of each step; offline data is a pure function of (seed, step)."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data."""
        ...

    def step_batches(self, step: int) -> Sequence[Batch]:
        """The micro-batches of `step`, counted from 1."""
        ...

    def at_boundary(self, step: int) -> bool:
        """True when `step` ends a pass over the data."""
        ...

    def state(self) -> dict[str, Any]:
        """What resuming needs, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        ...


Evaluate = Callable[[int], Mapping[str, float]]
"""step -> metric name -> value on the held-out rows."""
KeepRows = Callable[[int, Sequence[tuple[Batch, Tensor]]], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage is data: a model that answers a batch, an objective that sums, a source that yields.

    `describe` is what the source knows of the data of a step, as of rollouts their reward; it joins the step's line.
    `keep_rows` receives each finished step's batches with the loss of each segment `[S]`, where the objective gives it.
    """

    name: str
    model: nn.Module
    objective: Objective
    source: Source
    evaluate: Evaluate | None = None
    describe: Evaluate | None = None
    keep_rows: KeepRows | None = None


@dataclass(frozen=True, slots=True)
class FitSpec:
    """The loop's settings. `eval_every` and `save_every` are steps; None means the end of every epoch."""

    seed: int
    optim: OptimSpec
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    select_by: str | None = None
    patience: int | None = None
    device: str = "cpu"
    limit: Limit | None = None


@dataclass(slots=True)
class Progress:
    """What is counted along the way; saved with every checkpoint."""

    tokens: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0
    evaluations: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    """What a limit has decided so far (`engine/limit.py`)."""

    def note(self, value: float, step: int, *, lower: bool) -> bool:
        """Take an evaluation into account; True when it is the best so far. NaN is never best."""
        self.evaluations += 1
        better = value == value and (
            self.best_value is None or (value < self.best_value if lower else value > self.best_value)
        )
        if better:
            self.best_value, self.best_step, self.worse_in_a_row = value, step, 0
        else:
            self.worse_in_a_row += 1
        return better
