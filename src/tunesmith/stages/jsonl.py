"""JSONL that grows a row at a time and is never overwritten: rows are whole and on the disk, or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.engine.durable import disk_errors
from tunesmith.errors import RunError
from tunesmith.rundir import read_rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write one line and put it on the disk; `RunError` or `DiskError` when that cannot be: what was there stays."""
    line = (_readable(row) + "\n").encode()
    with disk_errors(path, len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _readable(row: Mapping[str, Any]) -> str:
    """JSON that people can read; half a surrogate pair, which UTF-8 does not have, stays an escape."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in text) else json.dumps(row)


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `append_row` made, none when it is not there; what a crash left of a last line is cut.

    `RunError` when the file holds anything else, which is left as it is.
    """
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no JSONL of rows ({error}); it is left as it is: choose another name") from None
    if not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{path} holds lines that are no objects; it is left as it is: choose another name")
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            if not rows:
                raise RunError(f"{path} holds no whole row; it is left as it is: choose another name")
            os.truncate(path, whole)
    return rows
