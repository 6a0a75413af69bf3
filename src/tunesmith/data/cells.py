"""Cells of a row -> text and numbers, or a `RowError` that says what stands there instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from tunesmith.data.rows import Row, RowError, shown


def text_at(row: Row, column: str, *, what: str = "") -> str:
    """The text in a column; RowError if it is missing, no text, empty, or holds what no text may hold."""
    value = value_at(row, column)
    what = what or column
    if value is None:
        raise RowError(f"{what!r} is null", "write the text or leave the row out")
    if not isinstance(value, str):
        kind = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
        raise RowError(f"{what!r} is {kind} ({shown(str(value), 30)}), not text", "write it in double quotes")
    check_text(value, what)
    if not value.strip():
        raise RowError(f"{what!r} is empty", "write the text or leave the row out")
    return value


def value_at(row: Row, column: str) -> object:
    if column in row.values:
        return row.values[column]
    names = [str(name) for name in row.values]
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"; did you mean {shown(near[0], 40)!r}?" if near else ""
    found = shown(", ".join(names), 60) or "nothing"
    raise RowError(f"there is no {column!r}{hint}", f"add it (the row has: {found})")


def check_text(value: str, what: str) -> None:
    """RowError for a NUL or half a surrogate pair: no tokenizer takes them."""
    if "\x00" in value:
        raise RowError(f"{what!r} holds a NUL character at {value.index(chr(0))}", "remove \\u0000 from it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        char = f"\\u{ord(value[error.start]):04x}"
        problem = f"{what!r} holds {char}, half a surrogate pair"
        raise RowError(problem, "write the whole character or remove it") from None


def optional_text(row: Row, columns: Mapping[str, str], role: str) -> str | None:
    column = columns.get(role)
    value = row.values.get(column) if column else None
    if column is None or value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_at(row, column)


def number_at(value: object, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{what!r} is {shown(str(value), 30)!r}, not a number", "write a finite number")
    return number
