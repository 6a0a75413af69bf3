"""Is what was written what was trained? Logits on probe sequences, before anything is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.packing import evaluating, without_cache

PROBE_LENGTHS = (12, 5, 9, 3)
# Largest difference over the largest logit, by the dtype the weights are stored in.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two models' logits lie apart: `error` is relative to the largest logit, `kl` in nats a token."""

    error: float
    kl: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """True within the tolerance; NaN never holds."""
        return self.error <= self.tolerance


def probe_ids(vocabulary: int, *, avoid: int | None = None, seed: int = 0) -> list[list[int]]:
    """A few seeded random sequences of token ids, the pad token avoided."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocabulary, (length,), generator=generator) for length in PROBE_LENGTHS]
    return [torch.where(row == avoid, (row + 1) % vocabulary, row).tolist() for row in rows]


def logits_of(model: Any, probes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The model's own logits, one sequence at a time, fp32 on the CPU."""
    with evaluating(model):
        rows = [torch.tensor([list(row)], device=model.device) for row in probes]
        return [model(input_ids=row, **without_cache(model)).logits[0].float().cpu() for row in rows]


def agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> Agreement:
    """Compare the logits of two models on the same probes; `dtype` is what the written weights are stored in."""
    tolerance = TOLERANCE.get(dtype, 1e-4)
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return Agreement(float("inf"), float("inf"), tolerance)
    scale = max(float(row.abs().max()) for row in ours)
    error = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max()
    pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(ours, theirs, strict=True)]
    kl = torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in pairs]).mean()
    return Agreement(float(error) / max(scale, 1e-6), float(kl), tolerance)
