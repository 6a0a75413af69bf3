"""Preferences without a reward model: DPO and its relatives, on the log-probs of whole completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.batch import Batch, Loss, Outputs
from tunesmith.objectives.pairs import Compared, Pairs, half_for_ties, num_groups, pairs_of, weighted
from tunesmith.ops import segment_sums

LossName = Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"]
REFERENCE_FREE: tuple[LossName, ...] = ("orpo", "simpo")


@dataclass(frozen=True, slots=True)
class Preference:
    """With L = log-prob of a completion (its sum over tokens), l = L per token, and h = (L₊ - L₊ref) - (L₋ - L₋ref):

    - sigmoid: -log σ(βh) (DPO, 2305.18290, eq. 7); with label smoothing ε: -(1-ε) log σ(βh) - ε log σ(-βh) (cDPO)
    - ipo: (h - 1/(2β))² (2310.12036, eq. 17)
    - hinge: max(0, 1 - βh) (SLiC, 2305.10425, with the reference's log-ratio as in DPO)
    - orpo: β · -log σ(log odds(l₊) - log odds(l₋)) - l₊, odds(l) = e^l / (1 - e^l) (2403.07691, eq. 6 and 7)
    - simpo: -log σ(β l₊ - β l₋ - γ) (2405.14734, eq. 6)

    `length_normalized` puts l for L in the first three. `sft_coef` adds that many times -l₊ (RPO, 2404.19733, eq. 1).
    `columns["reference_logprobs"] [B, T]` stand beside `Outputs.logprobs`. Counts prompts: the pairs of a ranking of
    K share one prompt's weight. Like the papers, and unlike a mean over all tokens of a batch, the negative
    log-likelihood is averaged within each chosen completion first.
    """

    loss_name: LossName = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    gamma: float = 0.0
    sft_coef: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """False for the losses that look at the policy alone."""
        return self.loss_name not in REFERENCE_FREE

    def count(self, batch: Batch) -> float:
        """Prompts with completions that differ in rank, known before the forward."""
        return num_groups(batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over prompts, and means over pairs: `accuracy` (the better completion has the higher implicit
        reward; a tie is half right), `margin` between the two rewards, rewards and log-probs of both sides."""
        found = self.compare(outputs, batch)
        return Loss(weighted(found.costs, found.pairs.share), self._metrics(found, outputs, batch), found.rows(batch))

    def compare(self, outputs: Outputs, batch: Batch) -> Compared:
        """The implicit reward of every completion and the loss of every pair."""
        assert outputs.logprobs is not None, "the model gave no log-probs"
        pairs = pairs_of(batch)
        policy, lengths = _totals(outputs.logprobs, batch), _totals(torch.ones_like(outputs.logprobs), batch)
        rewards = self.rewards(policy, lengths, batch)
        costs = self._costs(rewards, policy / lengths, pairs)
        if self.sft_coef:
            costs = costs - self.sft_coef * (policy / lengths)[pairs.better]
        return Compared(rewards, costs, pairs)

    def rewards(self, policy: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
        """The implicit reward `[S]` of every completion: β(L - Lref), per token where the loss is; β·l without a
        reference."""
        if self.needs_reference:
            reference = _totals(batch.columns["reference_logprobs"].to(policy.dtype), batch)
            return self.beta * (policy - reference) / (lengths if self.length_normalized else 1.0)
        return self.beta * policy / lengths

    def _costs(self, rewards: Tensor, per_token: Tensor, pairs: Pairs) -> Tensor:
        if self.loss_name == "orpo":
            odds = _log_odds(per_token)
            return self.beta * F.softplus(odds[pairs.worse] - odds[pairs.better]) - per_token[pairs.better]
        margins = rewards[pairs.better] - rewards[pairs.worse]
        if self.loss_name == "simpo":
            return F.softplus(self.gamma - margins)
        if self.loss_name == "ipo":
            return (margins / self.beta - 1 / (2 * self.beta)).square()
        if self.loss_name == "hinge":
            return F.relu(1 - margins)
        smooth = self.label_smoothing
        return (1 - smooth) * F.softplus(-margins) + smooth * F.softplus(margins)

    def _metrics(self, found: Compared, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        assert outputs.logprobs is not None
        pairs, rewards, gaps = found.pairs, found.scores.detach(), found.gaps.detach()
        policy = _totals(outputs.logprobs.detach(), batch)
        metrics = {
            "accuracy": pairs.mean(half_for_ties(gaps)),
            "margin": pairs.mean(gaps),
            "chosen_reward": pairs.mean(rewards[pairs.better]),
            "rejected_reward": pairs.mean(rewards[pairs.worse]),
            "chosen_logprob": pairs.mean(policy[pairs.better]),
            "rejected_logprob": pairs.mean(policy[pairs.worse]),
        }
        if self.needs_reference:
            reference = _totals(batch.columns["reference_logprobs"].to(policy.dtype), batch)
            drift = (policy - reference) / _totals(torch.ones_like(outputs.logprobs), batch)
            metrics["log_ratio"] = pairs.mean((drift[pairs.better] + drift[pairs.worse]) / 2)
        return metrics


def _totals(values: Tensor, batch: Batch) -> Tensor:
    """Weighted sum of `values [B, T]` over each segment `[S]`."""
    return segment_sums(values * batch.weights.to(values.dtype), batch.segments, batch.num_segments)


def _log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0, exact near 0 and far from it."""
    x = logprobs.clamp(max=-1e-6)
    near = x > -0.6931
    safe_near, safe_far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return x - torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))
