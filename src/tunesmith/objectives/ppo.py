"""Proximal policy optimisation: clipped policy, clipped value, entropy, and the pre-training mix of PPO-ptx."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.batch import Batch, Loss, Outputs
from tunesmith.objectives.policy import is_clipped, kl_from_old, surrogate


@dataclass(frozen=True, slots=True)
class Ppo:
    """Per completion token: -min(ρA, clip(ρ)A) + value_coef · value loss - entropy_coef · H (1707.06347, eq. 7, 9).

    The value loss is ½ max((V - R)², (clip(V, V_old ± value_clip) - R)²) (1707.06347's reference code, `ppo2`); with
    `value_clip` None ½ (V - R)². Columns, all `[B, T]` beside `Outputs.logprobs`: `old_logprobs`, `advantages`,
    `old_values` and `returns`; and, where text is mixed in (InstructGPT, 2203.02155, eq. 2), `ptx`: how much the
    log-prob of a token of that text counts, 0 on completions. A token of `ptx` above 0 is in no other term and not in
    the count: the source sets it to ptx_coef · (completion tokens of the step / text tokens of the step), so that the
    step's loss is the mean PPO loss plus ptx_coef times the mean loss of the text. Counts completion tokens.

    Where the model gives no values (a critic that trains elsewhere), the value term is left out.
    """

    clip: float = 0.2
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    entropy_coef: float = 0.0

    def count(self, batch: Batch) -> float:
        """Completion tokens, known before the forward."""
        return float(_policy_mask(batch).sum())

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The sum over tokens; metrics are means over completion tokens."""
        assert outputs.logprobs is not None, "the model gave no log-probs"
        mask, columns = _policy_mask(batch), batch.columns
        kept, old, advantages = outputs.logprobs[mask], columns["old_logprobs"][mask], columns["advantages"][mask]
        gains, ratio = surrogate(kept, old, advantages, self.clip, self.clip)
        count = float(mask.sum())
        metrics = _means(
            count,
            policy_loss=-gains,
            ratio=ratio,
            approx_kl=kl_from_old(kept, old),
            clip_fraction=is_clipped(ratio, advantages, self.clip, self.clip).float(),
        )
        total = -gains.sum()
        if outputs.values is not None:
            costs = self._value_costs(outputs.values[mask], columns["old_values"][mask], columns["returns"][mask])
            total = total + self.value_coef * costs.sum()
            metrics |= _means(count, value_loss=costs)
        if outputs.entropy is not None:
            entropy = outputs.entropy[mask]
            total = total - self.entropy_coef * entropy.sum() if self.entropy_coef else total
            metrics |= _means(count, entropy=entropy)
        return self._with_text(total, metrics, outputs.logprobs, batch)

    def _value_costs(self, values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
        costs = (values - returns).square()
        if self.value_clip is not None:
            near = old + (values - old).clamp(-self.value_clip, self.value_clip)
            costs = torch.maximum(costs, (near - returns).square())
        return 0.5 * costs

    def _with_text(
        self, total: Tensor, metrics: dict[str, tuple[Tensor, float]], logprobs: Tensor, batch: Batch
    ) -> Loss:
        """Add the pre-training term; without the column, or with nothing in it, not a bit changes."""
        ptx = batch.columns.get("ptx")
        if ptx is None or not bool((ptx > 0).any()):
            return Loss(total, metrics)
        text = (ptx > 0) & (batch.weights > 0)
        total = total - (ptx[text] * logprobs[text]).sum()
        return Loss(total, {**metrics, **_means(float(text.sum()), ptx_loss=-logprobs[text])})


def _policy_mask(batch: Batch) -> Tensor:
    """Where a completion token is predicted, `[B, T]` bool."""
    ptx = batch.columns.get("ptx")
    return batch.weights > 0 if ptx is None else (batch.weights > 0) & (ptx == 0)


def _means(count: float, **values: Tensor) -> dict[str, tuple[Tensor, float]]:
    return {name: (value.detach().double().sum(), count) for name, value in values.items()}
