"""Faults planted in data are found, counted and placed; clean data raises no alarm."""

from __future__ import annotations

import random

import pytest

from tunesmith.data.check import check_records
from tunesmith.data.kinds import Chat, Labelled, Message, Pair, Ranking, Text

VOCABULARY = [f"word{n}" for n in range(2000)]


def _texts(count: int, seed: int, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=words)) for _ in range(count)]


def _found(train, eval=None, **options):
    return {finding.kind: finding for finding in check_records(train, eval, **options)}


def _plant(count: int):
    """(train, eval): eval is clean but for `count` exact copies, `count` case and space variants, `count` overlaps."""
    train, fresh = _texts(6 * count, 1), _texts(3 * count, 2)
    rng = random.Random(3)
    exact, variants = train[:count], [f"  {t.upper()}\n".replace(" ", "  ") for t in train[count : 2 * count]]
    overlaps = []
    for own, theirs in zip(fresh[:count], train[2 * count : 3 * count], strict=True):
        mine, start = own.split(), rng.randint(0, 26)
        mine[5:18] = theirs.split()[start : start + 13]
        overlaps.append(" ".join(mine))
    clean = fresh[count:]
    held = [*exact, *variants, *overlaps, *clean]
    return [Text(t, f"t:{n}") for n, t in enumerate(train)], [Text(t, f"e:{n}") for n, t in enumerate(held)]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.evidence)])
def test_planted_leaks_are_found_and_clean_rows_are_not(count):
    train, held = _plant(count)
    found = _found(train, held)
    assert found["overlap"].count == 2 * count and found["overlap"].severity == "error"
    assert found["ngram_overlap"].count >= 0.95 * count
    assert found["ngram_overlap"].count <= count + 0.001 * 2 * count, "false alarms among the clean rows"
    assert found["overlap"].examples[0] == "t:0 = e:0"
    clean = _found(train, held[3 * count :])
    assert not {"overlap", "input_overlap", "ngram_overlap", "duplicates"} & set(clean)


def test_every_eval_row_that_shares_a_run_of_words_is_counted():
    run = " ".join(VOCABULARY[:13])
    held = [Text(f"{text} {run}", f"e:{n}") for n, text in enumerate(_texts(3, 5))]
    found = _found([Text(f"a {run} b", "t:0")], held)
    assert found["ngram_overlap"].count == 3


def test_boilerplate_that_many_rows_share_is_no_leak():
    header = " ".join(VOCABULARY[:20])
    train, held = ([Text(f"{header} {side}{n} {text}", f"{side}:{n}") for n, text in enumerate(_texts(50, seed))]
                   for side, seed in (("t", 5), ("e", 6)))  # fmt: skip
    assert "ngram_overlap" not in _found(train, held)
    assert _found(train, held[:3])["ngram_overlap"].count == 3, "the control: three rows are no boilerplate"


def test_the_same_input_with_another_answer_is_a_leak_of_its_own():
    train, held = Labelled("Same text", "a", origin="t:1"), Labelled("same  TEXT", "b", origin="e:9")
    found = _found([train, Labelled("other", "b", origin="t:2")], [held])
    assert found["input_overlap"].examples == ("t:1 = e:9",) and "overlap" not in found
    ask = Message("user", "Capital?")
    talks = [Chat((ask, Message("assistant", a)), origin=a) for a in ("x", "y")]
    assert _found(talks[:1], talks[1:])["input_overlap"].count == 1


def test_duplicates_exact_and_near_are_counted_apart():
    texts = _texts(200, 1)
    train = [Text(t, f"t:{n}") for n, t in enumerate([*texts, *texts[:7], *(t.upper() for t in texts[20:25])])]
    found = _found(train)
    assert (found["duplicates"].count, found["near_duplicates"].count) == (7, 5)
    assert found["duplicates"].examples[0] == "t:0 = t:200"
    assert not {"duplicates", "near_duplicates", "few_rows"} & set(_found([Text(t) for t in texts]))
    again = [Text(t, f"t:{n}") for n, t in enumerate(texts)]
    assert "duplicates" not in _found([*again, *again[:9]]), "a mix may read a row more than once"


def test_labels_one_only_skewed_rare_contradicting_and_unseen():
    texts = _texts(200, 1)
    assert _found([Labelled(t, "a") for t in texts])["one_label"].severity == "error"
    assert _found([Labelled(t, "b" if n < 10 else "a") for n, t in enumerate(texts)])["skewed"].count == 190
    assert "rare" in _found([Labelled(t, "b" if n < 3 else "a") for n, t in enumerate(texts)])["rare_labels"].kind
    fair = [Labelled(t, "ab"[n % 2], origin=f"t:{n}") for n, t in enumerate(texts)]
    assert "0.500" in _found(fair)["balance"].message and not {"skewed", "rare_labels", "label_noise"} & set(
        _found(fair)
    )
    noisy = [*fair, Labelled(texts[4].upper(), "b", origin="t:x")]
    assert _found(noisy)["label_noise"].examples == ("t:4 = t:x",)
    unseen = _found(fair, [Labelled("new one", "c", origin="e:0")])["unseen_labels"]
    assert (unseen.severity, unseen.count) == ("error", 1) and "c" in unseen.message


def test_pairs_without_a_difference_and_rankings_without_an_order():
    ask = (Message("user", "q"),)
    found = _found(
        [Pair(ask, "A b", "a  B", "t:1"), Pair(ask, "a", "b", "t:2"), Ranking(ask, ("x", "y"), (1, 1), "t:3")]
    )
    assert found["same_pairs"].examples == ("t:1",) and found["tied"].examples == ("t:3",)


def test_few_and_tiny_rows_and_the_order_of_findings():
    findings = check_records([Labelled("word", "a"), Labelled("two words", "a")])
    assert [f.severity for f in findings] == sorted(
        (f.severity for f in findings), key=["error", "warning", "note"].index
    )
    kinds = {f.kind for f in findings}
    assert {"few_rows", "tiny", "one_label", "lengths"} <= kinds
    assert all(set(f.as_dict()) == {"kind", "severity", "message", "count", "total", "examples"} for f in findings)
