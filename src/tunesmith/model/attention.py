"""The attention function that keeps packed segments apart, registered with transformers under its own name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tunesmith.ops import attend, packed_attention

NAME = "tunesmith"


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of n virtual positions in every layer, and where these stand in a flat row of S segments.

    `states [2 · layers, Hkv, n, d]`: layer l has its keys at 2l and its values at 2l + 1; `places [S n]`.
    """

    states: Tensor
    places: Tensor

    def placed(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`key, value [1, Hkv, T, d]` with the layer's own in the virtual positions."""
        return self._put(self.states[2 * layer], key), self._put(self.states[2 * layer + 1], value)

    def _put(self, own: Tensor, every: Tensor) -> Tensor:
        """`own [Hkv, n, d]` at the places before each segment of `every [1, Hkv, T, d]`."""
        segments = len(self.places) // own.shape[1]
        repeated = own[None, :, None].expand(1, -1, segments, -1, -1).flatten(2, 3)
        return every.index_copy(2, self.places, repeated.to(every.dtype))


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `query [B, H, T, d]` -> `([B, T, H, d], None)`.

    `segment_lengths` in `kwargs` says how one flat row divides, and `prefix` holds trained keys and values of virtual
    positions; both come from the model's own forward call.
    """
    prefix = kwargs.get("prefix")
    if prefix is not None:
        key, value = prefix.placed(module.layer_idx, key, value)
    lengths = kwargs.get("segment_lengths")
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options = {"dropout": dropout, "scaling": scaling, "softcap": kwargs.get("softcap")}
    if lengths is None and attention_mask is None and query.shape[2] == key.shape[2]:
        lengths = (query.shape[2],)
    if lengths is not None and attention_mask is None:
        out = packed_attention(
            query, key, value, lengths, causal=causal, window=_window(module, kwargs, causal), **options
        )
    else:
        causal = causal and query.shape[2] > 1 and attention_mask is None
        out = attend(query, key, value, mask=attention_mask, causal=causal, **options)
    return out.transpose(1, 2).contiguous(), None


def _window(module: nn.Module, kwargs: dict[str, Any], causal: bool) -> int | None:
    """The sliding window as `window_mask` counts it. Encoders hand over their half width plus one (ModernBERT)."""
    window = kwargs.get("sliding_window")
    if window is None:
        return None
    return int(window) if causal else int(window) - 1


def segment_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a row without padding and cache; the usual one otherwise."""
    batch_size = kwargs.get("batch_size", args[0] if args else None)
    if batch_size == 1 and kwargs.get("attention_mask") is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, segment_mask)
