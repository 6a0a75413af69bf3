"""Samples -> batches, by pure functions: order, packing, and the only place where targets are shifted."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.batch import Batch, Sample

Ints = NDArray[np.int64]


def order_at(num_rows: int, seed: int, epoch: int) -> Ints:
    """The order of all rows in `epoch` (from 0): a permutation that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def pack(lengths: Sequence[int], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split `indices` into parts of at most `max_tokens` (first fit, longest first); a longer sample goes alone.

    `lengths[i]` belongs to `indices[i]`. Lengths 6, 5, 4, 3 and 9 tokens give [[first, fourth], [second, third]].
    """
    order = sorted(range(len(indices)), key=lambda i: (-lengths[i], i))
    parts: list[list[int]] = []
    room: list[int] = []
    for i in order:
        place = next((k for k, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            parts.append([indices[i]])
            room.append(max_tokens - lengths[i])
        else:
            parts[place].append(indices[i])
            room[place] -= lengths[i]
    return parts


def collate(samples: Sequence[Sample]) -> Batch:
    """One flat row: targets are the next token inside each segment, and a segment's last position has weight 0.

    Segments [5 6 7] (weights 0 1 1) and [8 9] (weights 0 1) give input_ids 5 6 7 8 9, targets 6 7 7 9 9 and
    weights 1 1 0 1 0. Columns are shifted like the weights, so that entry t is about `targets[t]`.
    """
    lengths = tuple(len(sample) for sample in samples)
    ids = np.concatenate([sample.ids for sample in samples]).astype(np.int64)
    weights = np.concatenate([_shifted(sample.weights) for sample in samples])
    targets = np.append(ids[1:], ids[-1])
    ends = np.cumsum(lengths) - 1
    targets[ends] = ids[ends]
    columns = {name: np.concatenate([_shifted(s.columns[name]) for s in samples]) for name in samples[0].columns}
    return _flat(samples, lengths, ids, targets, weights, columns=columns)


def _shifted(column: NDArray[Any]) -> NDArray[Any]:
    """`[L]` or `[L, K]` one place to the left, the last place 0: from the token itself to what predicts it."""
    return np.concatenate([column[1:], np.zeros_like(column[:1])])


def collate_mlm(
    samples: Sequence[Sample],
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    rate: float = 0.15,
    seed: int = 0,
    step: int = 0,
) -> Batch:
    """One flat row with holes; targets stand in place and weigh 1 where a token was chosen.

    Of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay (BERT, 1810.04805, 3.1). The choice
    depends on (seed, step, the sample), not on its neighbours or its folder; at least one token of it is chosen.
    """
    lengths = tuple(len(sample) for sample in samples)
    seen, weights = [], []
    for sample in samples:
        draw = np.random.default_rng([seed, step, zlib.crc32(sample.ids.tobytes()), _place(sample.origin)])
        holes = _holes(sample, special_ids, rate, draw)
        kind = draw.random(len(sample))
        ids = sample.ids.astype(np.int64)
        ids = np.where(holes & (kind < 0.8), mask_id, ids)
        random = draw.integers(0, vocab_size, len(sample))
        seen.append(np.where(holes & (kind >= 0.9), random, ids))
        weights.append(holes.astype(np.float32))
    targets = np.concatenate([sample.ids for sample in samples]).astype(np.int64)
    columns = {name: np.concatenate([s.columns[name] for s in samples]) for name in samples[0].columns}
    return _flat(samples, lengths, np.concatenate(seen), targets, np.concatenate(weights), columns=columns)


def _place(origin: str) -> int:
    """A number for `file:line`, the same wherever the file's folder stands."""
    return zlib.crc32(origin.replace("\\", "/").rpartition("/")[2].encode())


def _holes(sample: Sample, special_ids: Sequence[int], rate: float, draw: np.random.Generator) -> NDArray[np.bool_]:
    allowed = ~np.isin(sample.ids, np.asarray(special_ids))
    holes = allowed & (draw.random(len(sample)) < rate)
    if not holes.any() and allowed.any():
        holes[draw.choice(np.flatnonzero(allowed))] = True
    return holes


def _flat(
    samples: Sequence[Sample],
    lengths: tuple[int, ...],
    ids: Ints,
    targets: Ints,
    weights: NDArray[np.float32],
    *,
    columns: Mapping[str, NDArray[Any]],
) -> Batch:
    sizes = np.asarray(lengths)
    starts = np.cumsum(sizes) - sizes
    segments = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.arange(len(ids)) - np.repeat(starts, sizes)
    row = [torch.from_numpy(np.ascontiguousarray(part))[None] for part in (ids, targets, weights, positions, segments)]
    return Batch(
        *row, columns={name: torch.from_numpy(column)[None] for name, column in columns.items()},
        labels=_labels(samples), groups=_groups(samples), origins=tuple(s.origin for s in samples), lengths=lengths,
    )  # fmt: skip


def _labels(samples: Sequence[Sample]) -> Tensor | None:
    found = [sample.label for sample in samples if sample.label is not None]
    if not found:
        return None
    assert len(found) == len(samples), "either all samples of a batch have a label or none"
    return torch.tensor(found)


def _groups(samples: Sequence[Sample]) -> Tensor | None:
    found = [sample.group for sample in samples if sample.group is not None]
    if not found:
        return None
    assert len(found) == len(samples), "either all samples of a batch have a group or none"
    return torch.tensor(found)
