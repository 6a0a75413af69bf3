"""Elo from comparisons and ratings from 1 to 7, against values by hand."""

from __future__ import annotations

import json
import math
import random

import pytest

from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.elo import Judgement, rate
from tunesmith.evaluate.intervals import mean_interval
from tunesmith.evaluate.ratings import Rating, mean_ratings, rating_differences

THREE_TO_ONE = [Judgement("x", "y", "a"), Judgement("y", "x", "b"), Judgement("x", "y", "a"), Judgement("x", "y", "b")]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


def test_three_wins_to_one_are_191_points_round_1000():
    found = rate(THREE_TO_ONE)
    change = found.difference("x", "y")
    assert change.value == pytest.approx(400 * math.log10(3), abs=1e-8) and change.n == 4
    ratings = found.estimates()
    assert [ratings[name].value for name in "xy"] == pytest.approx([1095.4243, 904.5757], abs=1e-3)
    assert change.low < 0 < change.value < change.high and found.verdict("x", "y") == "no measurable difference"


def test_a_tie_is_half_a_win_for_each():
    """Two wins, two ties and no defeat are 3 points to 1."""
    ties = [Judgement("x", "y", "a")] * 2 + [Judgement("x", "y", "tie"), Judgement("y", "x", "tie")]
    assert rate(ties).difference("x", "y").value == pytest.approx(400 * math.log10(3), abs=1e-8)
    assert rate([Judgement("x", "y", "tie")] * 3).difference("x", "y").value == pytest.approx(0, abs=1e-8)


def test_a_chain_of_pairs_adds_up_and_the_average_is_1000():
    """x:y 3 to 1 and y:z 9 to 1, with x and z never compared: the points of a tree are those of its pairs."""
    rows = [*THREE_TO_ONE, *[Judgement("y", "z", "a")] * 9, Judgement("z", "y", "a")]
    found = rate(rows)
    assert found.difference("x", "z").value == pytest.approx(400 * (math.log10(3) + math.log10(9)), abs=1e-7)
    assert found.difference("x", "z").n == 0
    assert sum(e.value for e in found.estimates().values()) == pytest.approx(3000)
    assert [e.n for e in found.estimates().values()] == [4, 14, 10]


def test_neither_order_nor_side_changes_anything():
    rng = random.Random(0)
    rows = [Judgement(a, b, rng.choice(("a", "b", "tie"))) for a, b in ("xy", "yz", "zx") for _ in range(20)]
    turned = [Judgement(r.b, r.a, {"a": "b", "b": "a", "tie": "tie"}[r.winner]) for r in rows]
    rng.shuffle(turned)
    assert rate(rows).estimates() == rate(turned).estimates()
    assert rate(rows, seed=1).estimates() != rate(rows).estimates()  # the intervals are drawn


def test_many_judgements_show_the_difference_and_meet_the_truth():
    rng = random.Random(3)
    rows = [Judgement("x", "y", "a" if rng.random() < 0.75 else "b") for _ in range(400)]
    found = rate(rows)
    change = found.difference("x", "y")
    assert change.low < 400 * math.log10(3) < change.high and found.verdict("x", "y") == "better"
    share = sum(row.winner == "a" for row in rows) / 400
    error = 400 / math.log(10) / math.sqrt(400 * share * (1 - share))  # delta method
    assert change.high - change.low == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [*THREE_TO_ONE, Judgement("p", "q", "tie")],
            r"2 groups that were never compared .*\(p, q; x, y\)|\(x, y; p, q",
        ),
        ([Judgement("x", "y", "a")] * 9, "x never lost to or tied"),
        ([*THREE_TO_ONE, Judgement("x", "z", "a")], "x, y never lost to or tied"),
    ],
)
def test_systems_without_a_common_scale_are_refused(rows, said):
    with pytest.raises(DataError, match=said):
        rate(rows)


def test_elo_from_files_of_judgements_and_of_winrate(written, capsys):
    judged = {"a": "x", "b": "y", "judge": "me"}
    one = written("one.jsonl", [{"a": "x", "b": "y", "winner": w} for w in ("a", "a", "b")])
    two = written("two.jsonl", [{"a": "an answer", "b": "another", "judged": judged, "verdict": v}
                                for v in ("a", "unclear")])  # fmt: skip
    found = api.elo([one, two])
    assert (found["judgements"], found["unclear"], found["ties"]) == (4, 1, 0)
    assert found["differences"][0]["value"] == pytest.approx(190.8485, abs=1e-4)
    assert main(["elo", one, two, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["elo", one, two]) == 0
    shown = capsys.readouterr().out
    assert "1,095.4" in shown and "4 judgements (0 ties), 1 unclear ones left out" in shown and "x - y" in shown


def test_rows_that_are_no_judgements_are_refused_by_line(written, capsys):
    rows = [{"a": "x", "b": "y", "winner": "x"}, {"a": "x", "b": "x", "winner": "a"}, {"a": "x", "winner": "a"}]
    assert main(["elo", written("bad.jsonl", rows)]) == 2
    said = capsys.readouterr().err
    assert all(f"bad.jsonl:{line}" in said for line in (1, 2, 3)) and "none of a, b, tie" in said
    assert main(["elo", "nowhere.jsonl"]) == 2 and main(["elo", written("none.jsonl", [{"a": 1}])]) == 2


@pytest.mark.parametrize("winner", [["a"], {"a": 1}, 1, None])
def test_a_winner_that_is_no_text_is_a_bad_row(winner, written):
    judged = {"judged": {"a": "x", "b": "y"}, "verdict": winner}
    for row in ({"a": "x", "b": "y", "winner": winner}, judged):
        with pytest.raises(DataError, match=r"bad\.jsonl:1: the winner is"):
            api.elo(written("bad.jsonl", [row]))


def test_numbers_that_cannot_be_are_one_message(written):
    with pytest.raises(RecipeError, match="seed is -1"):
        api.elo(written("one.jsonl", [{"a": "x", "b": "y", "winner": "a"}]), seed=-1)
    with pytest.raises(DataError, match="which is no number"):
        api.ratings(written("rated.jsonl", [{"system": "x", "rating": 10**400}]))


def test_mean_ratings_by_hand():
    """7, 6, 5, 6: mean 6, deviation 0.8165, t(3) = 3.1824, so 6 ± 1.299, and no further than 7."""
    found = mean_ratings([Rating("x", r) for r in (7, 6, 5, 6)] + [Rating("y", r) for r in (1, 3)])
    assert list(found) == ["x", "y"] and (found["x"].value, found["x"].n) == (6.0, 4)
    assert found["x"].low == pytest.approx(4.7008, abs=1e-4) and found["x"].high == 7.0
    assert (found["y"].low, found["y"].value) == (1.0, 2.0)
    assert mean_ratings([Rating("x", 7)])["x"].low is None


def test_ratings_all_alike_are_not_taken_for_certain():
    """Ten 7s: Wilson's interval of 10 out of 10 begins at 0.7225 of the way from 1 to 7."""
    found = mean_ratings([Rating("x", 7)] * 10)["x"]
    assert found.low == pytest.approx(1 + 6 * 0.72246, abs=1e-3) and found.high == 7.0


def test_the_paired_difference_is_of_the_items_both_have():
    """x is rated twice on item 1: 5 and 7 count as one 6. Shared items 1 to 6 differ by 2, 1, 2, 1, 2, 1."""
    x = [Rating("x", 5, "1"), Rating("x", 7, "1"), *(Rating("x", 5, str(i)) for i in range(2, 7)), Rating("x", 7, "9")]
    y = [Rating("y", 4 if i == 1 else 4 - (i % 2), str(i)) for i in range(1, 7)]
    (row,) = rating_differences([*x, *y])
    expected = mean_interval([2, 1, 2, 1, 2, 1])
    assert {k: row[k] for k in ("a", "b", "n", "verdict")} == {"a": "x", "b": "y", "n": 6, "verdict": "better"}
    assert (row["value"], row["low"], row["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert rating_differences([Rating("x", 5, "1"), Rating("y", 5, "2")]) == []
    with pytest.raises(DataError, match="1 of 2 ratings do not name their `item`"):
        mean_ratings([Rating("x", 5, "1"), Rating("x", 5)])


def test_ratings_from_a_file(written, tmp_path, capsys):
    rows = [{"system": s, "item": i, "rating": r} for s, rs in (("x", (7, 6, 5)), ("y", (4, 4, 3)))
            for i, r in enumerate(rs)]  # fmt: skip
    found = api.ratings(written("likert.jsonl", rows))
    assert found["ratings"]["x"]["value"] == 6.0 and found["differences"][0]["value"] == pytest.approx(7 / 3)
    (tmp_path / "likert.csv").write_text("system,item,rating\n" + "".join(
        f"{row['system']},{row['item']},{row['rating']}\n" for row in rows))  # fmt: skip
    assert api.ratings("likert.csv")["ratings"] == found["ratings"]
    assert main(["ratings", "likert.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["ratings", "likert.jsonl"]) == 0 and "6 ratings from 1 to 7" in capsys.readouterr().out


@pytest.mark.parametrize("rating", [0, 8, 7.5, -3, True, None, "good", "NaN", [3]])
def test_a_rating_off_the_scale_is_refused_by_its_line(rating, written, capsys):
    rows = [{"system": "x", "rating": 4}, {"system": "x", "rating": rating}]
    assert main(["ratings", written("odd.jsonl", rows)]) == 2
    said = capsys.readouterr().err
    assert "odd.jsonl:2: the rating is" in said and "odd.jsonl:1" not in said and "Traceback" not in said
