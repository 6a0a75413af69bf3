"""The table of what works names proofs that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/capabilities.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*) \|$", re.M)


def missing(page: str) -> list[str]:
    """Test ids and result files named in `page` that do not exist."""
    lost = []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page):
        path = ROOT / file
        if not path.is_file() or not re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M):
            lost.append(f"{file}::{name}")
    lost += [name for name in re.findall(r"evidence/\w+(?:/\w+)?\.(?:md|py)", page) if not (ROOT / name).is_file()]
    return lost


def test_every_proof_exists() -> None:
    assert missing(PAGE) == []


def test_control_a_proof_that_does_not_exist_is_found() -> None:
    page = "`tests/docs/test_capabilities.py::test_no_such`, [x](../evidence/results/never.md), `evidence/none.py`"
    assert len(missing(page)) == 3


def test_every_row_stands_once_with_its_state() -> None:
    rows = _ROW.findall(PAGE)
    assert [int(number) for number, *_ in rows] == list(range(1, 113))
    assert {state for _, _, state, _ in rows} <= {"works", "partly", "not", "in work"}


def test_what_works_has_a_proof_and_what_does_not_says_what_is_missing() -> None:
    for number, _, state, proof in _ROW.findall(PAGE):
        assert state == "in work" or proof.strip(), number
        if state == "works":
            assert "::" in proof or "](" in proof or proof.startswith("row"), number
        if state == "partly":
            assert "; " in proof, number
