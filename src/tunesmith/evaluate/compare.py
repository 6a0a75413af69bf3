"""Did it get better? The paired difference on the same rows, and a verdict that says "no change" aloud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluate.intervals import Estimate, Statistic, paired_difference
from tunesmith.evaluate.tasks import NEUTRAL
from tunesmith.recipe_metrics import lower_is_better

MIN_ROWS = 5
NO_CHANGE = "no measurable change"
MAIN_METRICS = (
    "accuracy",
    "reward",
    "win_rate",
    "bits_per_byte",
    "loss",
    "perplexity",
    "rouge_l",
    "exact_match",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """after - before of one metric; `verdict` is "better", "worse", "changed" or "no measurable change"."""

    metric: str
    before: float
    after: float
    change: Estimate
    verdict: str

    @property
    def text(self) -> str:
        """The verdict as a sentence."""
        return describe(self.metric, self.before, self.after, self.change, self.verdict)

    def as_json(self) -> dict[str, Any]:
        """`{value, low, high, n, verdict}` of the difference."""
        return {**self.change.as_json(), "verdict": self.verdict}


def compare(
    before_rows: Mapping[str, Statistic], after_rows: Mapping[str, Statistic], *, seed: int = 0
) -> dict[str, Difference]:
    """The paired difference of every metric both have, from `.statistics()` of two results on the same rows."""
    found = {}
    for name, before in before_rows.items():
        if name in after_rows:
            change = paired_difference(before, after_rows[name], seed=seed)
            found[name] = Difference(name, before.value(), after_rows[name].value(), change, judge(name, change))
    return found


def judge(metric: str, change: Estimate) -> str:
    """Better or worse only when the 95 % interval of the difference leaves out 0 and at least 5 rows were compared; a
    metric that is neither by itself (the KL to the start, a length) has changed."""
    if change.n < MIN_ROWS or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return NO_CHANGE
    if metric in NEUTRAL:
        return "changed"
    rose = change.low > 0
    return "better" if rose != lower_is_better(metric) else "worse"


def describe(metric: str, before: float, after: float, change: Estimate, verdict: str) -> str:
    """One sentence: verdict, both values, the difference with its interval, and the number of rows."""
    name = metric.replace("_", " ")
    head = verdict.upper() if verdict == NO_CHANGE else verdict.capitalize()
    values = f"{name} {number(before)} before, {number(after)} after"
    if change.low is None or change.high is None:
        return f"{head}: {values}; too few rows for an interval, n = {change.n:,}"
    few = f"; fewer than {MIN_ROWS} rows decide nothing" if change.n < MIN_ROWS else ""
    interval = f"95 % interval {number(change.low, sign=True)} to {number(change.high, sign=True)}"
    return f"{head}: {values} ({number(change.value, sign=True)}, {interval}, n = {change.n:,}{few})"


def number(value: float, *, sign: bool = False) -> str:
    """Four significant digits, thousands separated: 0.8397, 12,345, -0.01235."""
    mark = "+" if sign else ""
    if value and abs(value) < 1e-4:
        return f"{value:{mark}.2e}"
    digits = (
        4 if abs(value) < 1 else (3 if abs(value) < 10 else (2 if abs(value) < 100 else (1 if abs(value) < 1e3 else 0)))
    )
    return f"{value:{mark},.{digits}f}"


def main_metric(names: Mapping[str, Any], preferred: str | None = None) -> str | None:
    """The metric a verdict is about: the one asked for, else the first of a fixed order that is there."""
    order = ([preferred] if preferred else []) + [*MAIN_METRICS, *names]
    return next((name for name in order if name in names), None)


def overall(differences: Mapping[str, Difference], preferred: str | None = None) -> str:
    """The main metric's sentence, and every metric that got worse beside it."""
    main = main_metric(differences, preferred)
    if main is None:
        return "Nothing was compared: there is no metric measured both before and after."
    worse = [name for name, d in differences.items() if d.verdict == "worse" and name != main]
    also = f" Worse: {', '.join(worse)}." if worse else ""
    return differences[main].text + "." + also
