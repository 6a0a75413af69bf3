"""Bytes by line, and the peak, of a run that has not begun: arithmetic over a `StepShape`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.ops import CHUNK_LOGITS
from tunesmith.plan.shapes import StepShape

OPTIMIZER_NUMBERS = {"adamw": 2, "sgd": 0}
"""Numbers that an optimizer keeps for each trained parameter, fp32."""
LOGIT_COPIES = 3
"""Chunks of logits that exist at one time: the logits, their softmax, and what becomes of it."""
WORKING_ROWS = 8
"""Activations of the widest kind that a backward holds beside what the forward kept."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each line. `runtime` is what the process holds before a model: interpreter, torch, libraries."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    working: int
    rollouts: int
    runtime: int
    loading: int

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer: what does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most at one time: while training, or while the weights are read."""
        training = self.states + max(self.activations + max(self.head, self.working), self.rollouts)
        return self.runtime + max(training, self.loading)

    def as_json(self) -> dict[str, Any]:
        """Every line and the peak."""
        return {**asdict(self), "peak": self.peak}


def plan_memory(
    shape: StepShape, *, num_tokens: int, num_targets: int, file_bytes: int, runtime: int, optimizer: str, bf16: bool,
    rollouts: int = 0,
) -> MemoryPlan:  # fmt: skip
    """The plan of one micro-batch of `num_tokens` tokens, `num_targets` of them predicted; plain weights are fp32.

    A quantised matrix is unpacked for each product: its numbers in the compute type and, on the way, fp32 and indices.
    While a base is read and packed, it is there as it is stored.
    """
    width = 2 if bf16 else 4
    unpacking = shape.unpacked * (width + 8)
    return MemoryPlan(
        weights=shape.weight_bytes,
        gradients=4 * shape.trainable,
        optimizer=4 * OPTIMIZER_NUMBERS[optimizer] * shape.trainable,
        activations=shape.kept_bytes,
        head=_head_bytes(shape, num_targets, width),
        working=WORKING_ROWS * num_tokens * shape.widest * width + unpacking,
        rollouts=rollouts,
        runtime=runtime,
        loading=shape.weight_bytes + file_bytes,
    )


def _head_bytes(shape: StepShape, num_targets: int, width: int) -> int:
    """Logits in chunks, the head in the compute type, hidden states with their gradient, a trained head's gradient."""
    if shape.head is None:
        return 0
    rows, size, trains = shape.head
    chunk = min(num_targets, max(1, CHUNK_LOGITS // rows)) * rows
    cast = rows * size * width if width != 4 else 0
    return chunk * 4 * LOGIT_COPIES + cast + 2 * num_targets * size * width + (2 * 4 * rows * size if trains else 0)


def mixed_precision_states(parameters: int, trainable: int | None = None) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) in bytes with weights in 16 bits and Adam in mixed precision.

    2 bytes a weight, 2 a gradient, and 12 a trained parameter for the fp32 copy and two moments: 20 + 20 + 120 GB for
    ten billion parameters (ZeRO, 1910.02054, 3.1).
    """
    trained = parameters if trainable is None else trainable
    return 2 * parameters, 2 * trained, 12 * trained
