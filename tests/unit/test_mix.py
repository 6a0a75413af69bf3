"""Several sets in the proportions asked for, at every point of a pass."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tunesmith.data.mix import Mixed
from tunesmith.data.records import read_records
from tunesmith.errors import DataError


def _sets(tmp_path, sizes, stage="pretrain"):
    made = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number}/{n}"}) + "\n" for n in range(size)))
        made.append(read_records(path, stage=stage))
    return made


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (5, 1, 1, 1)])
def test_a_mix_matches_its_weights_within_two_percent(weights, tmp_path):
    mixed = Mixed(list(zip(_sets(tmp_path, [300, 50, 120, 80][: len(weights)]), weights, strict=True)), seed=1)
    drawn = [record.text.partition("/")[0] for record in mixed]
    assert len(drawn) == len(mixed) == sum(mixed.num_drawn)
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(drawn.count(str(number)) / len(drawn) - share) < 0.02
        assert all(abs(drawn[:n].count(str(number)) - share * n) <= len(weights) for n in range(1, len(drawn)))


def test_every_row_of_every_set_comes_before_a_pass_ends(tmp_path):
    mixed = Mixed(list(zip(_sets(tmp_path, [40, 10]), (1, 1), strict=True)), seed=2)
    counts = Counter(record.text for record in mixed)
    assert len(counts) == 50 and {c for t, c in counts.items() if t[0] == "0"} == {1}
    assert {c for t, c in counts.items() if t[0] == "1"} == {4}
    assert "10 rows read 4.00 times" in mixed.describe() and "50.0% of the mix" in mixed.describe()


def test_a_mix_is_the_same_again_and_another_seed_or_weight_is_another_content(tmp_path):
    parts = _sets(tmp_path, [20, 20])

    def made(weights, seed):
        return Mixed(list(zip(parts, weights, strict=True)), seed=seed)

    assert [r.text for r in made((1, 2), 1)] == [r.text for r in made((1, 2), 1)]
    assert len({made(w, s).fingerprint for w in ((1, 2), (2, 1)) for s in (1, 2)}) == 4
    assert made((1, 2), 1).fingerprint == made((2, 4), 1).fingerprint


@pytest.mark.parametrize("weights", [(1, 0), (1, -1), (float("nan"), 1), (float("inf"), 1)])
def test_weights_must_be_above_zero(weights, tmp_path):
    with pytest.raises(DataError, match="weights must be above 0"):
        Mixed(list(zip(_sets(tmp_path, [5, 5]), weights, strict=True)))


def test_nothing_to_mix_and_sets_of_several_stages_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to mix"):
        Mixed([])
    one, _ = _sets(tmp_path, [5, 5])
    with pytest.raises(DataError, match="different stages"):
        Mixed([(one, 1), (read_records(tmp_path / "1.jsonl", stage="mlm"), 1)])
