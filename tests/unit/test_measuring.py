"""The held-out files of a run, told apart in its report."""

from __future__ import annotations

import pytest

from tunesmith.data.naming import place, short_names, shortened, told_apart


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


def test_only_whole_paths_are_shortened_and_the_row_stays() -> None:
    names = short_names(["/home/me/a/rows.jsonl", "/home/me/b/rows.jsonl", "owner/name:train", "data/rows.jsonl"])
    assert names == {"/home/me/a/rows.jsonl": "a/rows.jsonl", "/home/me/b/rows.jsonl": "b/rows.jsonl"}
    assert place("/home/me/b/rows.jsonl:17", names) == "b/rows.jsonl:17"
    assert place("data/rows.jsonl:17", names) == "data/rows.jsonl:17"
    assert shortened("2 rows (/home/me/a/rows.jsonl:1, x:2)", names) == "2 rows (a/rows.jsonl:1, x:2)"


def test_a_path_that_begins_like_a_shorter_one_keeps_its_own_name() -> None:
    names = short_names(["/home/me/rows", "/home/me/rows.jsonl"])
    assert shortened("/home/me/rows.jsonl:3 = /home/me/rows:3", names) == "rows.jsonl:3 = rows:3"
