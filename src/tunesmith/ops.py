"""Per-segment sums, packed attention and log-probs in chunks: the few operations where the speed lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops_attention import block_attention
from tunesmith.ops_norm import precise

BLOCK_TOKENS = 256
"""Longest segment whose backward is made of whole tiles; torch's own kernel wins beyond (docs/log.md)."""
CHUNK_LOGITS = 8_000_000
"""Logits that exist at one time: 32 MB in fp32, a little less than what a heap maps anew at every request."""


def segment_sums(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Sum `values [B, T]` within each segment (`segments [B, T]`, -1 = padding) -> `[S]`."""
    keep = segments >= 0
    sums = torch.zeros(num_segments, dtype=values.dtype, device=values.device)
    return sums.index_add(0, segments[keep], values[keep])


def window_mask(num_queries: int, num_keys: int, *, causal: bool, window: int | None, device: Any) -> Tensor | None:
    """Which keys a query may see, `[num_queries, num_keys]` bool, or None when all or plainly causal.

    The last query stands at the last key. `window` counts the query itself when causal (Mistral, 2310.06825, 2);
    without causality a key may lie `window` to either side (ModernBERT, 2412.13663, 2.1.2).
    """
    if window is None or window >= num_keys:
        return None
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    if causal:
        return (keys <= queries) & (keys > queries - window)
    return (queries - keys).abs() <= window


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of `query [B, H, Tq, d]` over `key, value [B, Hkv, Tk, d]` -> `[B, H, Tq, d]`."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None,
            scale=scaling, enable_gqa=grouped,
        )  # fmt: skip
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if causal and mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.to(precise(scores.dtype)).softmax(-1).to(value.dtype), dropout)
    return weights @ value


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    window: int | None,
    **options: Any,
) -> Tensor:
    """Attention inside each segment of one flat row, `[1, H, T, d]` -> `[1, H, T, d]`: no mask, no leak.

    `lengths` are the segments' tokens in reading order; equal neighbours are computed together.
    """
    sizes = list(lengths)
    if _in_blocks(query, sizes, window, options):
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        dropout = float(options.get("dropout") or 0.0)
        return block_attention(query, key, value, sizes, causal=causal, scaling=scaling, dropout=dropout)
    parts = []
    for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        mask = window_mask(q.shape[2], k.shape[2], causal=causal, window=window, device=q.device)
        parts.append(attend(q, k, v, mask=mask, causal=causal, **options))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _in_blocks(query: Tensor, sizes: list[int], window: int | None, options: dict[str, Any]) -> bool:
    """True where blocks of segments are the faster way: on a CPU, with short segments, or with dropout.

    Measured or trained, the way is the same, so that a policy's ratio to itself is exactly 1.
    """
    if query.device.type != "cpu" or query.shape[0] != 1 or options.get("softcap") is not None:
        return False
    longest = max(sizes)
    return (window is None or window >= longest) and (longest <= BLOCK_TOKENS or bool(options.get("dropout")))


class _ChunkedLogprobs(torch.autograd.Function):
    """log p(target) of every row without keeping logits.

    With a frozen head the gradient to `hidden` is made in the forward, because row i depends on hidden i alone:
    d logp_i / d hidden_i = (onehot_i - p_i) · W. A head that trains needs the outer gradient first, so its logits
    are computed again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ahead = hidden.requires_grad and not head_trains
        logprobs = torch.empty(len(hidden), dtype=precise(hidden.dtype), device=hidden.device)
        gradient = torch.empty_like(hidden) if ahead else None
        ctx.compute = _matmul_dtype(weight)
        head, shift = _cast(ctx.compute, weight, bias)
        for part in _chunks(len(hidden), weight.shape[0]):
            logits, slope = _logits(hidden[part], head, shift, scale, softcap)
            target, every = targets[part, None], _log_softmax(logits)
            logprobs[part] = every.gather(1, target)[:, 0]
            if gradient is not None:
                gradient[part] = _to_hidden(_dlogits(every, target, slope, scale), head).to(hidden.dtype)
        ctx.ahead, ctx.scale, ctx.softcap = ahead, scale, softcap
        ctx.save_for_backward(*((gradient,) if ahead else (hidden, weight, bias, targets)))
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outer = grads[0]
        if ctx.ahead:
            (gradient,) = ctx.saved_tensors
            return (gradient * outer[:, None].to(gradient.dtype), None, None, None, None, None)
        hidden, weight, bias, targets = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        exact = precise(hidden.dtype)
        to_weight = torch.zeros_like(weight, dtype=exact)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        head, shift = _cast(ctx.compute, weight, bias)
        for part in _chunks(len(hidden), weight.shape[0]):
            logits, slope = _logits(hidden[part], head, shift, ctx.scale, ctx.softcap)
            dlogits = _dlogits(_log_softmax(logits), targets[part, None], slope, ctx.scale).mul_(outer[part, None])
            if to_bias is not None:
                to_bias += dlogits.sum(0)
            dlogits = dlogits.to(ctx.compute)
            to_hidden[part] = (dlogits @ head).to(hidden.dtype)
            to_weight += dlogits.t() @ hidden[part].to(ctx.compute)
        needs = ctx.needs_input_grad
        return (
            to_hidden,
            to_weight.to(weight.dtype) if needs[1] else None,
            to_bias.to(bias.dtype) if to_bias is not None and bias is not None and needs[2] else None,
            None,
            None,
            None,
        )


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    rows = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    """The type matrix products run in here: autocast's where it is on. A backward has no autocast, so it is kept."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _cast(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits and, under a soft cap, their slope to what was capped; wider than the product's type where they are
    worked on."""
    logits = F.linear(hidden.to(weight.dtype), weight, bias)
    if scale != 1.0:
        logits = logits.to(precise(hidden.dtype)) * scale
    if softcap is None:
        return logits, None
    tanh = torch.tanh(logits.to(precise(hidden.dtype)) / softcap)
    return tanh * softcap, 1 - tanh * tanh


def _log_softmax(logits: Tensor) -> Tensor:
    """In fp32, or float64 for float64 logits; one pass that widens as it reads."""
    return logits.log_softmax(1, dtype=precise(logits.dtype))


def _dlogits(logprobs: Tensor, target: Tensor, slope: Tensor | None, scale: float) -> Tensor:
    """(onehot - p) through soft cap and scale, in the place of `logprobs [N, V]`; `target [N, 1]`."""
    gradient = logprobs.exp_().neg_()
    gradient.scatter_add_(1, target, torch.ones_like(target, dtype=gradient.dtype))
    if slope is not None:
        gradient *= slope
    return gradient.mul_(scale) if scale != 1.0 else gradient


def _to_hidden(dlogits: Tensor, weight: Tensor) -> Tensor:
    return dlogits.to(weight.dtype) @ weight


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log p(targets) under the head, `hidden [N, D]`, `weight [V, D]`, `targets [N]` -> `[N]` fp32, nats.

    logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap); never more than `CHUNK_LOGITS` of them exist.
    """
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, scale, softcap)  # type: ignore[no-any-return]
