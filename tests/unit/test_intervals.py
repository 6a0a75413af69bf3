"""Intervals against hand-worked and published numbers, their coverage, and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.evaluate.compare import NO_CHANGE, compare, main_metric, number, overall
from tunesmith.evaluate.intervals import (
    Statistic,
    bootstrap,
    mean_interval,
    mean_statistic,
    paired_bootstrap,
    paired_difference,
    ratio,
    wilson,
)


def test_mean_interval_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t(0.975, 2) times s = 1 over root n
    assert found.value == 2.0 and found.n == 3
    assert found.low == pytest.approx(2 - half, abs=1e-5) and found.high == pytest.approx(2 + half, abs=1e-5)


def test_wilson_against_published_numbers():
    found = wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    found = wilson(81, 263)  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    none = wilson(0, 20)  # same table: 0 to 0.1611
    assert none.low == 0.0 and none.high == pytest.approx(0.1611, abs=1e-4)


@pytest.mark.parametrize("make", [lambda: bootstrap(mean_statistic("m", [1.0])), lambda: mean_interval([1.0])])
def test_one_row_has_no_interval(make):
    found = make()
    assert found.value == 1.0 and found.low is None and found.high is None and found.n == 1


def test_no_rows_are_not_a_number_and_json_says_so():
    assert wilson(0, 0).as_json() == {"value": "NaN", "low": None, "high": None, "n": 0}
    assert bootstrap(Statistic("m", np.zeros((0, 2)), ratio)).as_json()["value"] == "NaN"


def test_rows_are_drawn_not_tokens():
    """Two kinds of rows: the token-level error would be tiny, the row-level one is not."""
    nats, tokens = np.array([100.0, 300.0] * 5), np.full(10, 100.0)
    found = bootstrap(Statistic("loss", np.stack([nats, tokens], 1), ratio))
    assert found.value == 2.0
    assert found.low is not None and found.high is not None
    assert found.high - found.low > 1.0  # s of the row means is 1.05, over root 10, times 2 · 2.26 · 1.05
    assert 4 * 1.0 / math.sqrt(1000) < 0.2  # control: what drawing tokens would have given


def test_coverage_is_near_95_percent():
    """The share of 400 samples of 12 rows whose interval holds the truth; over 2,000 of them it was 0.946 and 0.909."""
    generator = np.random.default_rng(5)
    held = plain_held = 0
    for seed in range(400):
        data = generator.normal(size=12)
        found = bootstrap(mean_statistic("m", data), seed=seed)
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
        means = data[np.random.default_rng(seed).integers(12, size=(2000, 12))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        plain_held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.98
    assert plain_held / 400 < 0.93  # control: plain percentiles are too narrow for so few rows


def test_bootstrap_is_a_function_of_its_seed():
    data = np.random.default_rng(0).normal(size=50)
    one, same, other = (bootstrap(mean_statistic("m", data), seed=s) for s in (1, 1, 2))
    assert one == same and one != other


def test_pairing_sees_what_two_intervals_hide():
    generator = np.random.default_rng(0)
    before = generator.normal(size=200) * 5
    after = before + 0.2 + 0.1 * generator.normal(size=200)
    found = paired_bootstrap(before, after)
    assert found.value == pytest.approx(0.2, abs=0.03) and found.low is not None and found.low > 0
    shuffled = paired_bootstrap(before, generator.permutation(after))  # control: pairs broken
    assert shuffled.low is not None and shuffled.low < 0


def test_a_pair_needs_the_same_rows():
    with pytest.raises(ValueError, match="3 rows before and 2 after"):
        paired_difference(mean_statistic("loss", [1, 2, 3]), mean_statistic("loss", [1, 2]))


def test_verdicts():
    low = np.linspace(1, 2, 30)
    wave = np.where(np.arange(30) % 2, 0.5, -0.5)
    table = {name: mean_statistic(name, low) for name in ("loss", "accuracy", "f1")}
    after = {"loss": low - 0.3, "accuracy": low - 0.3, "f1": low + wave, "extra": low}
    found = compare(table, {name: mean_statistic(name, values) for name, values in after.items()})
    assert {name: d.verdict for name, d in found.items()} == {
        "loss": "better",
        "accuracy": "worse",
        "f1": NO_CHANGE,
    }
    assert found["loss"].text.startswith("Better: loss 1.500 before, 1.200 after (-0.3000, 95 % interval")
    assert found["f1"].text.startswith("NO MEASURABLE CHANGE: f1")
    assert found["loss"].as_json()["verdict"] == "better"
    assert overall(found).startswith("Worse: accuracy")
    assert overall(found, "loss").endswith("Worse: accuracy.")
    assert main_metric({"f1": 0}) == "f1" and main_metric({}) is None


def test_nothing_changed_and_too_few_rows_are_no_change():
    same = {"loss": mean_statistic("loss", [1.0] * 30)}
    assert compare(same, same)["loss"].verdict == NO_CHANGE
    few = compare({"loss": mean_statistic("loss", [2.0] * 4)}, {"loss": mean_statistic("loss", [1.0] * 4)})["loss"]
    assert few.verdict == NO_CHANGE and "fewer than 5 rows decide nothing" in few.text
    one = compare({"loss": mean_statistic("loss", [2.0])}, {"loss": mean_statistic("loss", [1.0])})["loss"]
    assert one.verdict == NO_CHANGE and one.text.endswith("too few rows for an interval, n = 1")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.83972, "0.8397"),
        (12345.6, "12,346"),
        (0.0, "0.0000"),
        (0.00001, "1.00e-05"),
        (123.45, "123.5"),
        (7.0, "7.000"),
    ],
)
def test_numbers_as_text(value: float, text: str):
    assert number(value) == text
