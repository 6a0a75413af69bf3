"""Negative log-likelihood of the targets: pretrain, mlm and sft differ only in their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.batch import Batch, Loss, Outputs
from tunesmith.ops import segment_sums


@dataclass(frozen=True, slots=True)
class Likelihood:
    """sum over tokens of -w · log p(target); counts the weights, so the mean is nats per target token."""

    def count(self, batch: Batch) -> float:
        """Total weight of the batch, known before the forward."""
        return float(batch.weights.sum())

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over the batch, differentiable."""
        assert outputs.logprobs is not None, "the model gave no log-probs"
        costs = -(batch.weights * outputs.logprobs)
        return Loss(costs.sum(), rows=_per_segment(costs.detach(), batch))


def _per_segment(costs: Tensor, batch: Batch) -> Tensor:
    """Nats per target of each segment `[S]`; 0 where nothing is trained on."""
    sums = segment_sums(costs, batch.segments, batch.num_segments)
    weight = segment_sums(batch.weights.to(costs.dtype), batch.segments, batch.num_segments)
    return torch.where(weight > 0, sums / weight.clamp_min(1e-12), 0.0)
