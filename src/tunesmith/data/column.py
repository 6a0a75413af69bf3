"""One column of a file, as plain texts: what `predict` answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.files import DataFile
from tunesmith.data.readers import kind_of, read_rows
from tunesmith.data.rows import MAX_LISTED, BadRow, refuse
from tunesmith.errors import DataError

NAMES = ("text", "prompt", "question", "instruction", "input", "sentence", "review", "document")


def read_column(path: str | Path, column: str | None = None) -> list[str]:
    """The texts of a file: every line of a .txt, else `column` of every row, or the one whose name is plain.

    Raises `DataError` for a file that cannot be read, a row without that column, and when no column is plain.
    """
    return [text for text, _, _ in read_texts_of_rows(path, column)]


def read_texts_of_rows(path: str | Path, column: str | None = None) -> list[tuple[str, str, dict[str, Any]]]:
    """`read_column` with the name of the column and all values of the row: `(text, name, values)` of every row."""
    file = DataFile.at(Path(path).expanduser())
    kind = kind_of(file)
    texts: list[tuple[str, str, dict[str, Any]]] = []
    bad = []
    for row in read_rows(file, "lines" if kind == "text" else kind):
        if isinstance(row, BadRow):
            bad.append(row)
            if len(bad) == MAX_LISTED:
                break
            continue
        column = column or _plain_column([str(name) for name, value in row.values.items() if isinstance(value, str)])
        if column is None or not isinstance(row.values.get(column), str):
            have = ", ".join(map(str, row.values)) or "none"
            wanted = f"no text in the column {column!r}" if column else "no column that is plainly the text"
            raise DataError(f"{row.origin}: {wanted}; the columns are {have}. Name one with --column")
        texts.append((str(row.values[column]), column, {str(name): value for name, value in row.values.items()}))
    if bad:
        raise refuse(bad)
    if not texts:
        raise DataError(f"{file.name}: there is no text in it")
    return texts


def _plain_column(columns: list[str]) -> str | None:
    known: Iterator[str] = (name for wanted in NAMES for name in columns if name.lower() == wanted)
    return next(known, columns[0] if len(columns) == 1 else None)
