"""Rows that hold any character are read back as they were written: only a line feed ends one."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.rundir import read_rows

ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"


def test_characters_that_other_readers_take_for_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": ODD}, {"prompt": "plain"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_rows(path) == rows


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2', encoding="utf-8")
    assert read_rows(path) == [{"step": 1}]
    assert read_rows(tmp_path / "none.jsonl") == []
