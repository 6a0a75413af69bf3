"""Several record sets as one, in the proportions asked for (multi-task training)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from math import ceil, isfinite

import numpy as np

from tunesmith.data.kinds import Record
from tunesmith.data.records import RecordSet
from tunesmith.data.rows import BadRow
from tunesmith.data.split import Subset
from tunesmith.data.templates import Template
from tunesmith.errors import DataError


class Mixed:
    """Records of several sets, interleaved so that after n rows each set has had its share of n within one row.

    A pass lasts until every set has been read whole; sets that are short for their weight start over, so their rows
    come more than once. `num_drawn` says how often. `seed` decides who begins.
    """

    def __init__(self, parts: Sequence[tuple[RecordSet | Subset, float]], seed: int = 0) -> None:
        if not parts:
            raise DataError("data.mix: nothing to mix; name at least one data set with its weight")
        bad = [f"{part.files[0]}: {weight}" for part, weight in parts if not (isfinite(weight) and weight > 0)]
        if bad:
            raise DataError(f"data.mix: weights must be above 0, found {', '.join(bad)}")
        templates = {json.dumps(part.template and part.template.as_dict()) for part, _ in parts}
        total = sum(weight for _, weight in parts)
        self.parts = tuple(part for part, _ in parts)
        self.weights = tuple(weight / total for _, weight in parts)
        self.seed = seed
        self.stage = self.parts[0].stage
        self.template: Template | None = self.parts[0].template if len(templates) == 1 else None
        if len({part.stage for part in self.parts}) > 1:
            raise DataError("data.mix: the sets were read for different stages")

    @property
    def format(self) -> str:
        """The common format, or the formats joined by +."""
        return "+".join(dict.fromkeys(part.format for part in self.parts))

    @property
    def files(self) -> tuple[str, ...]:
        """All files of all sets."""
        return tuple(name for part in self.parts for name in part.files)

    @property
    def num_bad(self) -> int:
        """Rows left out, over all sets."""
        return sum(part.num_bad for part in self.parts)

    @property
    def narrowed(self) -> tuple[str, ...]:
        """What was left out of each set for good."""
        return tuple(told for part in self.parts for told in part.narrowed)

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """The first of them in each set, with their places."""
        return tuple(row for part in self.parts for row in part.bad_rows)

    @property
    def fingerprint(self) -> str:
        """sha256 of the sets' fingerprints, the weights and the seed."""
        whole = [[part.fingerprint for part in self.parts], self.weights, self.seed]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def num_drawn(self) -> tuple[int, ...]:
        """Rows that each set gives in a pass."""
        drawn = np.bincount(list(self._order()), minlength=len(self.parts))
        return tuple(int(count) for count in drawn)

    def __len__(self) -> int:
        return max(ceil(len(part) / weight) for part, weight in zip(self.parts, self.weights, strict=True))

    def _order(self) -> Iterator[int]:
        """Which set each row comes from: always the one that lags most behind its share."""
        weights = np.array(self.weights)
        credit = np.random.default_rng([self.seed, 0x6D6978]).random(len(weights)) * weights
        for _ in range(len(self)):
            credit += weights
            part = int(credit.argmax())
            credit[part] -= 1.0
            yield part

    def __iter__(self) -> Iterator[Record]:
        iterators = [iter(part) for part in self.parts]
        for part in self._order():
            record = next(iterators[part], None)
            if record is None:
                iterators[part] = iter(self.parts[part])
                record = next(iterators[part])
            yield record

    def describe(self) -> str:
        """Every set with its share, its rows and how often they come in a pass."""
        lines = []
        for part, weight, drawn in zip(self.parts, self.weights, self.num_drawn, strict=True):
            lines.append(f"{weight:.1%} of the mix, {len(part):,} rows read {drawn / len(part):.2f} times in a pass:")
            lines += [f"  {line}" for line in part.describe().splitlines()]
        return "\n".join(lines)
