"""Simple systems beside a tuned model, so that nobody is fooled by easy data, by one frequent label, or by tuning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.errors import DataError
from tunesmith.evaluate.compare import MIN_ROWS, judge, main_metric, number
from tunesmith.evaluate.intervals import Estimate, wilson
from tunesmith.evaluate.linear import fit_logistic, nearest, predict_logistic, tfidf

BAG_OF_WORDS = "TF-IDF + logistic regression"
MAJORITY = "most frequent label"
TITLES = {
    "majority": MAJORITY,
    "tfidf": BAG_OF_WORDS,
    "linear_probe": "frozen features + linear classifier",
    "nearest_neighbour": "nearest neighbour",
    "zero_shot": "zero-shot prompt, base untuned",
    "few_shot": "few-shot prompt, base untuned",
}
"""Every baseline by its name in a recipe, in the order of a table; and what it is called there."""


def bag_of_words(train: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[str]:
    """The label of each text from the words in it alone: TF-IDF weights and logistic regression fitted on `train`.

    `train` are (text, label). Words are lower-cased, 1 + log(count) weighted; the regression has L2 and C = 1.
    `DataError` unless there are two labels.
    """
    names = sorted({label for _, label in train})
    if len(names) < 2:
        raise DataError("a classifier needs at least two labels in its training rows")
    place = {name: i for i, name in enumerate(names)}
    known, asked = tfidf([text for text, _ in train], texts)
    weights = fit_logistic(known, np.asarray([place[label] for _, label in train]), len(names))
    return [names[i] for i in predict_logistic(weights, asked)]


def most_frequent(labels: Sequence[str]) -> str:
    """The label that most rows have; of equal ones the first."""
    return Counter(labels).most_common(1)[0][0]


def classifier_baselines(
    train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Estimate]]:
    """system -> {"accuracy": with Wilson's interval} on `held_out`, fitted on `train`; both are (text, label)."""
    truth = [label for _, label in held_out]
    most = most_frequent([label for _, label in train])
    said = {MAJORITY: [most] * len(truth), BAG_OF_WORDS: bag_of_words(train, [text for text, _ in held_out])}
    return {
        system: {"accuracy": wilson(sum(a == b for a, b in zip(labels, truth, strict=True)), len(truth))}
        for system, labels in said.items()
    }


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
