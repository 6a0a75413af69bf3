"""CSV of any delimiter -> rows, with the line on which each row begins.

RFC 4180 quoting, also after spaces; the delimiter is sniffed; cells may hold line ends and be as long as a row may be
(the standard library stops at 128 KiB a cell unless a process-wide limit is changed).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from tunesmith.data.files import MAX_ROW_BYTES, DataFile, Line, lines_of
from tunesmith.data.rows import BadRow, Row, RowError, bad_row, shown
from tunesmith.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
_SPACES = re.compile(" *")


class _Record:
    """Collects the cells of one record over as many lines as its quotes ask for."""

    def __init__(self, delimiter: str, line: int) -> None:
        self.delimiter = delimiter
        self.line = line
        self.cells: list[str] = []
        self.parts: list[str] = []
        self.size = 0
        self.quoted = False

    def feed(self, text: str) -> bool:
        """True when the record is complete."""
        if not self.quoted and '"' not in text:
            self.cells += text.split(self.delimiter)
            return True
        self.size += len(text)
        at: int | None = 0
        while at is not None:
            at = self._inside(text, at) if self.quoted else self._cell(text, at)
        if self.quoted:
            self.parts.append("\n")
        return not self.quoted

    def _cell(self, text: str, at: int) -> int | None:
        start = _SPACES.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith('"', start):
            self.quoted = True
            return start + 1
        end = text.find(self.delimiter, at)
        self.cells.append(text[at:] if end < 0 else text[at:end])
        return None if end < 0 else end + 1

    def _inside(self, text: str, at: int) -> int | None:
        end = text.find('"', at)
        if end < 0:
            self.parts.append(text[at:])
            return None
        self.parts.append(text[at:end])
        if text.startswith('"', end + 1):
            self.parts.append('"')
            return end + 2
        self.cells.append("".join(self.parts))
        self.parts = []
        self.quoted = False
        stop = text.find(self.delimiter, end + 1)
        rest = text[end + 1 :] if stop < 0 else text[end + 1 : stop]
        if rest.strip():
            raise RowError("text after a closing quote", 'write a quote inside quotes twice: ""')
        return None if stop < 0 else stop + 1


def _records(lines: Iterable[Line], delimiter: str, name: str) -> Iterator[tuple[int, list[str] | BadRow, str]]:
    """(line, cells or refusal, raw text) of every record; blank lines between records are passed over."""
    record: _Record | None = None
    raw = ""
    for line in lines:
        if record is None and not line.raw.strip():
            continue
        record = record or _Record(delimiter, line.number)
        try:
            text = line.text()
            raw = raw or text[:400]
            done = record.feed(text)
        except RowError as error:
            yield record.line, bad_row(f"{name}:{line.number}", error, raw or line.lenient()), ""
            record, raw = None, ""
            continue
        if done:
            yield record.line, record.cells, raw
            record, raw = None, ""
        elif record.size > MAX_ROW_BYTES:
            break
    if record is not None:
        near = shown(raw, 80)
        raise DataError(
            f"{name}:{record.line}: a quote is opened and never closed; what follows cannot be read.\n"
            f"      row: {near}\n"
            '      fix: close it before the next delimiter, or write a quote that is text as "" inside quotes'
        )


def sniff(lines: Iterable[Line], name: str) -> str:
    """The delimiter that cuts the first records most evenly into the most cells; a comma for a single column."""
    sample = list(islice(lines, 200))
    best, best_score = ",", (0.0, 0)
    for delimiter in DELIMITERS:
        widths = _widths(sample, delimiter, name)
        if not widths or widths[0] < 2:
            continue
        score = (sum(width == widths[0] for width in widths) / len(widths), widths[0])
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _widths(sample: Iterable[Line], delimiter: str, name: str) -> list[int]:
    """Cells of each sampled record; one that the sample cuts off inside quotes is left out."""
    widths: list[int] = []
    try:
        for _, cells, _ in _records(sample, delimiter, name):
            if isinstance(cells, list):
                widths.append(len(cells))
    except DataError:
        pass
    return widths


def csv_rows(file: DataFile) -> Iterator[Row | BadRow]:
    """Rows as text by the names in the first record; a row with other than that many cells is bad."""
    delimiter = sniff(lines_of(file), file.name)
    records = _records(lines_of(file), delimiter, file.name)
    first = next(records, None)
    if first is None:
        return
    header = _header(first[1], file.name)
    for line, cells, raw in records:
        if isinstance(cells, BadRow):
            yield cells
        elif len(cells) == len(header):
            yield Row(dict(zip(header, cells, strict=True)), f"{file.name}:{line}", raw)
        else:
            error = RowError(
                f"{len(cells)} cells where the header has {len(header)} (delimiter {delimiter!r})",
                f'put quotes round a cell that holds {delimiter!r} or a line end: "a{delimiter} b"',
            )
            yield bad_row(f"{file.name}:{line}", error, raw)


def _header(cells: list[str] | BadRow, name: str) -> list[str]:
    """The names of the columns. A first one without a name is the row number that pandas writes."""
    if isinstance(cells, BadRow):
        raise DataError(str(cells))
    header = [cell.strip() for cell in cells]
    if "\r" in "".join(header):
        raise DataError(
            f"{name}:1: the lines end with a carriage return alone; convert them: tr '\\r' '\\n' < FILE > NEW"
        )
    if len(header) > 1 and not header[0] and "index" not in header:
        header[0] = "index"
    named = ", ".join(shown(cell, 40) for cell in header)
    if any(not cell for cell in header):
        raise DataError(f"{name}:1: the header has a column without a name: {named}; name every column")
    twins = sorted({shown(cell, 40) for cell in header if header.count(cell) > 1})
    if twins:
        raise DataError(f"{name}:1: the header names {', '.join(twins)} twice; give each column a name of its own")
    return header
