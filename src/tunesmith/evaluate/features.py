"""What a frozen model knows of a text: the mean of its last hidden states, as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.evaluate.likelihood import Collate, evaluating, token_batches
from tunesmith.model.packing import Layout, flat_hidden, layout_for


def mean_hidden(
    model: Any, samples: Sequence[Sample], *, collate: Collate, max_tokens: int = 8192, device: Any = "cpu"
) -> NDArray[np.float32]:
    """Mean-pooled last hidden states `[n, D]`, fp32, in packed batches of at most `max_tokens`; no gradients.

    `model` is a `ScoreModel` or a `LanguageModel`; special tokens count (Sentence-BERT, 1908.10084, 3).
    """
    rows: list[Any] = [None] * len(samples)
    with evaluating(model):
        for indices in token_batches([len(sample) for sample in samples], max_tokens):
            batch = collate([samples[i] for i in indices]).to(device)
            with torch.autocast(batch.input_ids.device.type, model.compute, enabled=model.compute != torch.float32):
                hidden = _hidden(model, batch)
            means = [part.float().mean(0).cpu().numpy() for part in hidden.split(list(batch.lengths))]
            for i, row in zip(indices, means, strict=True):
                rows[i] = row
    return np.stack(rows)


def _hidden(model: Any, batch: Any) -> Any:
    """`[tokens, D]`, each segment blind to the others."""
    if layout_for(model.backbone, model.layout, batch) is Layout.PACKED:
        return flat_hidden(model.backbone, batch, causal=model.causal, offset=model.offset)
    inner = model.backbone.base_model
    parts = batch.input_ids[batch.segments >= 0].split(list(batch.lengths))
    return torch.cat([inner(input_ids=part[None])[0][0] for part in parts])
