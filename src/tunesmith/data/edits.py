"""Short rows that differ from an earlier one in a single place: a token or a few put in, taken out or replaced.

For every place of a row the rest of it is hashed; two rows are one edit apart exactly when they share such a hash (the
deletion neighbourhood of Mor and Fraenkel, "A hash code method for detecting and correcting spelling errors", 1982, for
a stretch of tokens instead of a letter). The work grows with the tokens, not with pairs of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.hashing import MIX, mixed

LONGEST = 128
"""Tokens of the longest row compared; in a longer one an edit leaves enough runs in common for `similar`."""
MAX_TOKENS = 2_000_000
"""Tokens of short rows looked at, from the first on."""
SLOT_ROWS = 4
"""A place at which more rows than this differ, and nowhere else, is a slot of a form."""
_OWN_ROWS, _OWN_PART = 10, 200
"""Two neighbouring tokens that stand in more than 10 rows, and in more than one of 200, belong to a form."""
_FEWEST_OWN = 3
_BUCKETS = 20
_PART, _SLICE_BITS = 4096, 2
"""Rows hashed at a time; bits of a hash by which the hashes held at a time are chosen."""
_INVERSE = np.uint64(pow(int(MIX), -1, 1 << 64))
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Edit:
    """How small an edit is: at most `place` tokens, and one of 6 of the row; rows below `fewest` are not compared."""

    place: int = 6
    fewest: int = 10


TOKENS, WORDS = Edit(), Edit(place=1, fewest=8)
"""For rows of a tokenizer's tokens, of which a word is several, and for rows of words."""


def edited_rows(ids: NDArray[np.integer], bounds: Ints, candidates: NDArray[np.bool_], edit: Edit) -> Ints:
    """Pairs (row, an earlier one) `[n, 2]` that differ in one place, each row once, among the `candidates`.

    No pair: rows of which more than `SLOT_ROWS` differ at one place and nowhere else, and rows that share less than
    three pairs of neighbouring tokens of their own, or, behind a form's beginning, mostly those of a form.
    """
    lengths = np.diff(bounds)
    chosen = np.flatnonzero(candidates & (lengths >= edit.fewest) & (lengths <= LONGEST))
    chosen = chosen[: int(np.searchsorted(np.cumsum(lengths[chosen]), MAX_TOKENS, side="right"))]
    if len(chosen) < 2:
        return np.zeros((0, 2), np.int64)
    short = _Short.of(ids, bounds, chosen)
    kept: dict[int, int] = {}
    for row, first, at, size in _groups(short, edit):
        if row not in kept and short.alike(row, first, at, size):
            kept[row] = first
    pairs = [(int(chosen[row]), int(chosen[first])) for row, first in sorted(kept.items())]
    return np.array(pairs, np.int64).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class _Short:
    """The rows compared, one behind the other: `sums` of their tokens' hashes by place, `own` neighbours before each
    token."""

    ids: NDArray[np.integer]
    starts: Ints
    lengths: Ints
    sums: Keys
    own: Ints

    @classmethod
    def of(cls, ids: NDArray[np.integer], bounds: Ints, chosen: Ints) -> _Short:
        lengths = np.diff(bounds)[chosen]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        mine = np.asarray(ids)[np.repeat(bounds[:-1][chosen], lengths) + place]
        powers = np.multiply.accumulate(np.full(LONGEST, MIX, np.uint64))
        terms = mixed(mine.astype(np.uint64) + np.uint64(1)) * powers[place]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
        own = np.concatenate([[0], np.cumsum(_own(mine, place, len(chosen)))])
        return cls(mine, starts, lengths, sums, own)

    def without(self, edit: Edit) -> Iterator[tuple[Keys, Ints, Ints, int]]:
        """(hash, row, place, size) of every row without `size` tokens from every place, some thousand rows at a time;
        the place is part of the hash."""
        for size in range(edit.place + 1):
            rows = np.flatnonzero((self.lengths >= 6 * size) | (size <= 1))
            for start in range(0, len(rows), _PART):
                yield *self._hashed(rows[start : start + _PART], size), size

    def _hashed(self, rows: Ints, size: int) -> tuple[Keys, Ints, Ints]:
        counts = self.lengths[rows] - size + 1
        owner = np.repeat(rows, counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        start, end = self.starts[owner], self.starts[owner + 1]
        before = self.sums[start + place] - self.sums[start]
        after = (self.sums[end] - self.sums[start + place + size]) * np.uint64(pow(int(_INVERSE), size, 1 << 64))
        return mixed(mixed(before + after) + place.astype(np.uint64)), owner, place

    def alike(self, row: int, other: int, at: int, size: int) -> bool:
        """Whether two rows are equal but for the place, and share enough that is not a form's."""
        a, b = (self.ids[self.starts[r] : self.starts[r + 1]] for r in (row, other))
        rest = len(a) - at - size
        if not (np.array_equal(a[:at], b[:at]) and np.array_equal(a[len(a) - rest :], b[len(b) - rest :])):
            return False
        start, end = int(self.starts[row]), int(self.starts[row + 1])
        flags = np.diff(self.own[start : end + 1]).astype(bool)
        shared = np.concatenate([flags[1:at], flags[at + size + 1 :]])
        where = np.flatnonzero(shared)
        return len(where) >= _FEWEST_OWN and 2 * len(where) >= len(shared) - where[0]


def _own(ids: NDArray[np.integer], place: Ints, rows: int) -> NDArray[np.bool_]:
    """For each token whether it and the one before it stand together in few rows; False for a row's first."""
    before = np.concatenate([ids[:1], ids[:-1]]).astype(np.uint64)
    buckets = (mixed(before * MIX + ids.astype(np.uint64)) >> np.uint64(64 - _BUCKETS)).astype(np.int64)
    often = max(_OWN_ROWS, rows // _OWN_PART) + 4 * (len(ids) >> _BUCKETS)
    return (np.bincount(buckets, minlength=1 << _BUCKETS)[buckets] <= often) & (place > 0)


def _groups(short: _Short, edit: Edit) -> Iterator[tuple[int, int, int, int]]:
    """(row, first row of its group, place, tokens left out of the row) of every hash that some rows share."""
    repeated = _repeated(short, edit)
    parts = []
    for keys, owner, place, size in short.without(edit):
        at = np.minimum(np.searchsorted(repeated, keys), max(0, len(repeated) - 1))
        found = np.flatnonzero(repeated[at] == keys) if len(repeated) else np.zeros(0, np.int64)
        parts.append(np.stack([at[found], owner[found], place[found], np.full(len(found), size)], 1))
    members = np.concatenate(parts)
    members = members[np.lexsort((members[:, 3], members[:, 1], members[:, 0]))]
    heads = np.flatnonzero(np.diff(members[:, 0], prepend=-1))
    counts = np.diff(np.append(heads, len(members)))
    slots = np.zeros(len(short.lengths), bool)
    slots[members[np.repeat(counts > SLOT_ROWS, counts), 1]] = True
    first = np.repeat(members[heads, 1], counts)
    good = (members[:, 1] != first) & ~slots[members[:, 1]] & ~slots[first]
    for (_, row, at, size), earlier in zip(members[good].tolist(), first[good].tolist(), strict=True):
        yield row, earlier, at, size


def _repeated(short: _Short, edit: Edit) -> Keys:
    """The hashes that stand more than once, in order; they are made again for each slice, so as to hold one alone."""
    found, shift = [], np.uint64(64 - _SLICE_BITS)
    for number in range(1 << _SLICE_BITS):
        keys = np.concatenate([made[made >> shift == number] for made, *_ in short.without(edit)])
        keys.sort()
        found.append(np.unique(keys[1:][keys[1:] == keys[:-1]]))
    return np.concatenate(found)
