"""Simple systems beside a tuned model, so that nobody is fooled by easy data, by one frequent label, or by tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluate.compare import MIN_ROWS, judge, main_metric, number
from tunesmith.evaluate.intervals import Estimate
from tunesmith.evaluate.linear import nearest, tfidf

TITLES = {
    "majority": "most frequent label",
    "tfidf": "TF-IDF + logistic regression",
    "linear_probe": "frozen features + linear classifier",
    "nearest_neighbour": "nearest neighbour",
    "zero_shot": "zero-shot prompt, base untuned",
    "few_shot": "few-shot prompt, base untuned",
}
"""Every baseline by its name in a recipe, in the order of a table; and what it is called there."""


def nearest_answers(prompts: Sequence[str], answers: Sequence[str], asked: Sequence[str]) -> list[str]:
    """For every prompt of `asked` the answer to the nearest of `prompts`, by the cosine of TF-IDF weights."""
    known, wanted = tfidf(prompts, asked)
    return [answers[int(i)] for i in nearest(known, wanted)]


@dataclass(frozen=True, slots=True)
class Rival:
    """A baseline beside the tuned model: its value, and tuned - baseline on the same rows."""

    title: str
    value: float
    change: Estimate

    def verdict(self, metric: str) -> str:
        """Of the tuned model against it: better, worse, or no measurable change."""
        return judge(metric, self.change)


def worth(metric: str, tuned: float, rivals: Sequence[Rival]) -> str:
    """Whether tuning paid, in plain sentences: what beats it, what is as good on these rows, else the nearest."""
    name = metric.replace("_", " ")
    if not rivals:
        return ""
    if max(r.change.n for r in rivals) < MIN_ROWS:
        return f"Too few held-out rows (n = {rivals[0].change.n}) to say whether tuning was worth it."
    ahead = [r for r in rivals if r.verdict(metric) == "worse"]
    level = [r for r in rivals if r.verdict(metric) not in ("worse", "better")]
    if ahead:
        return f"Tuning was not worth it on these rows: {_told(ahead, name, tuned, 'is better')}."
    if level:
        return f"Tuning was not worth it on these rows: {_told(level, name, tuned, 'is as good')}."
    closest = min(rivals, key=lambda r: abs(r.change.value))
    count = "the baseline" if len(rivals) == 1 else f"all {len(rivals)} baselines"
    return (f"Tuning beat {count} on these rows; the nearest, {closest.title}, has {name} "
            f"{number(closest.value)} against {number(tuned)} ({_difference(closest)}).")  # fmt: skip


def _told(rivals: Sequence[Rival], name: str, tuned: float, how: str) -> str:
    return "; ".join(f"{r.title} {how} ({name} {number(r.value)} against {number(tuned)} tuned, {_difference(r)})"
                     for r in rivals)  # fmt: skip


def _difference(rival: Rival) -> str:
    change = rival.change
    if change.low is None or change.high is None:
        return f"too few rows for an interval, n = {change.n:,}"
    inside = " includes 0" if change.low <= 0 <= change.high else ""
    return (f"difference {number(change.value, sign=True)}, 95 % interval {number(change.low, sign=True)} to "
            f"{number(change.high, sign=True)}{inside}, n = {change.n:,}")  # fmt: skip


def rivals_of(
    baselines: Mapping[str, Any], metrics: Mapping[str, Any], preferred: str | None
) -> tuple[str, list[Rival]]:
    """(metric they are judged by, the baselines that have it), from `result["baselines"]` and the tuned metrics."""
    shared = {name: None for name in metrics if any(name in entry.get("metrics", {}) for entry in baselines.values())}
    metric = main_metric(shared, preferred if preferred in shared else None) or ""
    found = []
    for title, entry in baselines.items():
        value, change = entry.get("metrics", {}).get(metric), entry.get("difference", {}).get(metric)
        if value is not None and change is not None and isinstance(value["value"], int | float):
            estimate = Estimate(change["value"], change["low"], change["high"], change["n"])
            found.append(Rival(title, value["value"], estimate))
    return metric, found
