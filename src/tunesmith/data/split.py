"""Parts of a record set: disjoint splits, caps per key, personal data left out. Streamed, seeded, counted."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from tunesmith.data.kinds import Record, full_text, input_text, normalised
from tunesmith.data.records import RecordSet
from tunesmith.data.rows import BadRow, Row
from tunesmith.data.templates import Template
from tunesmith.errors import DataError

Key = str | Callable[[Record], str]
PERSONAL = {
    "e-mail address": re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}\b"),
    "phone number": re.compile(r"(?<![\w.])\+?\d{1,3}[ .-]?(?:\(\d{2,4}\)|\d{2,4})[ .-]\d{3,4}[ .-]?\d{2,4}(?![\w.])"),
    "credit card number": re.compile(r"\b\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}\b"),
    "IBAN": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"),
}


class Records(Protocol):
    """What `RecordSet`, `Subset` and `Mixed` have in common."""

    @property
    def format(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def template(self) -> Template | None: ...
    def __iter__(self) -> Iterator[Record]: ...
    def __len__(self) -> int: ...
    @property
    def narrowed(self) -> tuple[str, ...]: ...
    def describe(self) -> str: ...


class Subset:
    """The rows of a record set that `keep` chooses by their number (from 0). Reads like a `RecordSet`.

    `narrowed` tells what was left out of the data for good, which a share of a split is not.
    """

    def __init__(
        self, records: RecordSet | Subset, keep: Callable[[int], bool], name: str, *, count: int, note: str = ""
    ) -> None:
        self._records = records
        self._keep = keep
        self._count = count
        self.name = name
        self.narrowed: tuple[str, ...] = (*records.narrowed, *([note] if note else []))
        self.notes: tuple[str, ...] = records.notes
        self.stage: str = records.stage
        self.format: str = records.format
        self.columns: Mapping[str, str] = records.columns
        self.template: Template | None = records.template
        self.files: tuple[str, ...] = records.files

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.rows())

    def rows(self) -> Iterator[tuple[Row, Record]]:
        """Every record with its row."""
        return (pair for number, pair in enumerate(self._records.rows()) if self._keep(number))

    def __len__(self) -> int:
        return self._count

    @property
    def num_bad(self) -> int:
        """Rows left out of the whole set."""
        return self._records.num_bad

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """The first of them, with their places."""
        return self._records.bad_rows

    @property
    def fingerprint(self) -> str:
        """sha256 of the whole set's fingerprint and of the choice."""
        return hashlib.sha256(json.dumps([self._records.fingerprint, self.name]).encode()).hexdigest()

    def describe(self) -> str:
        """The whole set's description, and which part this is."""
        return f"{self._records.describe()}\npart: {self.name}, {self._count:,} rows"


def _keys(records: RecordSet | Subset, key: Key | None) -> Iterator[str]:
    """The normalised key of each row: its input text, a function of the record, or a column of the row."""
    for row, record in records.rows():
        if callable(key):
            yield normalised(key(record))
        elif key is None:
            yield normalised(input_text(record)) or normalised(full_text(record))
        elif key not in row.values:
            names = ", ".join(row.values)
            raise DataError(f"{row.origin}: there is no column {key!r} to group by; the row has {names}")
        else:
            yield normalised(str(row.values[key]))


def draw(key: str, seed: int, purpose: str) -> int:
    """A number below 2^64 that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode()).digest()[:8], "big")


def split_records(
    records: RecordSet | Subset,
    fractions: Sequence[float] | Mapping[str, float],
    seed: int,
    group_key: Key | None = None,
) -> tuple[Subset, ...]:
    """Disjoint parts: rows with the same input (case, width, white space aside) or the same `group_key` stay together.

    `fractions` are shares that sum to 1 (or names -> shares); `group_key` is a column or a function of the record.
    Parts are within one group of their share. The order of rows is kept. Holds 16 bytes a row. DataError if a part
    would be empty.
    """
    named = fractions
    if not isinstance(named, Mapping):
        named = {f"{i}/{len(named)}": share for i, share in enumerate(named, start=1)}
    names, shares = list(named), list(named.values())
    if not shares or any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise DataError(f"split: the shares {shares} must be above 0 and sum to 1")
    draws = [draw(key, seed, "split") for key in _keys(records, group_key)]
    part_of = _cut(Counter(draws), shares, len(draws))
    chosen = [part_of[draw] for draw in draws]
    counts = Counter(chosen)
    empty = [name for i, name in enumerate(names) if not counts[i]]
    if empty:
        raise DataError(
            f"split: no rows are left for {', '.join(map(str, empty))} ({len(draws)} rows, {len(part_of)} different "
            f"inputs); take larger shares or more data"
        )
    grouped = "" if group_key is None else f", grouped by {group_key if isinstance(group_key, str) else 'a function'}"
    return tuple(
        Subset(
            records, lambda number, part=i: chosen[number] == part,
            f"{name} of {shares}, seed {seed}{grouped}", count=counts[i],
        )
        for i, name in enumerate(names)
    )  # fmt: skip


def _cut(sizes: Counter[int], shares: Sequence[float], total: int) -> dict[int, int]:
    """Groups in drawn order are dealt to the part that is furthest below its share, the smallest parts first."""
    filled = [0] * len(shares)
    part_of: dict[int, int] = {}
    for draw in sorted(sizes):
        part = max(range(len(shares)), key=lambda i: (shares[i] * total - filled[i]) / shares[i])
        part_of[draw] = part
        filled[part] += sizes[draw]
    return part_of


def cap_per_key(records: RecordSet | Subset, key: Key, limit: int, *, seed: int = 0) -> Subset:
    """At most `limit` rows for each value of `key` (InstructGPT, arXiv:2203.02155, keeps 200 prompts a user)."""
    if limit < 1:
        raise DataError(f"cap: {limit} rows a key leaves nothing; take at least 1")
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(_keys(records, key)):
        rows.setdefault(value, []).append(number)
    kept: set[int] = set()
    for numbers in rows.values():
        kept.update(sorted(numbers, key=lambda number: draw(str(number), seed, "cap"))[:limit])
    total = sum(map(len, rows.values()))
    name = f"at most {limit} rows for each {key if isinstance(key, str) else 'key'}, seed {seed}"
    told = f"{name} ({total - len(kept)} of {total} left out)"
    return Subset(records, kept.__contains__, told, count=len(kept), note=told)


def without_personal(records: RecordSet | Subset) -> tuple[Subset, dict[str, int]]:
    """Rows without e-mail addresses, phone, card and account numbers; how many rows held each. A filter, no proof."""
    counts: Counter[str] = Counter()
    kept: set[int] = set()
    total = 0
    for number, record in enumerate(records):
        total += 1
        found = [kind for kind, pattern in PERSONAL.items() if pattern.search(full_text(record))]
        counts.update(found)
        if not found:
            kept.add(number)
    if not kept:
        raise DataError("personal data: every row holds some; nothing would be left")
    found = ", ".join(f"{kind} in {count}" for kind, count in sorted(counts.items()))
    told = f"without personal data ({total - len(kept)} of {total} left out{': ' * bool(found)}{found})"
    return Subset(records, kept.__contains__, told, count=len(kept), note=told), dict(counts)


def narrowed(
    records: RecordSet | Subset, *, key: str | None, max_per_key: int | None, personal: bool, seed: int
) -> RecordSet | Subset:
    """What is left to train on: without rows that hold personal data unless `personal`, then at most `max_per_key` a
    value of the column `key`."""
    if not personal:
        records = without_personal(records)[0]
    return records if max_per_key is None or key is None else cap_per_key(records, key, max_per_key, seed=seed)
