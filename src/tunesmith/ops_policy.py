"""Log-probs and entropies of a policy in chunks: what reinforcement learning asks of a head, without its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.ops import _cast, _chunks, _dlogits, _log_softmax, _logits, _matmul_dtype, _to_hidden
from tunesmith.ops_norm import precise


class _PolicyLogprobs(torch.autograd.Function):
    """log p(target) and H(p) of every row, p = softmax(logits / temperature).

    d logp / d logits = onehot - p, and d H / d logits_i = -p_i (log p_i + H). As for plain log-probs the gradient to
    `hidden` is made in the forward when the head is frozen and the entropy is only measured.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: tuple[float, float | None, float],
        learn_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        scale, softcap, temperature = shape
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ahead = hidden.requires_grad and not head_trains and not learn_entropy
        exact = precise(hidden.dtype)
        logprobs = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        gradient = torch.empty_like(hidden) if ahead else None
        ctx.compute = _matmul_dtype(weight)
        head, shift = _cast(ctx.compute, weight, bias)
        for part in _chunks(len(hidden), weight.shape[0]):
            logits, slope = _logits(hidden[part], head, shift, scale, softcap)
            logits = logits if temperature == 1.0 else logits.to(exact) / temperature
            target = targets[part, None]
            every = _log_softmax(logits)
            logprobs[part] = every.gather(1, target)[:, 0]
            entropies[part] = -(every.exp() * every).sum(1)
            if gradient is not None:
                dlogits = _dlogits(every, target, slope, scale / temperature)
                gradient[part] = _to_hidden(dlogits, head).to(hidden.dtype)
        ctx.ahead, ctx.shape, ctx.learn_entropy = ahead, shape, learn_entropy
        ctx.save_for_backward(*((gradient,) if ahead else (hidden, weight, bias, targets)))
        if not learn_entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        outer, to_entropy = grads
        if ctx.ahead:
            (gradient,) = ctx.saved_tensors
            return (gradient * outer[:, None].to(gradient.dtype), *(None,) * 5)
        hidden, weight, bias, targets = ctx.saved_tensors
        scale, softcap, temperature = ctx.shape
        exact = precise(hidden.dtype)
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=exact)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        head, shift = _cast(ctx.compute, weight, bias)
        for part in _chunks(len(hidden), weight.shape[0]):
            logits, slope = _logits(hidden[part], head, shift, scale, softcap)
            logits = logits if temperature == 1.0 else logits.to(exact) / temperature
            every = _log_softmax(logits)
            dlogits = _dlogits(every, targets[part, None], slope, scale / temperature).mul_(outer[part, None])
            if ctx.learn_entropy:
                dlogits += _entropy_slope(logits, slope, scale / temperature) * to_entropy[part, None]
            if to_bias is not None:
                to_bias += dlogits.sum(0)
            low = dlogits.to(ctx.compute)
            to_hidden[part] = (low @ head).to(hidden.dtype)
            to_weight += low.t() @ hidden[part].to(ctx.compute)
        needs = ctx.needs_input_grad
        return (
            to_hidden,
            to_weight.to(weight.dtype) if needs[1] else None,
            to_bias.to(bias.dtype) if to_bias is not None and bias is not None and needs[2] else None,
            None, None, None,
        )  # fmt: skip


def _entropy_slope(logits: Tensor, slope: Tensor | None, scale: float) -> Tensor:
    """d H / d (hidden · weightᵀ) `[N, V]`: -p (log p + H), through soft cap and scale."""
    every = _log_softmax(logits)
    shares = every.exp()
    entropy = -(shares * every).sum(1, keepdim=True)
    gradient = -shares * (every + entropy)
    return (gradient if slope is None else gradient * slope) * scale


def chunked_policy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    learn_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log p(targets), entropy), each `[N]` fp32 in nats, under the head's distribution at `temperature`.

    `hidden [N, D]`, `weight [V, D]`, `targets [N]`. The entropy carries a gradient only with `learn_entropy`.
    """
    return _PolicyLogprobs.apply(hidden, weight, bias, targets, (scale, softcap, temperature), learn_entropy)  # type: ignore[no-any-return]


def policy_answer(logits: Tensor, targets: Tensor, temperature: float, learn_entropy: bool) -> tuple[Tensor, Tensor]:
    """The same of logits that exist anyway, `[N, V]` and `[N]` -> two of `[N]`."""
    every = (logits.float() / temperature).log_softmax(-1)
    entropies = -(every.exp() * every).sum(-1)
    return every.gather(1, targets[:, None])[:, 0], entropies if learn_entropy else entropies.detach()
