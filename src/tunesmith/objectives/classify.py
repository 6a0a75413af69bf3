"""Cross-entropy over classes, or one yes/no per class when labels are not exclusive."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from tunesmith.batch import Batch, Loss, Outputs


@dataclass(frozen=True, slots=True)
class Classify:
    """Single label: -log softmax(scores)[label]. Multi label: mean over classes of binary cross-entropy.

    Counts examples, so the mean is nats per example.
    """

    multi_label: bool = False

    def count(self, batch: Batch) -> float:
        """Examples in the batch, known before the forward."""
        return float(batch.num_segments)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over the batch, with `accuracy` as (right, examples)."""
        scores, labels = outputs.scores, batch.labels
        assert scores is not None and labels is not None, "classification needs scores and labels"
        if self.multi_label:
            costs = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none").mean(1)
            right = ((scores > 0) == (labels > 0.5)).all(1).sum()
        else:
            costs = F.cross_entropy(scores, labels, reduction="none")
            right = (scores.argmax(1) == labels).sum()
        return Loss(costs.sum(), {"accuracy": (right.detach().float(), float(batch.num_segments))}, costs.detach())
