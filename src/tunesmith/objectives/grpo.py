"""Group-relative policy optimisation and its relatives: the advantage is in the data, the loss averages it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tunesmith.batch import Batch, Loss, Outputs
from tunesmith.objectives.policy import is_clipped, kl_from_old, kl_to_reference, surrogate
from tunesmith.ops import segment_sums

Averaging = Literal["completion", "token", "constant", "sum"]


@dataclass(frozen=True, slots=True)
class Grpo:
    """Per completion token: -min(ρA, clip(ρ, 1 - clip, 1 + clip_high) A) + kl_coef · KL(π, π_ref) (2402.03300, eq. 3).

    What tokens are averaged over, `length_normalisation`:
    - completion: the mean over a completion's tokens, then over completions (GRPO)
    - token: all tokens of the step alike (DAPO, 2503.14476, eq. 8)
    - constant: the sum over a completion's tokens divided by `max_tokens` (Dr. GRPO, 2503.20783, 3.2)
    - sum: that sum itself, the policy gradient of a whole completion (RLOO, 2402.14740)

    Columns, `[B, T]` beside `Outputs.logprobs`: `old_logprobs`, `advantages` and, with a KL, `reference_logprobs`. A
    completion whose weights are all 0 is left out of the sum and of the count. Clips are `surrogate`'s.
    """

    clip: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    length_normalisation: Averaging = "completion"
    max_tokens: int = 1

    def count(self, batch: Batch) -> float:
        """Tokens, or completions, or completions times `max_tokens`; known before the forward."""
        lengths = _lengths(batch)
        if self.length_normalisation == "token":
            return float(lengths.sum())
        completions = float((lengths > 0).sum())
        return completions * self.max_tokens if self.length_normalisation == "constant" else completions

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum, and metrics as means over completion tokens."""
        assert outputs.logprobs is not None, "the model gave no log-probs"
        mask, columns = batch.weights > 0, batch.columns
        kept, old, advantages = outputs.logprobs[mask], columns["old_logprobs"][mask], columns["advantages"][mask]
        gains, ratio = surrogate(kept, old, advantages, self.clip, self.clip_high)
        costs = -gains
        parts = {
            "policy_loss": -gains,
            "ratio": ratio,
            "approx_kl": kl_from_old(kept, old),
            "clip_fraction": is_clipped(ratio, advantages, self.clip, self.clip_high).float(),
        }
        if "reference_logprobs" in columns:
            parts["kl"] = kl_to_reference(kept, columns["reference_logprobs"][mask])
            costs = costs + self.kl_coef * parts["kl"] if self.kl_coef else costs
        if outputs.entropy is not None:
            parts["entropy"] = outputs.entropy[mask]
        if self.length_normalisation == "completion":
            costs = costs / _lengths(batch)[batch.segments[mask]]
        count = float(mask.sum())
        return Loss(costs.sum(), {name: (value.detach().double().sum(), count) for name, value in parts.items()})


def _lengths(batch: Batch) -> Tensor:
    """Completion tokens of each segment `[S]`."""
    return segment_sums((batch.weights > 0).to(torch.float32), batch.segments, batch.num_segments)
