"""YAML without its traps: what a word means, what is refused, and the line of everything."""

from __future__ import annotations

import math

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe_yaml import parse_yaml, read_text, scalar

MEANS = {
    "1e-4": 1e-4, "1E5": 1e5, "2.5e-05": 2.5e-5, "-3": -3, "+4": 4, "1_000": 1000, "0": 0, "0.5": 0.5, ".5": 0.5,
    "5.": 5.0, "true": True, "False": False, "null": None, "~": None, "": None,
    # YAML 1.1 makes False, 83, 16, 750, a date, infinity and True of these
    "no": "no", "off": "off", "0123": "0123", "0x10": "0x10", "12:30": "12:30", "2020-01-02": "2020-01-02",
    ".inf": ".inf", "yes": "yes", ".nan": ".nan", "nan": "nan", "1__0": "1__0", "1_": "1_", "1e": "1e",
    "--1": "--1", "1.2.3": "1.2.3", "1,5": "1,5", "1e-4 ": "1e-4 ", "٣": "٣",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), MEANS.items())
def test_a_word_means_what_it_looks_like(text, value):
    found = scalar(text)
    assert found == value and type(found) is type(value)


def test_long_and_huge_numbers_are_no_trap():
    assert scalar("9" * 5000) == "9" * 5000 and math.isinf(scalar("1e999"))


def test_values_have_lines_and_quotes_make_text():
    value, lines = parse_yaml("a: 1\nb:\n  c: '1e-4'\n  d: [x, 2]\n", "r.yaml")
    assert value == {"a": 1, "b": {"c": "1e-4", "d": ["x", 2]}}
    assert [lines[path] for path in (("a",), ("b",), ("b", "c"), ("b", "d"), ("b", "d", 1))] == [1, 2, 3, 4, 4]
    assert parse_yaml("", "r.yaml")[0] is None


def test_an_anchor_may_be_used_again():
    assert parse_yaml("a: &x {b: 1}\nc: *x\n", "r")[0] == {"a": {"b": 1}, "c": {"b": 1}}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", r"r.yaml:3: `a` is written twice \(first in line 1\)"),
        ("a:\n  b: 1\n  b: 2\n", "r.yaml:3: `b` is written twice"),
        ("a: [1\n", "r.yaml:2: this is not YAML"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: this is not YAML"),
        ("a: 'x\n", "this is not YAML"),
        ("a: b: c\n", "r.yaml:1: this is not YAML"),
        ("a: 1\n---\nb: 2\n", "this is not YAML"),
        ("a: \x00\n", "this is not YAML"),
        ("a: *x\n", "r.yaml:1: this is not YAML"),
        ("a: &x [*x]\n", "r.yaml:1: .*an anchor that repeats itself"),
        (BOMB, "too large, too deep, or an anchor that repeats itself"),
        ("[" * 1200, "this is not YAML|too deep"),
        ("a: " + "[" * 60 + "]" * 60, "too deep"),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            r"r.yaml:1: the tag `tag:yaml.org,2002:python/object/apply:os.sys",
        ),
        ("a: !secret x\n", "r.yaml:1: the tag `!secret` means nothing"),
        ("? [1, 2]\n: x\n", "r.yaml:1: a key must be a plain word"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_recipe_is_refused_with_its_line(text, said):
    with pytest.raises(RecipeError, match=said):
        parse_yaml(text, "r.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        read_text(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(RecipeError, match="byte 3 is not UTF-8"):
        read_text(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert parse_yaml(read_text(tmp_path / "bom.yaml"), "r")[0] == {"a": 1}
