"""Sample, Batch, Outputs, Loss: the types everything else speaks.

Shape letters: `B` rows, `T` tokens in a row, `S` segments in a batch, `C` classes, `L` length of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, for every token, how much predicting it counts. Unshifted, so it can be printed.

    `ids [L]` int32 · `weights [L]` float32, the first always 0 · `columns` name -> `[L]` or `[L, K]`, entry i about
    predicting token i, as in `weights` · `label` a class index, one 0/1 per class where there may be several, or an
    answer's (rank, margin), 1 being the best · `group` samples that must stay in one batch · `origin` where the record
    stands, as `file:line`.
    """

    ids: np.ndarray
    weights: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    label: int | tuple[float, ...] | None = None
    group: int | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        assert self.ids.ndim == 1 and self.ids.shape == self.weights.shape, (self.ids.shape, self.weights.shape)
        assert len(self.ids) > 0, "a sample has at least one token"
        assert float(self.weights[0]) == 0.0, "nothing predicts the first token"

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward sees. Normally one flat row without padding (`B = 1`).

    `input_ids targets weights positions segments` are `[B, T]`; `segments` counts 0..S-1 in reading order and is
    -1 on padding; `positions` restart at 0 in each segment. `targets[t]` is what position t predicts, and
    `weights[t]` how much that counts; `columns`, `[B, T]` or `[B, T, K]`, stand like the weights: entry t is about
    `targets[t]`, beside `Outputs.logprobs[t]`. `labels` is `[S]` (classes, ranks), `[S, C]` (multi-label) or
    `[S, 2]` (ranks and margins); `groups [S]` says which segments belong together (a pair, the answers to one prompt).
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    segments: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    groups: Tensor | None = None
    origins: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name in ("targets", "weights", "positions", "segments"):
            assert getattr(self, name).shape == shape, f"{name}: {getattr(self, name).shape} != {shape}"
        assert sum(self.lengths) == int((self.segments >= 0).sum()), "lengths do not add up to the tokens"
        if self.labels is not None:
            assert len(self.labels) == self.num_segments, "one label per segment"
        if self.groups is not None:
            assert len(self.groups) == self.num_segments, "one group per segment"

    @property
    def num_segments(self) -> int:
        """S: how many samples stand in this batch."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def is_flat(self) -> bool:
        """True when all segments lie in one row without padding."""
        return self.input_ids.shape[0] == 1 and self.num_tokens == self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            positions=self.positions.to(device),
            segments=self.segments.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
            labels=None if self.labels is None else self.labels.to(device),
            groups=None if self.groups is None else self.groups.to(device),
        )


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model says of a batch: per-token `logprobs [B, T]` (0 where the weight is 0) or `scores [S, C]`."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum, not a mean: the loop divides once, by the count of the whole step. `metrics`: name -> (sum, count).

    `rows [S]`: the mean loss of each segment, or of the group it belongs to, without gradient; None where a row has no
    loss of its own.
    """

    sum: Tensor
    metrics: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)
    rows: Tensor | None = None
