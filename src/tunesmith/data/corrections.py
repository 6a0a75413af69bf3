"""Files that `tunesmith predict --to` wrote: told by a mark in every row, never by what columns are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.data.rows import Row

PREDICTION, CORRECTION = "prediction", "correction"
MARK = {"tunesmith": "predicted"}
"""The column, and its value, that such a row has and keeps in a spreadsheet too."""
COLUMNS = (PREDICTION, CORRECTION, *MARK)


def is_marked(values: Mapping[str, object]) -> bool:
    """Whether `predict --to` wrote the row."""
    return all(values.get(name) == value for name, value in MARK.items())


def corrected(row: Row, answer: str | None) -> Row:
    """The row; where it is marked, a correction that was filled in takes the place of the column `answer`."""
    right = row.values.get(CORRECTION) if is_marked(row.values) else None
    if answer is None or right is None or (isinstance(right, str) and not right.strip()):
        return row
    return Row({**row.values, answer: right}, row.origin, row.raw)


def own_columns(values: Mapping[str, Any], named: Iterable[str] = ()) -> dict[str, Any]:
    """The row as it was before `predict --to` added to it; the columns `named` stay."""
    added = set(COLUMNS) - set(named) if is_marked(values) else set[str]()
    return {name: value for name, value in values.items() if name not in added}


def remarks(samples: Sequence[tuple[str, Sequence[Mapping[str, object]]]], answer: str | None) -> tuple[str, ...]:
    """What the user should know of each file (name, first rows) that holds corrections, or columns called so."""
    found = []
    for name, rows in samples:
        if any(is_marked(row) for row in rows) and answer is None:
            found.append(f"{name}: corrections that are filled in are not used: these rows have no one column that "
                         "holds the answer")  # fmt: skip
        elif any(is_marked(row) for row in rows):
            found.append(f"{name}: corrections that are filled in take the place of {answer!r}")
        elif any(PREDICTION in row and CORRECTION in row for row in rows):
            mark = ", ".join(f"{column!r} that says {value!r}" for column, value in MARK.items())
            found.append(f"{name}: the columns {PREDICTION!r} and {CORRECTION!r} are its own, as those of any other "
                         f"name; rows of `tunesmith predict --to` have a column {mark}, and only there do corrections "
                         "take the answer's place")  # fmt: skip
    return tuple(found)
