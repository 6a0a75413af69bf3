"""Where a family keeps its output head, found by structure; `packing.verify` proves the reading right at load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """hidden [N, D] -> transform -> decoder -> scale -> soft cap = logits [N, V]."""

    transform: Callable[[Tensor], Tensor]
    decoder: nn.Module
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """The tokens of a segment -> one vector (`first`, `last` or `mean`) -> scores [S, C]."""

    pool: str
    apply: Callable[[Tensor], Tensor]


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def language_head(backbone: Any, *, causal: bool) -> LanguageHead | None:
    """The head of a causal or masked language model, or None for a structure not known here."""
    if causal:
        decoder = backbone.get_output_embeddings()
        if decoder is None:
            return None
        config = backbone.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return LanguageHead(_unchanged, decoder, float(scale), getattr(config, "final_logit_softcapping", None))
    if hasattr(backbone, "cls") and hasattr(backbone.cls, "predictions"):
        return LanguageHead(backbone.cls.predictions.transform, backbone.cls.predictions.decoder)
    if hasattr(backbone, "vocab_transform"):
        return LanguageHead(
            lambda h: backbone.vocab_layer_norm(backbone.activation(backbone.vocab_transform(h))),
            backbone.vocab_projector,
        )
    if hasattr(backbone, "lm_head") and hasattr(backbone.lm_head, "layer_norm"):
        head = backbone.lm_head
        return LanguageHead(lambda h: head.layer_norm(nn.functional.gelu(head.dense(h))), head.decoder)
    if hasattr(backbone, "head") and hasattr(backbone, "decoder"):
        return LanguageHead(backbone.head, backbone.decoder)
    return None


def score_head(backbone: Any) -> ScoreHead | None:
    """The head of a sequence classifier, or None for a structure not known here."""
    if hasattr(backbone, "score"):
        return ScoreHead("last", backbone.score)
    if hasattr(backbone, "pre_classifier"):
        return ScoreHead(
            "first", lambda x: backbone.classifier(backbone.dropout(torch.relu(backbone.pre_classifier(x))))
        )
    classifier = getattr(backbone, "classifier", None)
    if classifier is None:
        return None
    if hasattr(backbone, "head") and hasattr(backbone, "drop"):
        pool = "mean" if getattr(backbone.config, "classifier_pooling", "cls") == "mean" else "first"
        return ScoreHead(pool, lambda x: classifier(backbone.drop(backbone.head(x))))
    pooler = getattr(backbone.base_model, "pooler", None)
    if pooler is not None and hasattr(backbone, "dropout"):
        return ScoreHead("first", lambda x: classifier(backbone.dropout(pooler(x[:, None]))))
    return ScoreHead("first", lambda x: classifier(x[:, None]))


def pool(hidden: Tensor, lengths: Sequence[int], how: str) -> Tensor:
    """One vector per segment from `hidden [T, D]` of a flat row -> `[S, D]`."""
    sizes = torch.tensor(lengths, device=hidden.device)
    ends = sizes.cumsum(0)
    if how == "last":
        return hidden[ends - 1]
    if how == "first":
        return hidden[ends - sizes]
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=hidden.device), sizes)
    sums = torch.zeros(len(sizes), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return sums.index_add(0, owner, hidden) / sizes[:, None]
