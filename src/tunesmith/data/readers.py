"""A data file -> its rows, one at a time: JSONL, JSON, CSV, Parquet and plain text, each possibly gzipped."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import PurePath

from tunesmith.data.csvfile import csv_rows
from tunesmith.data.files import MAX_ROW_BYTES, UTF8_BOM, DataFile, head_of, lines_of, not_utf8, opened
from tunesmith.data.rows import BadRow, Row, RowError, bad_row, shown
from tunesmith.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
MAX_DOCUMENT_CHARS = 2**20
DOCUMENT_END = "<|endoftext|>"
_CHUNK_CHARS = 2**18
_SPACE = re.compile(r"\s*")


def kind_of(file: DataFile) -> str:
    """jsonl, json, csv, parquet or text: by the name, and by the content where JSON and JSONL are mistaken."""
    name = PurePath(file.name)
    suffix = name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix
    kind = KINDS.get(suffix.lower())
    head = head_of(file)
    if head.startswith(b"PAR1") or kind == "parquet":
        return "parquet"
    start = head.lstrip()[:1]
    if kind in ("json", "jsonl") or (kind is None and start in (b"{", b"[")):
        return _json_kind(head, kind)
    if kind is None:
        raise DataError(
            f"{file.name}: what kind of file is this? Known are {', '.join(KINDS)}, each also with .gz; rename it"
        )
    return kind


def _json_kind(head: bytes, kind: str | None) -> str:
    lines = [line for line in head.decode("utf-8", "replace").split("\n") if line.strip()]
    if not lines:
        return kind or "jsonl"
    first = lines[0].strip()
    if first.startswith("["):
        spread = kind != "jsonl" or len(lines) == 1 or not _is_json(first)
        return "json" if spread else "jsonl"
    if kind == "json" and first.startswith("{"):
        lone = len(lines) == 1 or not _is_json(first)
        return "json" if lone else "jsonl"
    return kind or "jsonl"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_rows(file: DataFile, kind: str) -> Iterator[Row | BadRow]:
    """Every row in order, good or bad. DataError where the file cannot be read on."""
    if kind == "parquet":
        return _parquet_rows(file)
    if kind == "csv":
        return csv_rows(file)
    if kind == "text":
        return _documents(file)
    if kind == "lines":
        return _text_lines(file)
    return _jsonl_rows(file) if kind == "jsonl" else _json_rows(file)


def _no_constant(name: str) -> object:
    raise RowError(f"{name} is not a value JSON knows", "write null or leave the row out")


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {shown(twin, 40)!r} stands twice", "keep one of the two")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_no_twins, parse_constant=_no_constant)


def _parse(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _json_problem(error) from None
    except RecursionError:
        raise RowError("nested too deeply", "a row is an object of a few levels") from None
    except ValueError as error:
        raise RowError(f"a number Python does not read ({error})"[:120], "write it as text in double quotes") from None


def _json_problem(error: json.JSONDecodeError) -> RowError:
    near = shown(error.doc[max(0, error.pos - 10) : error.pos + 20], 40)
    advice = "write one JSON object a line, names and text in double quotes"
    if error.msg.startswith("Extra data"):
        advice = "put each object on a line of its own"
    elif error.msg.startswith(("Unterminated", "Expecting ',' delimiter")) or error.pos >= len(error.doc):
        advice = "the object is cut off or a comma or quote is missing; complete it"
    problem = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    return RowError(f"not JSON: {problem} at column {error.colno}, near {near}", advice)


def as_object(value: object) -> dict[str, object]:
    """The value if it is an object; RowError otherwise."""
    if isinstance(value, dict):
        return value
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    found = names.get(type(value), "a number")
    raise RowError(f"the row is {found}, not an object", 'write it as {"column": value, ...}')


def _jsonl_rows(file: DataFile) -> Iterator[Row | BadRow]:
    for line in lines_of(file):
        if not line.raw.strip():
            continue
        origin = f"{file.name}:{line.number}"
        try:
            text = line.text()
            yield Row(as_object(_parse(text)), origin, text)
        except RowError as error:
            yield bad_row(origin, error, line.lenient())


def _json_rows(file: DataFile) -> Iterator[Row | BadRow]:
    """An array of objects, or one object that holds the array; read in pieces, so that size does not matter."""
    with opened(file) as stream:
        reader = _Pieces(stream, file.name)
        reader.skip()
        if reader.peek() == "{":
            yield from _enclosed(reader, file.name)
            return
        reader.take("[")
        reader.skip()
        while reader.peek() not in ("]", ""):
            yield reader.element()
            reader.skip()
            if reader.peek() == ",":
                reader.take(",")
                reader.skip()
            elif reader.peek() not in ("]", ""):
                reader.take(",")
        if not reader.peek():
            where = f"{file.name}:{reader.line}"
            raise DataError(f"{where}: the array is never closed; the file is cut short, copy it again")
        reader.take("]")
        reader.skip()
        if reader.peek():
            raise DataError(f"{file.name}:{reader.line}: text after the end of the array; keep one array in a file")


def _enclosed(reader: _Pieces, name: str) -> Iterator[Row | BadRow]:
    whole = reader.element()
    if isinstance(whole, BadRow):
        yield whole
        return
    held = whole.values.items()
    lists = [key for key, value in held if isinstance(value, list) and value and isinstance(value[0], dict)]
    turns = {"messages", "conversations", "conversation", "tools"}
    if not lists or set(lists) & turns:
        yield whole
        return
    if len(lists) > 1:
        keys = ", ".join(lists)
        raise DataError(f"{name}: rows under which key? Several hold a list: {keys}; keep one list in the file")
    for number, value in enumerate(whole.values[lists[0]], start=1):  # type: ignore[arg-type]
        origin = f"{name}:{lists[0]}[{number}]"
        try:
            yield Row(as_object(value), origin)
        except RowError as error:
            yield bad_row(origin, error, str(value)[:200])


class _Pieces:
    """A JSON file decoded piece by piece, with the line where it stands."""

    def __init__(self, stream: io.BufferedIOBase | object, name: str) -> None:
        self._text = io.TextIOWrapper(_Checked(stream, name), encoding="utf-8", errors="strict", newline="")  # type: ignore[arg-type]
        self.name = name
        self.buffer = ""
        self.at = 0
        self.line = 1
        self.ended = False

    def _more(self, size: int = _CHUNK_CHARS) -> bool:
        try:
            piece = self._text.read(size)
        except UnicodeDecodeError as error:
            where = _bad_offset(self._text.buffer, error)  # type: ignore[arg-type]
            raise DataError(f"{self.name}:{self.line}: {where.problem}; {where.advice}") from None
        if "\x00" in piece:
            line = self.line + self.buffer.count("\n", self.at) + piece[: piece.index("\x00")].count("\n")
            raise DataError(f"{self.name}:{line}: a NUL byte; remove it: tr -d '\\000' < FILE > NEW")
        self.ended = not piece
        self.buffer = self.buffer[self.at :] + piece
        self.at = 0
        return bool(piece)

    def _drop(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        if self.at == len(self.buffer):
            self._more()
        return self.buffer[self.at : self.at + 1]

    def skip(self) -> None:
        while True:
            match = _SPACE.match(self.buffer, self.at)
            self._drop(match.end() if match else self.at)
            if self.at < len(self.buffer) or not self._more():
                return

    def take(self, char: str) -> None:
        if self.peek() != char:
            near = shown(self.buffer[self.at : self.at + 40], 40)
            where = f"{self.name}:{self.line}"
            raise DataError(f"{where}: expected {char} and found {near}; a JSON file is an array of objects")
        self._drop(self.at + 1)

    def element(self) -> Row | BadRow:
        """The next value. A fault inside it is a bad row if the value itself can be read, else a DataError."""
        origin = f"{self.name}:{self.line}"
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if self._incomplete(error) and self._more(max(len(self.buffer) - self.at, 4096)):
                    continue
                self._stop(error)
            except RowError as error:
                return self._refused(origin, error)
            except RecursionError:
                raise DataError(f"{origin}: nested too deeply; a row is an object of a few levels") from None
            except ValueError as error:
                raise DataError(f"{origin}: a number Python does not read ({error})"[:200]) from None
            else:
                if end == len(self.buffer) and not self.ended and self._more():
                    continue
                return self._made(origin, value, end)

    def _made(self, origin: str, value: object, end: int) -> Row | BadRow:
        raw = self.buffer[self.at : min(end, self.at + 400)]
        self._drop(end)
        try:
            return Row(as_object(value), origin, raw)
        except RowError as error:
            return bad_row(origin, error, raw)

    def _refused(self, origin: str, error: RowError) -> BadRow:
        """Read over a value that is well formed but not allowed (NaN, a key twice)."""
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self.buffer, self.at)
                break
            except json.JSONDecodeError as broken:
                if not (self._incomplete(broken) and self._more()):
                    self._stop(broken)
            except (RecursionError, ValueError):
                raise DataError(f"{origin}: {error.problem}, and what follows cannot be read") from None
        raw = self.buffer[self.at : min(end, self.at + 400)]
        self._drop(end)
        return bad_row(origin, error, raw)

    def _incomplete(self, error: json.JSONDecodeError) -> bool:
        if self.ended or len(self.buffer) - self.at >= MAX_ROW_BYTES:
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - 32

    def _stop(self, error: json.JSONDecodeError) -> None:
        problem = _json_problem(error)
        line = self.line + self.buffer.count("\n", self.at, error.pos)
        near = shown(self.buffer[self.at : self.at + 200].strip())
        raise DataError(
            f"{self.name}:{line}: {problem.problem}; what follows cannot be read.\n"
            f"      row: {near}\n      fix: {problem.advice}"
        ) from None


class _Checked(io.RawIOBase):
    """Counts the bytes read, so that a byte that is not UTF-8 can be named by its offset."""

    def __init__(self, stream: object, name: str) -> None:
        self.stream = stream
        self.count = 0
        self.first = True

    def readable(self) -> bool:
        return True

    def readinto(self, target: object) -> int:
        view = memoryview(target)  # type: ignore[arg-type]
        data: bytes = self.stream.read(len(view))  # type: ignore[attr-defined]
        if self.first and data.startswith(UTF8_BOM):
            data = data[3:] or self.stream.read(len(view))  # type: ignore[attr-defined]
            self.count += 3
        self.first = False
        view[: len(data)] = data
        self.count += len(data)
        return len(data)


def _bad_offset(counter: _Checked, error: UnicodeDecodeError) -> RowError:
    return not_utf8(error, counter.count - len(error.object))


def _parquet_rows(file: DataFile) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with opened(file) as stream, tempfile.TemporaryFile() as whole:
            if isinstance(stream, gzip.GzipFile):  # Parquet is read from its end, which gzip cannot do
                shutil.copyfileobj(stream, whole)
            table = pyarrow.parquet.ParquetFile(whole if isinstance(stream, gzip.GzipFile) else file.path)
            number = 0
            for batch in table.iter_batches(batch_size=512):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file.name}:{number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = shown(str(error).splitlines()[0], 160) if str(error) else type(error).__name__
        raise DataError(f"{file.name}: the Parquet file cannot be read ({reason}); write or copy it again") from None


def _text_lines(file: DataFile) -> Iterator[Row | BadRow]:
    for line in lines_of(file):
        if line.raw.strip():
            origin = f"{file.name}:{line.number}"
            try:
                yield Row({"text": line.text()}, origin)
            except RowError as error:
                yield bad_row(origin, error, line.lenient())


def _documents(file: DataFile) -> Iterator[Row | BadRow]:
    """One document a file, or several between `<|endoftext|>`; one beyond a million characters comes in pieces."""
    parts: list[str] = []
    size = 0
    start = 1
    for line in lines_of(file):
        try:
            text = line.text()
        except RowError as error:
            yield bad_row(f"{file.name}:{line.number}", error, line.lenient())
            continue
        *ended, rest = text.split(DOCUMENT_END)
        for piece in ended:
            yield from _document([*parts, piece], file.name, start)
            parts, size, start = [], 0, line.number
        if rest and not parts:
            start = line.number
        if rest or parts:
            parts.append(rest)
        size += len(rest) + 1
        if size >= MAX_DOCUMENT_CHARS:
            yield from _document(parts, file.name, start)
            parts, size, start = [], 0, line.number + 1
    yield from _document(parts, file.name, start)


def _document(parts: list[str], name: str, line: int) -> Iterator[Row]:
    text = "\n".join(parts).strip("\n")
    if text.strip():
        yield Row({"text": text}, f"{name}:{line}")
