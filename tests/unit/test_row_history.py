"""What single rows cost: read back, ranked, and wrong labels found before they are learned by heart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.errors import RunError
from tunesmith.evaluate.row_history import (
    History,
    expensive,
    found_among,
    log_odds,
    never_learned,
    outside_opinion,
    read_histories,
    suspicion,
)

GOOD, BAD = "good fine great lovely warm", "bad dull poor cold broken"


def row(number: int, *losses: float) -> History:
    return History(f"a.jsonl:{number}", tuple(range(1, len(losses) + 1)), losses)


def test_log_odds_of_a_loss_is_minus_the_margin_of_two_classes():
    for margin in (-3.0, 0.0, 2.5):
        assert log_odds(math.log1p(math.exp(-margin))) == pytest.approx(-margin)
    assert log_odds(0.0) == -14.0 and log_odds(100.0) == 14.0


def test_histories_are_read_back_parts_of_a_split_row_are_averaged_and_half_a_line_is_left_out(tmp_path):
    file = tmp_path / "train_rows.jsonl"
    file.write_text('{"step": 1, "rows": {"a.jsonl": [[3, 0.5], [4, 1.0], [4, 3.0]]}}\n'
                    '{"step": 2, "rows": {"a.jsonl": [[3, 0.25]]}}\n{"step": 3, "rows": {"a.js')  # fmt: skip
    found = read_histories(file)
    assert found["a.jsonl:3"] == History("a.jsonl:3", (1, 2), (0.5, 0.25))
    assert found["a.jsonl:4"].losses == (2.0,)
    assert read_histories(tmp_path / "absent.jsonl") == {}


@pytest.mark.parametrize("line", ["{", '{"step": 1}', '{"step": 1, "rows": {"a": [1]}}', "[]"])
def test_a_damaged_file_is_refused_by_name(line, tmp_path):
    file = tmp_path / "train_rows.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(RunError, match=r"train_rows\.jsonl is damaged"):
        read_histories(file)


def test_rows_that_never_got_as_cheap_as_others_began_were_never_learned():
    rows = [row(1, 1.0, 0.2), row(2, 1.1, 1.4, 1.2), row(3, 0.9, 0.8), row(4, 5.0)]
    assert [r.origin for r in never_learned(rows)] == ["a.jsonl:2"]
    assert [r.origin for r in expensive(rows)] == ["a.jsonl:4", "a.jsonl:2", "a.jsonl:3", "a.jsonl:1"]


def labelled(count: int, flip: set[int]) -> tuple[list[str], list[str]]:
    draw = np.random.default_rng(0)
    texts, labels = [], []
    for i in range(count):
        words = (GOOD if i % 2 else BAD).split()
        texts.append(f"the {draw.choice(words)} {draw.choice(words)} row {draw.integers(1000)}")
        labels.append("yes" if (i % 2 == 1) != (i in flip) else "no")
    return texts, labels


def test_a_bag_of_words_fitted_without_a_row_speaks_against_its_flipped_label():
    flip = set(range(7, 200, 20))
    texts, labels = labelled(200, flip)
    against = outside_opinion(texts, labels)
    origins = {str(i): float(value) for i, value in enumerate(against)}
    assert found_among(origins, map(str, flip)) == 1.0
    control = {str(i): float(value) for i, value in enumerate(-against)}
    assert found_among(control, map(str, flip)) == 0.0


def test_a_row_that_stands_alone_is_not_judged_by_itself():
    """Fitted with the row, a word that only it has would defend the wrong label."""
    texts, labels = labelled(60, {11})
    texts[11] += " unheard unheard unheard"
    assert outside_opinion(texts, labels).argmax() == 11


def test_further_rows_help_and_those_of_unknown_labels_are_passed_over():
    texts, labels = labelled(40, set())
    few, few_labels = texts[:6], ["yes", *labels[1:6]]
    also = [*zip(texts[6:], labels[6:], strict=True), ("neither", "perhaps")]
    assert outside_opinion(few, few_labels, also).argmax() == 0


def test_opinions_count_by_their_spread():
    one, other = [0.0, 1.0, 0.0], [0.0, 0.0, 900.0]
    assert suspicion(one).argmax() == 1
    both = suspicion(one, other)
    assert both[1] - both[0] == pytest.approx((both[2] - both[0]) / 2), "its scale is not what counts"
    assert list(suspicion([2.0, 2.0])) == [2.0, 2.0]
