"""Attention of many packed segments at once: blocks of like length, and a backward made of few large products.

torch's own CPU kernel is fast forwards and slow backwards (docs/log.md), so the forward is its, and the backward here
is Dao et al. 2022 (arXiv:2205.14135, B.4) over whole tiles: P again from Q and K, D = rowsum(dO · O), then
dV = Pᵀ dO, dS = P · (dO Vᵀ - D), dQ = s dS K, dK = s dSᵀ Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LIKE = 0.7
"""A block holds segments of at least this share of its longest one: what is padded costs less than more calls."""
TILE_SCORES = 1 << 22
"""Scores of one tile of the backward: 4 million, 16 MB in fp32."""
TILE_QUERIES = 512
"""Queries of one tile: of a longer causal segment, keys past the tile's end are never touched."""


@dataclass(frozen=True, slots=True)
class Block:
    """Segments of like length: where they lie in the flat row, `places [G, L]`, and which of these places are real.

    `real` is None when all are; a place past the end of a shorter segment is 0.
    """

    longest: int
    places: Tensor
    real: Tensor | None


@dataclass(frozen=True, slots=True)
class Blocks:
    """All segments of a flat row: `order [T]` is where each token lies in the blocks, one after the other."""

    blocks: tuple[Block, ...]
    order: Tensor


@lru_cache(maxsize=64)
def blocks_of(lengths: tuple[int, ...]) -> Blocks:
    """The segments in blocks, longest first."""
    starts = [0, *accumulate(lengths)]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= LIKE * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    blocks, order, before = [], torch.empty(starts[-1], dtype=torch.long), 0
    for group in groups:
        sizes, first = [lengths[i] for i in group], torch.tensor([starts[i] for i in group])
        steps = torch.arange(sizes[0])
        real = steps[None] < torch.tensor(sizes)[:, None]
        places = first[:, None] + steps
        order[places[real]] = before + real.flatten().nonzero()[:, 0]
        before += real.numel()
        blocks.append(Block(sizes[0], torch.where(real, places, 0), None if min(sizes) == sizes[0] else real))
    return Blocks(tuple(blocks), order)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, causal: bool, scaling: float
) -> Tensor:
    """Attention inside each segment, `query [1, H, T, d]`, `key, value [1, Hkv, T, d]` -> `[1, H, T, d]`.

    Under autocast, products run in its type, as torch's own kernel would run them.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _BlockAttention.apply(query, key, value, tuple(lengths), causal, scaling)  # type: ignore[no-any-return]


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], causal: bool, scaling: float
    ) -> Tensor:
        blocks, parts = blocks_of(lengths), []
        for block in blocks.blocks:
            q, k, v = (_taken(x, block) for x in (query, key, value))
            mask = None if causal or block.real is None else block.real[:, None, None]
            parts.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
        out = _put_back(parts, blocks.order)
        ctx.save_for_backward(query, key, value, out)
        ctx.lengths, ctx.causal, ctx.scaling = lengths, causal, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out = ctx.saved_tensors
        grad, blocks, found = grads[0].to(query.dtype), blocks_of(ctx.lengths), []
        with torch.autocast(grad.device.type, enabled=False):
            for block in blocks.blocks:
                q, k, v, o, g = (_taken(x, block) for x in (query, key, value, out, grad))
                if block.real is not None:
                    g.mul_(block.real[:, None, :, None])
                delta = (g.to(_exact(g.dtype)) * o).sum(-1)
                found.append(_block_backward(q, k, v, g, delta, block, causal=ctx.causal, scaling=ctx.scaling))
        return (*(_put_back(parts, blocks.order) for parts in zip(*found, strict=True)), None, None, None)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _taken(x: Tensor, block: Block) -> Tensor:
    """`[1, h, T, d]` -> `[G, h, L, d]`, a copy: whole heads of a token at a time, however `x` lies in memory."""
    _, heads, tokens, width = x.shape
    by_head = x[0].is_contiguous()
    rows = x[0] if by_head else x[0].transpose(0, 1)
    of_head, of_token = (tokens, 1) if by_head else (1, heads)
    index = block.places[:, None] * of_token + torch.arange(heads)[:, None] * of_head
    taken = rows.reshape(-1, width).index_select(0, index.flatten())
    return taken.view(*index.shape, width)


def _put_back(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Blocks `[G, h, L, d]` -> `[1, h, T, d]`, token by token in memory as the output projection reads it."""
    heads, width = parts[0].shape[1], parts[0].shape[-1]
    rows = [part.transpose(1, 2).reshape(-1, heads * width) for part in parts]
    flat = (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, order)
    return flat.view(1, -1, heads, width).transpose(1, 2)


def _block_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, block: Block, *, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block: `q, g [G, H, L, d]`, `k, v [G, Hkv, L, d]`, `delta [G, H, L]`."""
    groups, heads, longest, _ = q.shape
    shared = heads // k.shape[1]
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    size = min(longest, TILE_QUERIES)
    together = max(1, TILE_SCORES // (heads * size * longest))
    for first in range(0, groups, together):
        rows = slice(first, min(first + together, groups))
        for start in range(0, longest, size):
            queries = slice(start, min(start + size, longest))
            keys = slice(0, queries.stop if causal else longest)
            hidden = _hidden(block, rows, queries, keys, causal=causal, dtype=delta.dtype)
            dq, dk, dv = _tile(
                q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], g[rows, :, queries],
                delta[rows, :, queries], hidden, shared, scaling,
            )  # fmt: skip
            to_q[rows, :, queries] = dq
            to_k[rows, :, keys] += dk
            to_v[rows, :, keys] += dv
    return to_q, to_k, to_v


def _hidden(
    block: Block, rows: slice, queries: slice, keys: slice, *, causal: bool, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores of a tile: -inf where a key lies ahead, or past the end of its segment."""
    if causal:
        ahead = torch.full((queries.stop - queries.start, keys.stop), float("-inf"), dtype=dtype)
        return ahead.triu_(1 + queries.start)[None, None]
    if block.real is None:
        return None
    none = torch.zeros(block.real[rows, keys].shape, dtype=dtype)
    return none.masked_fill_(~block.real[rows, keys], float("-inf"))[:, None, None]


def _tile(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, hidden: Tensor | None, shared: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile; the heads that share a key are one matrix."""
    groups, heads, queries, width = q.shape
    key_heads, keys, low = heads // shared, k.shape[2], q.dtype
    shape = (groups, heads, queries, keys)

    def flat(x: Tensor) -> Tensor:
        return x.reshape(groups * key_heads, -1, x.shape[-1])

    q, k, v, g = flat(q), flat(k), flat(v), flat(g)
    exact = delta.dtype
    scores = torch.bmm(q.to(exact), k.to(exact).transpose(1, 2)).mul_(scaling).view(shape)
    weights = (scores if hidden is None else scores.add_(hidden)).softmax(-1)
    slopes = torch.bmm(g, v.transpose(1, 2)).view(shape).to(exact).sub_(delta[..., None]).mul_(weights).mul_(scaling)
    weights, slopes = (
        flat(weights.view(groups, key_heads, -1, keys).to(low)),
        flat(slopes.view(groups, key_heads, -1, keys).to(low)),
    )
    to_v = torch.bmm(weights.transpose(1, 2), g)
    to_q, to_k = torch.bmm(slopes, k), torch.bmm(slopes.transpose(1, 2), q)
    back = (groups, key_heads, keys, width)
    return to_q.view(groups, heads, queries, width), to_k.view(back), to_v.view(back)
