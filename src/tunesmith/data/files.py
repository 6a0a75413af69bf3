"""Bytes of a data file -> decoded lines with their numbers; what is not UTF-8 text is refused where it stands."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tunesmith.data.rows import RowError
from tunesmith.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (or an Excel file); unpack it, or save the sheet as CSV UTF-8",
    b"\x80\x04": "a Python pickle, which can run code and is never opened; save it as JSONL or Parquet",
    b"\x80\x02": "a Python pickle, which can run code and is never opened; save it as JSONL or Parquet",
    b"%PDF": "a PDF; extract its text into .txt or JSONL",
    b"BZh": "bzip2; unpack it, or pack it again with gzip",
    b"\xfd7zXZ": "xz; unpack it, or pack it again with gzip",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it, or pack it again with gzip",
    b"\x93NUMPY": "a NumPy array; write the rows as JSONL or CSV",
    b"ARROW1": "an Arrow file; write it as Parquet",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to read: `name` is how the user wrote it, `size` and `mtime_ns` as they were when it was found."""

    path: Path
    name: str
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> DataFile:
        """DataError unless `path` is a regular, readable file with something in it."""
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: is not a regular file (a pipe, a device or a socket); give a file")
        if not os.access(path, os.R_OK):
            raise DataError(f"{path}: may not be read (permission denied); check its permissions")
        if found.st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes); give a file with at least one row")
        return cls(path, str(path), found.st_size, found.st_mtime_ns)

    def check_unchanged(self) -> None:
        """DataError if the file is not the one that was found."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.name}: can no longer be read ({error.strerror}); put it back") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.name}: changed while it was in use; start again with the file as it is now")


@contextmanager
def opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The file's bytes, unzipped if it is gzip, whatever it is called; damage and a failing disk become a DataError."""
    try:
        with open(file.path, "rb") as raw:
            head = raw.read(4)
            raw.seek(0)
            if head.startswith(GZIP_MAGIC):
                with gzip.open(raw, "rb") as unzipped:
                    yield unzipped  # type: ignore[misc]
            elif file.path.suffix == ".gz":
                raise DataError(f"{file.name}: is called .gz but is not gzip; take .gz off its name or pack it again")
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.name}: the gzip data is damaged or cut short ({error}); copy it again") from None
    except OSError as error:
        raise DataError(
            f"{file.name}: cannot be read ({error.strerror or error}); check the disk, or copy it again"
        ) from None


def head_of(file: DataFile, size: int = 65536) -> bytes:
    """The first bytes of the unzipped file, without a UTF-8 BOM; DataError if they are no UTF-8 text at all."""
    with opened(file) as stream:
        head = stream.read(size)
    if head.startswith(b"PAR1"):
        return head
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{file.name}: is {what}")
    refuse_wide(head, file.name)
    return head.removeprefix(UTF8_BOM)


def refuse_wide(head: bytes, name: str) -> None:
    """DataError with the byte offset and a guess if the text is UTF-16 or UTF-32, with or without a BOM."""
    for bom, guess in _WIDE_BOMS:
        if head.startswith(bom):
            raise DataError(_wide(name, 0, guess, f"byte 0x{bom[0]:02x} is a {guess} byte order mark"))
    sample = head[:4096]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if len(sample) >= 8 and max(even, odd) > 0.3 * len(sample) / 2 and min(even, odd) < 0.1 * len(sample) / 2:
        guess = "UTF-16-LE" if odd > even else "UTF-16-BE"
        raise DataError(_wide(name, sample.index(0), guess, "a zero byte in nearly every character"))


def _wide(name: str, offset: int, guess: str, why: str) -> str:
    return (
        f"{name}:1: not UTF-8 at byte offset {offset}: {why}; it looks like {guess}. "
        f"Convert it: iconv -f {guess} -t UTF-8 FILE > NEW"
    )


@dataclass(frozen=True, slots=True)
class Line:
    """A line as bytes, its number from 1 and the offset of its first byte in the (unzipped) file."""

    raw: bytes
    number: int
    offset: int

    def text(self) -> str:
        """Decoded, without its end; RowError naming the byte offset if it is not UTF-8 or holds a NUL."""
        body = self.raw.rstrip(b"\r\n")
        if b"\x00" in body:
            at = self.offset + body.index(b"\x00")
            raise RowError(f"a NUL byte at byte offset {at}", "remove it: tr -d '\\000' < FILE > NEW")
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(error, self.offset) from None

    def lenient(self) -> str:
        """For showing only: what cannot be decoded is escaped."""
        return self.raw[:400].decode("utf-8", "backslashreplace").rstrip("\r\n")


def not_utf8(error: UnicodeDecodeError, offset: int) -> RowError:
    """The refusal of a byte that is no UTF-8, with a guess at what it is."""
    byte = error.object[error.start]
    guess = "WINDOWS-1252 (Latin-1)" if byte not in (0xFF, 0xFE) else "UTF-16, or binary"
    encoding = "WINDOWS-1252" if byte not in (0xFF, 0xFE) else "UTF-16"
    return RowError(
        f"byte 0x{byte:02x} at byte offset {offset + error.start} is not UTF-8; it looks like {guess}",
        f"convert the file: iconv -f {encoding} -t UTF-8 FILE > NEW",
    )


def lines_of(file: DataFile) -> Iterator[Line]:
    """Every line, one at a time; a BOM at the start is taken off. DataError for a line beyond 64 MiB."""
    with opened(file) as stream:
        offset = 0
        number = 0
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                where = f"{file.name}:{number}"
                raise DataError(f"{where}: a line longer than {MAX_ROW_BYTES >> 20} MiB; split it into rows")
            size = len(raw)
            if number == 1 and raw.startswith(UTF8_BOM):
                raw = raw[3:]
                yield Line(raw, number, 3)
            else:
                yield Line(raw, number, offset)
            offset += size
