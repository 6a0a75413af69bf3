"""Attention of many packed segments at once: blocks of like length, and a backward made of few large products.

torch's own CPU kernel is fast forwards and slow backwards (docs/log.md), so the forward is its, and the backward here
is Dao et al. 2022 (arXiv:2205.14135, B.4) over whole tiles: P again from Q and K, D = rowsum(dO · O), then
dV = Pᵀ dO, dS = P · (dO Vᵀ - D), dQ = s dS K, dK = s dSᵀ Q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops_norm import precise

LIKE = 0.7
"""A block holds segments of at least this share of its longest one: what is padded costs less than more calls."""
TILE_SCORES = 1 << 22
"""Scores of one tile of the backward: 4 million, 16 MB in fp32."""
TILE_QUERIES = 512
"""Queries of one tile: of a longer causal segment, keys past the tile's end are never touched."""


@dataclass(frozen=True, slots=True)
class Block:
    """Segments of like length. `real [G, L]` is False past the end of a shorter one, and None when all places are
    real."""

    longest: int
    real: Tensor | None


@lru_cache(maxsize=64)
def _arranged(lengths: tuple[int, ...]) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """((places, real) `[G, L]` of each block, longest first), the place past the end of a shorter segment being 0, and
    where each token lies in the blocks, one after the other."""
    starts = [0, *accumulate(lengths)]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= LIKE * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    blocks, order, before = [], np.empty(starts[-1], np.int64), 0
    for group in groups:
        steps = np.arange(lengths[group[0]])
        real = steps < np.array([[lengths[i]] for i in group])
        places = np.array([[starts[i]] for i in group]) + steps
        order[places[real]] = before + np.flatnonzero(real)
        before += real.size
        blocks.append((np.where(real, places, 0), real))
    return blocks, order


@lru_cache(maxsize=8)
def _rows(lengths: tuple[int, ...], heads: int, by_head: bool) -> list[np.ndarray]:
    """For each block, where its vectors `[G, h, L]` lie among those of a flat row, head by head or token by token.

    Kept for the layers of a batch: the next one has other lengths.
    """
    of_head, of_token = (sum(lengths), 1) if by_head else (1, heads)
    numbers = np.arange(heads)[:, None] * of_head
    return [places[:, None] * of_token + numbers for places, _ in _arranged(lengths)[0]]


def blocks_of(lengths: tuple[int, ...]) -> tuple[tuple[Block, ...], Tensor]:
    """The segments in blocks, and `order [T]`, where each token lies in them, one block after the other."""
    arranged, order = _arranged(lengths)
    blocks = [Block(places.shape[1], None if real.all() else torch.from_numpy(real)) for places, real in arranged]
    return tuple(blocks), torch.from_numpy(order)


@dataclass(frozen=True, slots=True)
class How:
    """What a call computes: scores times `scaling`, weights dropped with `dropout` by masks made from `seed`."""

    causal: bool
    scaling: float
    dropout: float = 0.0
    seed: int = 0

    def of_block(self, number: int) -> How:
        """The same with masks of the block's own."""
        return replace(self, seed=self.seed + (number << 32)) if self.dropout else self


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of some segments of a block, the keys they may see, and what is added to hide the others."""

    rows: slice
    queries: slice
    keys: slice
    hidden: Tensor | None
    number: int


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside each segment, `query [1, H, T, d]`, `key, value [1, Hkv, T, d]` -> `[1, H, T, d]`.

    Under autocast, products run in its type, as torch's own kernel would run them. A mask of `dropout` is drawn from
    torch's own stream and made again in the backward instead of kept.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    how = How(causal, scaling, dropout, drawn_seed() if dropout else 0)
    return _BlockAttention.apply(query, key, value, tuple(lengths), how)  # type: ignore[no-any-return]


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], how: How) -> Tensor:
        blocks, order = blocks_of(lengths)
        with torch.autocast(query.device.type, enabled=False):
            taken = zip(*(_taken(x, lengths) for x in (query, key, value)), strict=True)
            parts = [
                (_dropped_forward if how.dropout else _forward)(q, k, v, block, how.of_block(number))
                for number, (block, (q, k, v)) in enumerate(zip(blocks, taken, strict=True))
            ]
        out = _put_back(parts, order)
        ctx.save_for_backward(query, key, value, out)
        ctx.lengths, ctx.how = lengths, how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out = ctx.saved_tensors
        grad, found = grads[0].to(query.dtype), []
        blocks, order = blocks_of(ctx.lengths)
        with torch.autocast(grad.device.type, enabled=False):
            taken = zip(*(_taken(x, ctx.lengths) for x in (query, key, value, out, grad)), strict=True)
            for number, (block, (q, k, v, o, g)) in enumerate(zip(blocks, taken, strict=True)):
                if block.real is not None:
                    g.mul_(block.real[:, None, :, None])
                delta = (g.to(precise(g.dtype)) * o).sum(-1)
                found.append(_block_backward(q, k, v, g, delta, block, ctx.how.of_block(number)))
        return (*(_put_back(parts, order) for parts in zip(*found, strict=True)), None, None)


def drawn_seed() -> int:
    """A seed from torch's own stream; 0 where tensors are shapes alone, as they are in a plan."""
    drawn = torch.randint(0, 2**62, ())
    return int(drawn) if type(drawn) is Tensor else 0


def keep_mask(shape: Sequence[int], dropout: float, generator: torch.Generator | None = None) -> Tensor:
    """True where something is kept, with probability 1 - dropout to within 2^-17: 16 random bits an element."""
    count, device = math.prod(shape), None if generator is None else generator.device
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )
    return (numbers.view(torch.int16)[:count] >= round(dropout * 65536) - 32768).view(tuple(shape))


def _taken(x: Tensor, lengths: tuple[int, ...]) -> Iterator[Tensor]:
    """`[1, h, T, d]` -> `[G, h, L, d]` of one block after the other, copies: whole heads of a token at a time, however
    `x` lies in memory."""
    _, heads, _, width = x.shape
    by_head = x[0].is_contiguous()
    vectors = (x[0] if by_head else x[0].transpose(0, 1)).reshape(-1, width)
    return (
        vectors.index_select(0, torch.from_numpy(rows).flatten()).view(*rows.shape, width)
        for rows in _rows(lengths, heads, by_head)
    )


def _put_back(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Blocks `[G, h, L, d]` -> `[1, h, T, d]`, token by token in memory as the output projection reads it."""
    heads, width = parts[0].shape[1], parts[0].shape[-1]
    rows = [part.transpose(1, 2).reshape(-1, heads * width) for part in parts]
    flat = (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, order)
    return flat.view(1, -1, heads, width).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, block: Block, how: How) -> Tensor:
    mask = None if how.causal or block.real is None else block.real[:, None, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=how.causal, scale=how.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _tiles(block: Block, groups: int, heads: int, how: How, dtype: torch.dtype) -> Iterator[Tile]:
    longest, number = block.longest, 0
    size = min(longest, TILE_QUERIES)
    together = max(1, TILE_SCORES // (heads * size * longest))
    for first in range(0, groups, together):
        rows = slice(first, min(first + together, groups))
        for start in range(0, longest, size):
            queries = slice(start, min(start + size, longest))
            keys = slice(0, queries.stop if how.causal else longest)
            number += 1
            yield Tile(rows, queries, keys, _hidden(block, rows, queries, keys, causal=how.causal, dtype=dtype), number)


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


def _weights(q: Tensor, k: Tensor, tile: Tile, how: How) -> Tensor:
    """Softmax of a tile's scores, `q [G, H, Tq, d]`, `k [G, Hkv, Tk, d]` -> `[G, H, Tq, Tk]` in fp32 or float64.

    The heads that share a key are one matrix.
    """
    exact = precise(q.dtype)
    scores = torch.bmm(_joined(q, k).to(exact), k.flatten(0, 1).to(exact).transpose(1, 2)).mul_(how.scaling)
    scores = scores.view(*q.shape[:3], k.shape[2])
    return (scores if tile.hidden is None else scores.add_(tile.hidden)).softmax(-1)


def _joined(x: Tensor, k: Tensor) -> Tensor:
    """`[G, H, ...]` as `[G · Hkv, rows, ...]`, the heads of one key below each other."""
    return x.reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def _kept(shape: Sequence[int], tile: Tile, how: How) -> Tensor:
    return keep_mask(shape, how.dropout, torch.Generator().manual_seed((how.seed + tile.number) % (1 << 63)))


def _dropped_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, how: How) -> Tensor:
    """torch's kernels take no dropout on a CPU, so the weights are made, and dropped, tile by tile."""
    out = torch.empty_like(q)
    for tile in _tiles(block, q.shape[0], q.shape[1], how, precise(q.dtype)):
        part = q[tile.rows, :, tile.queries]
        keys, values = k[tile.rows, :, tile.keys], v[tile.rows, :, tile.keys]
        weights = _weights(part, keys, tile, how)
        weights.mul_(_kept(weights.shape, tile, how)).div_(1 - how.dropout)
        found = torch.bmm(_joined(weights.to(q.dtype), keys), values.flatten(0, 1))
        out[tile.rows, :, tile.queries] = found.view(part.shape)
    return out


def _block_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, block: Block, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block: `q, g [G, H, L, d]`, `k, v [G, Hkv, L, d]`, `delta [G, H, L]`."""
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in _tiles(block, q.shape[0], q.shape[1], how, delta.dtype):
        rows, queries, keys = tile.rows, tile.queries, tile.keys
        dq, dk, dv = _tile_backward(
            q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], g[rows, :, queries], delta[rows, :, queries],
            tile, how,
        )  # fmt: skip
        to_q[rows, :, queries] = dq
        to_k[rows, :, keys] += dk
        to_v[rows, :, keys] += dv
    return to_q, to_k, to_v


def _tile_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, tile: Tile, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(q, k, tile, how)
    grads, low = _joined(g, k), q.dtype
    slopes = torch.bmm(grads, v.flatten(0, 1).transpose(1, 2)).view(weights.shape).to(weights.dtype)
    dropped = weights
    if how.dropout:
        kept = _kept(weights.shape, tile, how).to(weights.dtype).div_(1 - how.dropout)
        slopes, dropped = slopes.mul_(kept), weights * kept
    slopes = _joined(slopes.sub_(delta[..., None]).mul_(weights).mul_(how.scaling).to(low), k)
    to_v = torch.bmm(_joined(dropped.to(low), k).transpose(1, 2), grads)
    to_q, to_k = torch.bmm(slopes, k.flatten(0, 1)), torch.bmm(slopes.transpose(1, 2), _joined(q, k))
    return to_q.view(q.shape), to_k.view(k.shape), to_v.view(v.shape)
