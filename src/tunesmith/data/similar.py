"""Rows that are nearly the same: MinHash over runs of tokens, with the runs that many rows share left out; and short
rows that differ in one place (`edits`), of which an edit leaves too few runs in common.

Broder, "On the resemblance and containment of documents" (1997); bands as in Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", 3.4. Two rows are compared exactly before they are called similar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.edits import TOKENS, Edit, edited_rows
from tunesmith.data.hashing import MIX, mixed

RUN = 5
"""Tokens of a run (shingle)."""
ALIKE = 0.8
"""Share of all their runs that two rows must have in common (Jaccard)."""
MAX_TOKENS = 4_000_000
"""Tokens looked at, from the first row on."""
_BANDS, _PER_BAND = 8, 3
_SHARED_ROWS, _SHARED_PART = 20, 50
"""A run that more than 20 rows, and more than one in 50, have is a form's and no row's own: a template, a greeting."""
_FEWEST = 4
_MAX_COMPARED = 20_000
_BUCKETS = 20


@dataclass(frozen=True, slots=True)
class Similar:
    """`pairs [n, 2]`: a row and the earlier one it is like; `repeats`: rows equal to an earlier one, token by token.

    Both are of the first `rows` of `of` rows.
    """

    pairs: NDArray[np.int64]
    repeats: int
    rows: int
    of: int


def similar_rows(ids: NDArray[Any], bounds: NDArray[np.int64], of: int, edit: Edit = TOKENS) -> Similar:
    """Rows `ids[bounds[i]:bounds[i + 1]]` that are like an earlier one; rows below 8 tokens are not compared.

    Like are rows that have `ALIKE` of all their runs in common, and rows of at most `edits.LONGEST` tokens that differ
    in one place of `edit`'s size.
    """
    rows = len(bounds) - 1
    row_of = np.repeat(np.arange(rows), np.diff(bounds))
    whole = _whole(ids, bounds, row_of)
    first = _first(whole)
    hashes, owner = _runs(ids, row_of, rows)
    pairs = _candidates(hashes, owner, rows)
    pairs = pairs[whole[pairs[:, 0]] != whole[pairs[:, 1]]]
    kept = _compared(pairs, hashes, owner, rows)
    kept = kept[first[kept[:, 0]] == kept[:, 0]]
    edited = edited_rows(ids, bounds, first == np.arange(rows), edit)
    both = np.concatenate([kept, edited[~np.isin(edited[:, 0], kept[:, 0])]])
    return Similar(both[np.argsort(both[:, 0], kind="stable")], int((first != np.arange(rows)).sum()), rows, of)


def _whole(ids: NDArray[Any], bounds: NDArray[np.int64], row_of: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One hash for each row, of its tokens and their places."""
    place = (np.arange(len(ids)) - bounds[:-1][row_of]).astype(np.uint64)
    terms = mixed(ids.astype(np.uint64) * MIX + place)
    return np.add.reduceat(terms, bounds[:-1]) if len(ids) else np.zeros(0, np.uint64)


def _first(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the first row with the same key."""
    _, at, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return at[inverse]


def _runs(ids: NDArray[Any], row_of: NDArray[np.int64], rows: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash, row) of every run of tokens that few rows have, in order of rows; rows with few runs have none."""
    count = len(ids) - RUN + 1
    if count < 1:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    wide = ids.astype(np.uint64)
    total = np.zeros(count, np.uint64)
    for shift in range(RUN):
        total = total * MIX + wide[shift : shift + count]
    inside = row_of[:count] == row_of[RUN - 1 :]
    hashes, owner = mixed(total[inside]), row_of[:count][inside]
    buckets = (hashes >> np.uint64(64 - _BUCKETS)).astype(np.int64)
    often = max(_SHARED_ROWS, rows // _SHARED_PART) + 4 * (len(hashes) >> _BUCKETS)
    own = np.bincount(buckets, minlength=1 << _BUCKETS)[buckets] <= often
    enough = np.bincount(owner[own], minlength=rows)[owner] >= _FEWEST
    return hashes[own & enough], owner[own & enough]


def _candidates(hashes: NDArray[np.uint64], owner: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Pairs (row, earlier row) that share a band of their signatures `[n, 2]`, each once."""
    if not len(hashes):
        return np.zeros((0, 2), np.int64)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    members, short = owner[starts], (hashes >> np.uint64(32)).astype(np.uint32)
    factors = np.random.default_rng(0x6D696E).integers(1, 1 << 31, (_BANDS * _PER_BAND, 2), np.uint32) * 2 + 1
    found: list[NDArray[np.int64]] = []
    for band in range(_BANDS):
        key = np.zeros(len(members), np.uint64)
        for a, b in factors[band * _PER_BAND : (band + 1) * _PER_BAND]:
            key = mixed(key + np.minimum.reduceat(short * a + b, starts).astype(np.uint64))
        first = _first(key)
        later = first != np.arange(len(members))
        found.append(np.stack([members[later], members[first[later]]], 1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:_MAX_COMPARED]


def _compared(
    pairs: NDArray[np.int64], hashes: NDArray[np.uint64], owner: NDArray[np.int64], rows: int
) -> NDArray[np.int64]:
    """The pairs that really share so many runs, the first one of each row."""
    starts = np.searchsorted(owner, np.arange(rows + 1))
    kept: dict[int, int] = {}
    for row, earlier in pairs.tolist():
        if row in kept:
            continue
        a, b = (np.unique(hashes[starts[r] : starts[r + 1]]) for r in (row, earlier))
        shared = len(np.intersect1d(a, b, assume_unique=True))
        if shared >= ALIKE * (len(a) + len(b) - shared):
            kept[row] = earlier
    return np.array(list(kept.items()), np.int64).reshape(-1, 2)
