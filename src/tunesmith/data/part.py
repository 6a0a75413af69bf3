"""A part of a data set: so many rows, drawn by a seed, perhaps equally many of each value of a column."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.data.convert import answer_column, label_of
from tunesmith.data.corrections import corrected
from tunesmith.data.kinds import Record, full_text
from tunesmith.data.records import RecordSet
from tunesmith.data.rows import Row, RowError, shown
from tunesmith.data.split import Subset, draw
from tunesmith.errors import DataError

_SHOWN = 8
"""Values of which a message tells the counts."""


def drawn_part(records: RecordSet | Subset, rows: int, *, seed: int = 0, balance: str | None = None) -> Subset:
    """`rows` of the records, in their order; with `balance`, a column or a role, equally many of each of its values.

    Where `rows` cannot be shared out evenly, the first values in their order have one more. A filled-in correction
    counts as the answer, as in training. A row's draw depends on the seed and its text alone, so the same rows are
    taken from a file in another order or another format (of rows with the same text, the first). Reads the data once
    and holds about 100 bytes for each row asked for. `DataError` when there are fewer rows than asked for, or a row has
    no single value to balance by.
    """
    if rows < 1:
        raise DataError(f"{', '.join(records.files)}: {rows} rows are asked for; take at least 1")
    lots, answer = _Lots(rows), answer_column(records.columns, records.template)
    for number, (row, record) in enumerate(records.rows()):
        lots.add(
            number,
            "" if balance is None else _value(corrected(row, answer), record, balance, records.columns),
            record,
            seed,
        )
        if len(lots.kept) > rows:
            raise DataError(f"{record.origin}: {balance!r} has more values than the {rows:,} rows asked for; balance "
                            "by another column, or ask for more rows")  # fmt: skip
    quota = _quota(lots.counts, rows)
    _enough(records, lots.counts, quota, rows, balance)
    kept = frozenset(number for value, count in quota.items() for number in lots.first(value, count))
    total = sum(lots.counts.values())
    how = f"{rows:,} of {total:,} rows, drawn by seed {seed}"
    if balance is not None:
        how += f", balanced by {balance} ({_told(quota)})"
    return Subset(records, kept.__contains__, how, count=rows, note=f"{', '.join(records.files)}: {how}")


@dataclass(slots=True)
class _Lots:
    """Of each value the rows with the smallest draws, never more of them than the part could still need."""

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Heaps of (-draw, -number): the largest draw, and of equals the latest row, is the first to go."""

    def add(self, number: int, value: str, record: Record, seed: int) -> None:
        self.counts[value] += 1
        heap = self.kept.setdefault(value, [])
        heapq.heappush(heap, (-draw(full_text(record), seed, "part"), -number))
        most = -(-self.rows // len(self.kept))
        while len(heap) > most:
            heapq.heappop(heap)

    def first(self, value: str, count: int) -> list[int]:
        """Numbers of the rows of `value` with the smallest draws."""
        return [-number for _, number in heapq.nlargest(count, self.kept[value])]


def _value(row: Row, record: Record, balance: str, columns: Mapping[str, str]) -> str:
    column = balance if balance in row.values else columns.get(balance, balance)
    if column not in row.values:
        names = ", ".join(map(str, row.values))
        raise DataError(f"{record.origin}: there is no column {balance!r} to balance by; the row has {names}")
    try:
        found = label_of(row, column)
    except RowError as error:
        raise DataError(f"{record.origin}: rows cannot be balanced by {column!r}: {error}") from None
    if not isinstance(found, str):
        raise DataError(f"{record.origin}: rows cannot be balanced by {column!r}, which holds lists")
    return found


def _quota(counts: Mapping[str, int], rows: int) -> dict[str, int]:
    """How many rows of each value."""
    each, more = divmod(rows, len(counts))
    return {value: each + (place < more) for place, value in enumerate(sorted(counts))}


def _enough(
    records: RecordSet | Subset, counts: Mapping[str, int], quota: Mapping[str, int], rows: int, balance: str | None
) -> None:
    """`DataError` where some value has fewer rows than its share."""
    where, total = ", ".join(records.files), sum(counts.values())
    short = [value for value, count in quota.items() if counts[value] < count]
    if short and balance is None:
        raise DataError(f"{where}: {rows:,} rows are asked for, and there are {total:,}; ask for {total:,} at most")
    if short:
        raise DataError(
            f"{where}: {rows:,} rows balanced by {balance!r} are {rows // len(counts):,} of each of its {len(counts)} "
            f"values, and there are {_told({value: counts[value] for value in short})}; ask for "
            f"{min(counts.values()) * len(counts):,} rows at most, or leave out `balance`"
        )


def _told(counts: Mapping[str, int]) -> str:
    """`0: 500, 1: 500`."""
    told = ", ".join(f"{shown(value, 40)}: {count:,}" for value, count in list(counts.items())[:_SHOWN])
    return told + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")
