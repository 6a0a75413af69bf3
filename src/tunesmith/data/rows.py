"""Rows before they are typed, the bad ones among them, and how both are shown to the user."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.errors import DataError

SHOWN_CHARS = 80
MAX_LISTED = 20


class RowError(Exception):
    """A row that cannot be used: what was found, and what to do. Never leaves the data package."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Row:
    """A mapping as it stands in the file, with its origin; `raw` is the text it was read from."""

    values: Mapping[str, object]
    origin: str
    raw: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A refused row: `origin` (`file:line`), the problem, what to do, and at most 80 escaped characters of it."""

    origin: str
    problem: str
    advice: str
    shown: str = ""

    def __str__(self) -> str:
        where = f"{self.origin}: {self.problem}"
        if not self.shown:
            return f"{where}; {self.advice}"
        return f"{where}\n      row: {self.shown}\n      fix: {self.advice}"

    def as_dict(self) -> dict[str, str]:
        """For a file of refused rows."""
        return {"origin": self.origin, "problem": self.problem, "advice": self.advice, "row": self.shown}


def shown(text: str, limit: int = SHOWN_CHARS) -> str:
    """At most `limit` characters, everything that does not print (control, bidi, surrogates) escaped."""
    pieces = [
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode("ascii")
        for char in text[: limit + 1]
    ]
    whole = "".join(pieces)
    if len(whole) <= limit:
        return whole
    while len(whole) > limit - 3:
        whole = whole[: len(whole) - len(pieces.pop())]
    return whole + "..."


def bad_row(origin: str, error: RowError, raw: str | Mapping[str, object]) -> BadRow:
    """The refusal of one row."""
    text = raw if isinstance(raw, str) else json.dumps(dict(raw), ensure_ascii=False, default=str)
    return BadRow(origin, error.problem, error.advice, shown(text))


def refuse(bad: Sequence[BadRow], *, more: bool = False) -> DataError:
    """One error that lists the first bad rows of a set."""
    count = f"at least {len(bad)}" if more else str(len(bad))
    plural = "s" if len(bad) != 1 or more else ""
    lines = [f"{count} bad row{plural} found:", *(f"  - {row}" for row in bad[:MAX_LISTED])]
    lines.append("  Mend the rows, or leave them out (and have them counted) with data.on_bad_row: skip")
    return DataError("\n".join(lines))
