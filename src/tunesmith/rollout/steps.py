"""How rows grow by a token: through the family's own forward, where `model.decoding` does not read its layers."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.model import soft_prompt
from tunesmith.model.soft_prompt import CACHE_NAMES

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layers whose cache can be padded on the left and thinned by rows; recurrent ones cannot."""


class Steps(Protocol):
    """Rows that grow together. `spare` is the share of finished rows that may stay before the others go on alone."""

    spare: float

    def begin(self, ids: Tensor, real: Tensor, num: int, room: int) -> Tensor:
        """Left-padded prompts `ids, real [N, T]` -> fp32 logits `[N * num, V]`; `room` more tokens will come."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """One token more for each row, `[N]` -> fp32 logits `[N, V]`."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        ...


def cache_name(backbone: Any) -> str | None:
    """The argument that takes a KV cache whose rows can be padded and thinned, or None."""
    accepted = inspect.signature(backbone.forward).parameters
    kinds = set(getattr(backbone.config.get_text_config(), "layer_types", None) or ())
    name = next((n for n in CACHE_NAMES if n in accepted), None)
    return name if "position_ids" in accepted and kinds <= ATTENTION_KINDS else None


class FamilySteps:
    """The family's own forward of a causal `LanguageModel`; without a cache a step computes the whole text again."""

    spare = 0.0

    def __init__(self, model: Any, *, cached: bool) -> None:
        self._model = model
        self._name = cache_name(model.backbone) if cached else None
        accepted = inspect.signature(model.backbone.forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache: Any = None

    def begin(self, ids: Tensor, real: Tensor, num: int, room: int) -> Tensor:
        """See `Steps`."""
        self._ids, self._real, self._cache = ids, real, None
        logits = self._forward()
        self._ids, self._real, logits = (t.repeat_interleave(num, 0) for t in (ids, self._real, logits))
        if self._cache is not None and num > 1:
            self._cache.batch_repeat_interleave(num)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Steps`."""
        self._real = torch.cat([self._real, self._real.new_ones(len(tokens), 1)], 1)
        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        return self._forward()

    def keep(self, rows: Tensor) -> None:
        """See `Steps`."""
        self._ids, self._real = self._ids[rows], self._real[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def _forward(self) -> Tensor:
        model, ids = self._model, self._ids
        with torch.autocast(ids.device.type, model.compute, enabled=model.compute != torch.float32):
            if self._name is None:
                inputs, _ = soft_prompt.row_inputs(model.backbone, ids)
                return model.backbone(**inputs, use_cache=False, **self._keep).logits[:, -1].float()
            if self._cache is None:
                inputs, self._real = soft_prompt.padded_inputs(model.backbone, ids, self._real)
            else:
                inputs = {"input_ids": ids[:, -1:], self._name: self._cache}
            width = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
            places = (self._real.cumsum(1) - 1).clamp_min(0)[:, -width:]
            out = model.backbone(
                **inputs, **self._keep, attention_mask=self._real, position_ids=places, use_cache=True
            )  # fmt: skip
        self._cache = out[self._name]
        return out.logits[:, -1].float()
