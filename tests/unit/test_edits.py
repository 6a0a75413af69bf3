"""Short rows one edit apart are found, whatever the edit; forms with a slot, and rows two edits apart, are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tunesmith.data import edits
from tunesmith.data.edits import TOKENS, WORDS, Edit
from tunesmith.data.similar import similar_rows

Rows = Sequence[Sequence[int]]
NAMES = ("Ann", "Ben", "Eva", "Ida", "Jon", "Kim", "Leo", "Max", "Mia", "Sam")


def pairs_of(rows: Rows, edit: Edit = WORDS) -> set[tuple[int, int]]:
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    ids = np.array([i for row in rows for i in row], np.int32)
    return {(a, b) for a, b in similar_rows(ids, bounds, len(rows), edit).pairs.tolist()}


def worded(texts: Sequence[str]) -> list[list[int]]:
    known: dict[str, int] = {}
    return [[known.setdefault(word, len(known)) for word in text.split()] for text in texts]


def sentences(count: int, seed: int, low: int = 8, high: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5000) for _ in range(rng.randrange(low, high))] for _ in range(count)]


EDITS: dict[str, Callable[[list[int], int], list[int]]] = {
    "replaced": lambda row, at: [*row[:at], 9000, *row[at + 1 :]],
    "put in": lambda row, at: [*row[:at], 9000, *row[at:]],
    "taken out": lambda row, at: [*row[:at], *row[at + 1 :]],
}


@pytest.mark.parametrize("kind", EDITS)
def test_one_word_is_found_at_every_place_of_a_short_row(kind):
    rows = sentences(60, 1, 9, 10)
    for at in range(9):
        made = [EDITS[kind](row, at) for row in rows[:9]]
        assert pairs_of([*rows, *made]) == {(60 + i, i) for i in range(9)}, at
        twice = [EDITS[kind](EDITS[kind](row, at), (at + 4) % 8) for row in rows[:9]]
        assert pairs_of([*rows, *twice]) == set(), "the control: two edits are another row"


def test_rows_of_few_words_and_rows_in_another_order_are_not_called_alike():
    rows = sentences(40, 2, 7, 8)
    assert pairs_of([*rows, *(EDITS["replaced"](row, 3) for row in rows)]) == set()
    moved = [[*row[1:4], row[0], *row[4:]] for row in sentences(40, 3, 9, 10)]
    assert pairs_of([*sentences(40, 3, 9, 10), *moved]) == set()


def differ_in_one_place(a: Sequence[int], b: Sequence[int], edit: Edit) -> bool:
    """By definition: what lies between the common beginning and the common end is small in both."""
    most = [max(1, min(edit.place, len(row) // 6)) for row in (a, b)]
    for at in range(min(len(a), len(b)) + 1):
        if a[:at] != b[:at]:
            return False
        for x in range(most[0] + 1):
            y = len(b) - (len(a) - x)
            if 0 <= y <= most[1] and at + max(0, x) <= len(a) and at + y <= len(b) and a[at + x :] == b[at + y :]:
                return True
    return False


@pytest.mark.parametrize("edit", [WORDS, TOKENS], ids=["words", "tokens"])
def test_the_pairs_are_those_of_comparing_every_two_rows(edit):
    rng = random.Random(4)
    rows = sentences(90, 5, edit.fewest + 2, 40)
    for row in rows[:90]:
        at, size, more = rng.randrange(len(row)), rng.randrange(edit.place + 3), rng.randrange(edit.place + 3)
        rows.append([*row[:at], *(9000 + rng.randrange(500) for _ in range(more)), *row[at + size :]])
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    new = np.array([row not in rows[:number] for number, row in enumerate(rows)])
    found = edits.edited_rows(np.concatenate(rows), bounds, new, edit)
    wanted = {
        (90 + i, i)
        for i, (old, made) in enumerate(zip(rows[:90], rows[90:], strict=True))
        if len(made) >= edit.fewest and made != old and differ_in_one_place(made, old, edit)
    }
    assert {(a, b) for a, b in found.tolist()} == wanted and 3 < len(wanted) < 60


def test_a_word_of_several_tokens_is_one_place():
    rows = sentences(50, 6, 30, 31)
    made = [[*row[:10], 9001, 9002, 9003, 9004, *row[12:]] for row in rows[:10]]
    assert pairs_of([*rows, *made], TOKENS) == {(50 + i, i) for i in range(10)}
    assert pairs_of([*rows, *made], WORDS) == set()


FORMS: dict[str, Callable[[random.Random], str]] = {
    "one slot": lambda rng: f"Translate the word w{rng.randrange(9999)} into French for me please",
    "slot and answer": lambda rng: (lambda w: f"Translate the word {w} into French please : le {w}")(rng.random()),
    "two numbers": lambda rng: f"What is the sum of {rng.randrange(100)} and {rng.randrange(100)} ?",
    "a story": lambda rng: f"{rng.choice(NAMES)} has {rng.randrange(30)} pears and buys {rng.randrange(30)} more , "
    f"how many pears does {rng.choice(NAMES)} have now ?",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [6, 300])
def test_rows_of_one_form_are_not_called_alike(form, count):
    rng = random.Random(7)
    texts = list(dict.fromkeys(FORMS[form](rng) for _ in range(count)))
    assert len(pairs_of(worded(texts))) <= (0.03 * count if form == "a story" else 0), "of stories, three slots of four"
    if form == "one slot":
        assert len(pairs_of(worded(texts[:2]))) == 1, "the control: two rows are no form"


def test_each_row_is_told_once_and_copies_are_not_told_again():
    row = sentences(1, 8, 20, 21)[0]
    versions = [row, EDITS["replaced"](row, 5), EDITS["put in"](row, 12), row]
    assert pairs_of([*versions, *sentences(30, 9)]) == {(1, 0), (2, 0)}


def test_no_more_tokens_are_looked_at_than_the_cap(monkeypatch):
    rows = sentences(40, 10, 12, 13)
    both = [*rows, *(EDITS["replaced"](row, 6) for row in rows)]
    monkeypatch.setattr(edits, "MAX_TOKENS", 12 * 50)
    assert pairs_of(both) == {(40 + i, i) for i in range(10)}
