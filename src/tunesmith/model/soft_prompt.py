"""Prompt tuning and prefix tuning: trained virtual positions before every segment, known to the model layer alone.

Prompt tuning (Lester et al. 2021, 2104.08691) trains the embeddings of n virtual tokens. Prefix tuning (Li & Liang
2021, 2101.00190, without its reparametrisation) trains the keys and values of n virtual positions in every layer.
Virtual positions are 0 .. n-1 and a segment's own tokens go on from n; what the backbone says of virtual positions is
dropped, so that data, heads and objectives never see one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tunesmith.errors import ModelError
from tunesmith.model.attention import Prefix

KINDS = ("PREFIX_TUNING", "PROMPT_TUNING")
TENSOR = "prompt_embeddings"
"""PEFT's name of the one tensor: `[n, D]`, or `[n, 2 · layers · key heads · d]` of a prefix."""
PLACE = "soft_prompt"
"""The backbone's submodule that holds it."""
CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the KV cache, newest name first."""


class SoftPrompt(nn.Module):
    """The trained tensor; a prefix has `layers` of keys and values in `heads` each, embeddings have none.

    Not `enabled`, it is as if it were not there.
    """

    def __init__(self, values: Tensor, *, layers: int = 0, heads: int = 0) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(values)
        self.layers, self.heads = layers, heads
        self.enabled = True

    @property
    def num_virtual(self) -> int:
        """n."""
        return self.prompt_embeddings.shape[0]

    def states(self) -> Tensor:
        """A prefix's keys and values by layer, `[2 · layers, key heads, n, d]`: keys stand at 2l, values at 2l + 1."""
        return self.prompt_embeddings.view(self.num_virtual, 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """A flat row of T tokens in S segments with n virtual positions before each: T' = T + S n.

    `order [T']` takes the new row from S n virtual rows followed by the T real ones; `virtual [S n]` and `real [T]` are
    the places they then have; `positions [T']` count from 0 in each segment.
    """

    order: Tensor
    virtual: Tensor
    real: Tensor
    positions: Tensor
    lengths: tuple[int, ...]


def interleave(lengths: Sequence[int], num_virtual: int, device: Any) -> Interleaved:
    """Where virtual and real tokens stand; a function of the lengths alone."""
    order, virtual, real, positions = [], [], [], []
    held, seen, at = num_virtual * len(lengths), 0, 0
    for number, length in enumerate(lengths):
        order += [range(number * num_virtual, (number + 1) * num_virtual), range(held + seen, held + seen + length)]
        virtual.append(range(at, at + num_virtual))
        real.append(range(at + num_virtual, at + num_virtual + length))
        positions.append(range(num_virtual + length))
        seen, at = seen + length, at + num_virtual + length
    order, virtual, real, positions = (
        torch.cat([torch.arange(r.start, r.stop, device=device) for r in ranges])
        for ranges in (order, virtual, real, positions)
    )
    return Interleaved(order, virtual, real, positions, tuple(num_virtual + length for length in lengths))


def held_by(backbone: Any) -> SoftPrompt | None:
    """The soft prompt that `backbone` carries, switched on or off."""
    found = getattr(backbone, PLACE, None)
    return found if isinstance(found, SoftPrompt) else None


def active(backbone: Any) -> SoftPrompt | None:
    """The soft prompt that stands before every segment now."""
    found = held_by(backbone)
    return found if found is not None and found.enabled else None


def num_virtual(backbone: Any) -> int:
    """Positions that are taken from what the backbone holds; 0 without a soft prompt."""
    found = active(backbone)
    return 0 if found is None else found.num_virtual


def context_tokens(backbone: Any) -> int | None:
    """Tokens that a text may have: the base's positions less the virtual ones; None where the base names no limit."""
    config = backbone.config.get_text_config()
    named = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions"))
    found = next((value for value in named if isinstance(value, int) and value > 0), None)  # XLNet says -1: no end
    return None if found is None else found - num_virtual(backbone)


def packed_inputs(backbone: Any, ids: Tensor, lengths: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
    """What the backbone takes instead of the flat row `ids [1, T]`, and the places `[T]` of the real tokens in it."""
    soft = active(backbone)
    assert soft is not None
    row = interleave(lengths, soft.num_virtual, ids.device)
    inputs: dict[str, Any] = {"position_ids": row.positions[None], "segment_lengths": row.lengths}
    if soft.heads:
        every = torch.cat([ids.new_zeros(1, len(row.virtual)), ids], 1).index_select(1, row.order)
        return inputs | {"input_ids": every, "prefix": Prefix(soft.states(), row.virtual)}, row.real
    real = backbone.get_input_embeddings()(ids)
    virtual = _repeated(soft, len(lengths), real).flatten(0, 1)
    embeddings = torch.cat([virtual, real[0]]).index_select(0, row.order)
    return inputs | {"inputs_embeds": embeddings[None]}, row.real


def _repeated(soft: SoftPrompt, rows: int, like: Tensor) -> Tensor:
    """The virtual tokens' embeddings, `[rows, n, D]`."""
    return soft.prompt_embeddings.to(like.dtype)[None].expand(rows, -1, -1)


def row_inputs(backbone: Any, ids: Tensor) -> tuple[dict[str, Any], int]:
    """What the family's own forward takes for `ids [N, T]` without padding, and how many places come before them in
    what it gives."""
    soft = active(backbone)
    if soft is None:
        return {"input_ids": ids}, 0
    if soft.heads:
        return {"input_ids": ids, _cache_name(backbone): _cache(soft, len(ids))}, 0
    real = backbone.get_input_embeddings()(ids)
    return {"inputs_embeds": torch.cat([_repeated(soft, len(ids), real), real], 1)}, soft.num_virtual


def padded_inputs(backbone: Any, ids: Tensor, real: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The same for left-padded `ids, real [N, T]` with a cache to grow, and what is real, `[N, n + T]`.

    Embeddings stand behind a row's padding, so that no distance between two tokens changes; a prefix is the first
    part of the cache.
    """
    soft = active(backbone)
    if soft is None:
        return {"input_ids": ids}, real
    num = soft.num_virtual
    if soft.heads:
        before = real.new_ones(len(real), num)
        inputs = {"input_ids": ids, _cache_name(backbone): _cache(soft, len(ids))}
        return inputs, torch.cat([before, real], 1)
    padding = (real == 0).sum(1, keepdim=True)
    place = torch.arange(num + ids.shape[1], device=ids.device)[None]
    tokens = backbone.get_input_embeddings()(ids)
    every = torch.cat([_repeated(soft, len(ids), tokens), tokens], 1)
    source = torch.where(place < padding, num + place, torch.where(place < padding + num, place - padding, place))
    embeddings = every.gather(1, source[..., None].expand(-1, -1, every.shape[-1]))
    return {"inputs_embeds": embeddings}, (place >= padding).to(real.dtype)


def _cache_name(backbone: Any) -> str:
    accepted = inspect.signature(backbone.forward).parameters
    return next(name for name in CACHE_NAMES if name in accepted)


def _cache(soft: SoftPrompt, rows: int) -> DynamicCache:
    states = soft.states()
    device = states.device.type
    if torch.is_autocast_enabled(device):
        states = states.to(torch.get_autocast_dtype(device))
    pairs = states[:, None].expand(-1, rows, -1, -1, -1).unflatten(0, (-1, 2))
    return DynamicCache([(pair[0], pair[1]) for pair in pairs])


def load_values(backbone: Any, values: Mapping[str, Tensor]) -> None:
    """Fill the soft prompt from an adapter's tensors. Raises ModelError when they do not fit."""
    soft = held_by(backbone)
    assert soft is not None
    found = values.get(TENSOR)
    shape = tuple(soft.prompt_embeddings.shape)
    if found is None or tuple(found.shape) != shape or set(values) != {TENSOR}:
        delattr(backbone, PLACE)
        has = {name: tuple(tensor.shape) for name, tensor in values.items()}
        raise ModelError(f"this adapter's tensors do not fit this base: {TENSOR} must be {shape}, the file has {has}")
    with torch.no_grad():
        soft.prompt_embeddings.copy_(found)
