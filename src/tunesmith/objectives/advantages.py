"""From rewards to advantages: the arithmetic between a round of rollouts and its updates. No gradient flows here."""

from __future__ import annotations

import torch
from torch import Tensor


def penalised_rewards(rewards: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of every token `[N, T]`: -kl_coef · (log π - log π_ref), and the completion's reward on its last token.

    `rewards [N]`; `logprobs`, `reference` and `mask` `[N, T]`, the mask being 1 on a completion's tokens from the
    left. A token of probability 0.5 where the reference says 0.25 costs 0.02 · ln 2 = 0.01386 at kl_coef 0.02
    (InstructGPT, 2203.02155, eq. 2; Ziegler, 1909.08593, eq. 2).
    """
    tokens = -kl_coef * (logprobs - reference) * mask
    last = (mask.sum(1).long() - 1).clamp_min(0)
    tokens[torch.arange(len(tokens), device=tokens.device), last] += rewards.to(tokens.dtype)
    return tokens * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both `[N, T]`, 0 outside the mask; generalised advantage estimation.

    δ_t = r_t + γ V_{t+1} - V_t, A_t = sum over l of (γλ)^l δ_{t+l} (1506.02438, eq. 11 and 16), returns A + V. A
    completion is a whole episode: the value after its last token is 0. With λ = 1 the return is the discounted sum of
    rewards. Rewards 0, 0, 1, values 0.5, 0.6, 0.7, γ = 1, λ = 0.5 give δ = 0.1, 0.1, 0.3 and A = 0.225, 0.25, 0.3.
    """
    advantages = torch.zeros_like(values)
    running, following = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask[:, t].to(values.dtype)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * here
        following = values[:, t] * here
        advantages[:, t] = running
    return advantages, (advantages + values) * mask.to(values.dtype)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values [N, T]` with mean 0 and variance 1 over the mask, 0 outside it; a constant becomes 0."""
    keep = mask.to(values.dtype)
    count = keep.sum().clamp_min(1)
    centred = (values - (values * keep).sum() / count) * keep
    return centred / (centred.square().sum() / count + 1e-8).sqrt()


def group_advantages(
    rewards: Tensor, groups: Tensor, *, baseline: str = "mean", normalise: bool = True, eps: float = 1e-4
) -> Tensor:
    """Advantage `[N]` of each completion over the others of its group: `rewards [N]`, `groups [N]`.

    `mean`: r - mean(group), divided by (the group's sample deviation + eps) when normalised (GRPO, 2402.03300, 4.1.2);
    without the division Dr. GRPO (2503.20783, 3.2). `leave_one_out`: r - mean of the others (RLOO, 2402.14740, eq. 7).
    Rewards 1, 0, 0, 0 give 0.75, -0.25 … over a deviation of 0.5, and leave-one-out 1, -1/3 …; equal rewards give 0.
    """
    _, owner, sizes = groups.unique(return_inverse=True, return_counts=True)
    assert bool((sizes >= 2).all()), "a group has at least two completions"
    exact = rewards.double()
    size = sizes.double()[owner]
    total = torch.zeros(len(sizes), dtype=torch.float64, device=rewards.device).index_add(0, owner, exact)[owner]
    advantages = exact - ((total - exact) / (size - 1) if baseline == "leave_one_out" else total / size)
    if normalise:
        squares = torch.zeros(len(sizes), dtype=torch.float64, device=rewards.device)
        squares = squares.index_add(0, owner, (exact - total / size).square())[owner]
        advantages = advantages / ((squares / (size - 1)).sqrt() + eps)
    return advantages.to(rewards.dtype)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, *, gain: float = 0.1) -> float:
    """The coefficient for the next round, raised while the KL (nats per completion) is above its target.

    kl_coef · (1 + gain · clip(kl / target - 1, -0.2, 0.2)) (Ziegler, 1909.08593, 2.2).
    """
    return kl_coef * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 one no better than the mean.

    NaN when the returns do not vary.
    """
    keep = mask.bool()
    truth, error = returns[keep].double(), (returns - values)[keep].double()
    variance = float(truth.var(correction=0)) if len(truth) else 0.0
    return 1 - float(error.var(correction=0)) / variance if variance > 0 else float("nan")
