"""The held-out files of a run, told apart in its report."""

from __future__ import annotations

import pytest

from tunesmith.stages.measuring import told_apart


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/home/me/a.jsonl", "/home/me/b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["/home/me/a/test.jsonl", "/home/me/b/test.jsonl"], ["a/test.jsonl", "b/test.jsonl"]),
        (["a/x/test.jsonl", "b/x/test.jsonl"], ["a/x/test.jsonl", "b/x/test.jsonl"]),
        (["test.jsonl", "a/test.jsonl"], ["test.jsonl", "a/test.jsonl"]),
        (["owner/name:train", "owner/name:test"], ["name:train", "name:test"]),
    ],
)
def test_files_are_named_by_no_more_than_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert list(told_apart(paths).values()) == names
