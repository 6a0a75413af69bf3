"""Bytes by line, and the peak, of a run that has not begun: arithmetic over a `StepShape`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.plan.shapes import StepShape

OPTIMIZER_NUMBERS = {"adamw": 2, "sgd": 0}
"""Numbers that an optimizer keeps for each trained parameter, fp32."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each line. `step` is the most that a step holds at one time: of the activations, of the gradients as
    they come, logits, and what is on its way. `allocator` is held beside it because of holes between tensors, and
    `runtime` is what the process holds without a model: interpreter, torch, libraries. `first_use` joins it once a step
    runs: libraries as far as they are touched, products that are compiled. `features` are what is kept of a frozen
    body, mapped from disk: a system short of memory takes them back."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    step: int
    allocator: int
    rollouts: int
    runtime: int
    loading: int
    first_use: int = 0
    features: int = 0

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer: what does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most at one time: while training, or while the weights are read."""
        step = max(self.step, self.rollouts) + self.allocator
        training = self.weights + self.optimizer + step + self.first_use + self.features
        return self.runtime + max(training, self.loading)

    def as_json(self) -> dict[str, Any]:
        """Every line and the peak."""
        return {**asdict(self), "peak": self.peak}


def plan_memory(
    shape: StepShape,
    *,
    file_bytes: int,
    runtime: int,
    optimizer: str,
    on_cpu: bool = True,
    rollouts: int = 0,
    first_use: int = 0,
    features: int = 0,
) -> MemoryPlan:
    """The plan of one micro-batch. While a base is read, it is there as it is stored beside what is made of it.

    Only a CPU's heap is known (glibc's); a GPU's allocator keeps blocks of like size together.
    """
    return MemoryPlan(
        weights=shape.weight_bytes,
        gradients=4 * shape.trainable,
        optimizer=4 * OPTIMIZER_NUMBERS[optimizer] * shape.trainable,
        activations=shape.kept_bytes,
        head=shape.head_bytes,
        step=shape.step_bytes,
        allocator=shape.heap_bytes if on_cpu else 0,
        rollouts=rollouts,
        runtime=runtime,
        loading=shape.weight_bytes + file_bytes,
        first_use=first_use,
        features=features,
    )


def mixed_precision_states(parameters: int, trainable: int | None = None) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) in bytes with weights in 16 bits and Adam in mixed precision.

    2 bytes a weight, 2 a gradient, and 12 a trained parameter for the fp32 copy and two moments: 20 + 20 + 120 GB for
    ten billion parameters (ZeRO, 1910.02054, 3.1).
    """
    trained = parameters if trainable is None else trainable
    return 2 * parameters, 2 * trained, 12 * trained
