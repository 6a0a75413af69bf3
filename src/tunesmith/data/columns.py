"""Samples with a number for every token beside them, computed once: the log-probs of a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.data.store import SampleStore


class WithColumns:
    """A store whose samples carry `columns`: name -> one float32 per token of the store, in the store's order."""

    def __init__(self, store: SampleStore, columns: Mapping[str, NDArray[np.float32]]) -> None:
        assert all(len(column) == store.num_tokens for column in columns.values()), "one number per token"
        self.store, self.columns = store, columns
        self.lengths, self.groups = store.lengths, store.groups
        self._starts = np.concatenate([[0], np.cumsum(store.lengths)])

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        part = slice(int(self._starts[index]), int(self._starts[index + 1]))
        return replace(self.store[index], columns={name: np.array(c[part]) for name, c in self.columns.items()})

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class Chosen:
    """The best answers of a store of pairs and rankings: demonstrations of what is wanted."""

    def __init__(self, store: SampleStore) -> None:
        self._store = store
        self.indices = [i for i in range(len(store)) if _rank(store[i]) == 1]
        self.lengths = np.asarray(store.lengths)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self._store[self.indices[index]]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def _rank(sample: Sample) -> float | None:
    return sample.label[0] if isinstance(sample.label, tuple) else sample.label
