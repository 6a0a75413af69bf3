"""Rankings as pairs and back; what of a record is input and what is output."""

from __future__ import annotations

from itertools import permutations
from math import comb

import pytest

from tunesmith.data.kinds import (
    Chat,
    Labelled,
    Message,
    Pair,
    Prompt,
    Ranking,
    Text,
    as_ranking,
    comparisons,
    full_text,
    input_text,
    normalised,
    output_text,
    pairs_of,
)

ASK = (Message("user", "q"),)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_k_answers_give_k_choose_two_pairs_and_ties_none(k):
    assert len(comparisons(range(1, k + 1))) == comb(k, 2)
    assert comparisons([1] * k) == ()
    assert len(comparisons([1] * (k - 1) + [2])) == k - 1


def test_the_better_answer_comes_first_in_every_pair():
    for ranks in permutations((1, 2, 2, 4)):
        pairs = comparisons(ranks)
        assert all(ranks[better] < ranks[worse] for better, worse in pairs) and len(set(pairs)) == len(pairs) == 5
    assert comparisons((2, 1, 2)) == ((1, 0), (1, 2))


def test_a_ranking_of_two_is_a_pair_both_ways():
    pair = Pair(ASK, "good", "bad", "f:1")
    ranking = as_ranking(pair)
    assert ranking == Ranking(ASK, ("good", "bad"), (1, 2), "f:1") and as_ranking(ranking) is ranking
    assert pairs_of(ranking) == (pair,) == pairs_of(pair)
    assert pairs_of(Ranking(ASK, ("bad", "good"), (2, 1), "f:1")) == (pair,)


def test_input_and_output_of_every_record():
    chat = Chat((*ASK, Message("assistant", "a"), Message("user", "r"), Message("assistant", "b")))
    assert (input_text(chat), output_text(chat), full_text(chat)) == ("q\na\nr", "b", "q\na\nr\nb")
    assert (input_text(Text("t")), output_text(Text("t"))) == ("t", "")
    assert (input_text(Labelled("t", ("a", "b"), "u")), output_text(Labelled("t", ("a", "b")))) == ("t\nu", "a, b")
    assert (
        output_text(Ranking(ASK, ("x", "y"), (2, 1))) == "y"
        and full_text(Ranking(ASK, ("x", "y"), (2, 1))) == "q\nx\ny"
    )
    assert (output_text(Prompt(ASK)), output_text(Prompt(ASK, "4")), output_text(Pair(ASK, "c", "r"))) == ("", "4", "c")


def test_normalising_folds_case_width_and_white_space_only():
    assert normalised("  Straße\n\tＡＢＣ ") == normalised("STRASSE abc") == "strasse abc"
    assert normalised("a b") != normalised("a-b") != normalised("ab")
