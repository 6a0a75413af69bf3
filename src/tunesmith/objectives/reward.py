"""Reward models: scores of the answers to one prompt, ordered as people ordered them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from tunesmith.batch import Batch, Loss, Outputs
from tunesmith.objectives.pairs import Compared, half_for_ties, num_groups, pairs_of, weighted


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """-1 / C(K, 2) · sum over the pairs of a prompt of log sigmoid(r_better - r_worse - margin) (InstructGPT,
    2203.02155, eq. 1). `margin`, and the row's own added to it, are Llama 2's (2307.09288, eq. 2); 0 is InstructGPT's
    loss. `center_coef` adds that many times (r_better + r_worse)² per pair (2312.09244, eq. 5).

    A gap of 0.4 costs 0.5130 nats, one of -0.4 costs 0.9130. Ties are dropped. Counts prompts.
    """

    margin: float = 0.0
    center_coef: float = 0.0

    def count(self, batch: Batch) -> float:
        """Prompts with answers that differ in rank, known before the forward."""
        return num_groups(batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over prompts; `accuracy` and `margin` (the gap in score) are means over pairs, then prompts."""
        found = self.compare(outputs, batch)
        pairs, gaps = found.pairs, found.gaps
        metrics = {"accuracy": pairs.mean(half_for_ties(gaps)), "margin": pairs.mean(gaps)}
        return Loss(weighted(found.costs, pairs.share), metrics, found.rows(batch))

    def compare(self, outputs: Outputs, batch: Batch) -> Compared:
        """The score of every answer and the loss of every pair."""
        assert outputs.scores is not None, "the model gave no scores"
        scores, pairs = outputs.scores[:, 0], pairs_of(batch)
        better, worse = scores[pairs.better], scores[pairs.worse]
        costs = F.softplus(self.margin + pairs.margins.to(scores.dtype) - (better - worse))
        if self.center_coef:
            costs = costs + self.center_coef * (better + worse).square()
        return Compared(scores, costs, pairs)
