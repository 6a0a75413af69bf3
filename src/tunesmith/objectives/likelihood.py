"""Negative log-likelihood of the targets: pretrain, mlm and sft differ only in their weights."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.batch import Batch, Loss, Outputs


@dataclass(frozen=True, slots=True)
class Likelihood:
    """sum over tokens of -w · log p(target); counts the weights, so the mean is nats per target token."""

    def count(self, batch: Batch) -> float:
        """Total weight of the batch, known before the forward."""
        return float(batch.weights.sum())

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over the batch, differentiable."""
        assert outputs.logprobs is not None, "the model gave no log-probs"
        return Loss(-(batch.weights * outputs.logprobs).sum())
