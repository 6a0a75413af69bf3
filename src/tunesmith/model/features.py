"""What a frozen body says of texts, kept: one vector a text, found again by the text's token ids."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.batch import Batch


def text_key(ids: NDArray[np.int32]) -> bytes:
    """A text's token ids `[L]` as 16 bytes: the same wherever the text stands, 2^-64 the chance of a mistake among
    billions of texts."""
    return blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=16).digest()


class FeatureTable:
    """Vectors `[n, D]` fp32 of texts, in one or several parts, perhaps mapped from disk.

    Without dropout a frozen body answers a text the same every time, so a vector depends on its token ids alone.
    """

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float32]] = []
        self._places: dict[bytes, tuple[int, int]] = {}

    def add(self, keys: Iterable[bytes], vectors: NDArray[np.float32]) -> None:
        """Take in `vectors [n, D]`, one for each of `keys`; a text that is known already keeps the vector it has."""
        part, before = len(self._parts), len(self._places)
        for row, key in enumerate(keys):
            self._places.setdefault(key, (part, row))
        assert len(self._places) - before <= len(vectors), "a vector for each key"
        self._parts.append(vectors)

    def __len__(self) -> int:
        return len(self._places)

    def of(self, batch: Batch) -> Tensor | None:
        """The vectors of a flat batch's segments `[S, D]`, on its device; None when one of them is not here."""
        ids = batch.input_ids[batch.segments >= 0].cpu().numpy().astype(np.int32)
        places = [self._places.get(text_key(text)) for text in np.split(ids, np.cumsum(batch.lengths)[:-1])]
        rows = [self._parts[place[0]][place[1]] for place in places if place is not None]
        if len(rows) < len(places):
            return None
        return torch.from_numpy(np.stack(rows)).to(batch.input_ids.device)
