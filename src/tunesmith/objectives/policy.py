"""What PPO and GRPO share: the clipped surrogate and two estimates of a KL divergence, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(min(ρA, clip(ρ, 1 - low, 1 + high) A), ρ), elementwise, with ρ = exp(log π - log π_old) (PPO, 1707.06347,
    eq. 7; low and high apart: DAPO, 2503.14476, eq. 10).

    At 0.2: ρ 1.5 and A 1 give 1.2, A -1 gives -1.5; ρ 0.5 gives 0.5 and -0.8. Where the clipped one is the smaller
    the gradient is 0.
    """
    ratio = torch.exp(logprobs - old)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages), ratio


def kl_to_reference(logprobs: Tensor, reference: Tensor) -> Tensor:
    """π_ref/π - log(π_ref/π) - 1 of tokens drawn from π: unbiased for KL(π, π_ref) and never negative (GRPO,
    2402.03300, eq. 4; Schulman's k3)."""
    gap = reference - logprobs
    return torch.exp(gap) - gap - 1


def kl_from_old(logprobs: Tensor, old: Tensor) -> Tensor:
    """(ρ - 1) - log ρ of tokens drawn from π_old: unbiased for KL(π_old, π) and never negative (Schulman's k3)."""
    gap = logprobs - old
    return torch.expm1(gap) - gap


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where the clip holds the gradient back: ρ above 1 + high with A > 0, or below 1 - low with A < 0."""
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
