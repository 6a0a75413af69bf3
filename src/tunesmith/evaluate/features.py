"""What a frozen model knows of a text, as one vector: its mean over the tokens, or what its head is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.evaluate.likelihood import Collate, Samples, token_batches
from tunesmith.model.packing import evaluating, segment_hidden
from tunesmith.model.score import ScoreModel


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
                hidden = segment_hidden(model.backbone, batch, model.layout, causal=model.causal, offset=model.offset)
            means = [part.float().mean(0).cpu().numpy() for part in hidden.split(list(batch.lengths))]
            for i, row in zip(indices, means, strict=True):
                rows[i] = row
    return np.stack(rows)


def head_inputs(
    model: ScoreModel,
    store: Samples,
    rows: Sequence[int],
    *,
    collate: Collate,
    max_tokens: int = 8192,
    device: Any = "cpu",
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """(places in `rows`, vectors `[len(places), D]` fp32) of what enters the head for the samples `rows` of `store`.

    Batches depend on the lengths alone, so that the same rows give the same bits whenever they are asked for.
    """
    lengths = np.asarray(store.lengths)[np.asarray(rows, np.int64)]
    for places in token_batches(lengths, max_tokens):
        batch = collate([store[rows[place]] for place in places]).to(device)
        yield places, model.pooled(batch).cpu().numpy()
