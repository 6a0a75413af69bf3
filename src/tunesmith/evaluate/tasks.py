"""Metrics by name. Each is one pure function of rows, and a `Statistic` where it is reported with an interval."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunesmith.evaluate.intervals import Array, Statistic, mean_statistic

NEUTRAL = frozenset({"kl", "response_length"})
"""What may rise or fall without being better or worse."""
Ints = NDArray[np.int64]
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def _value(statistic: Statistic) -> float:
    return statistic.value()


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of rows whose prediction is right; with several labels a row is right when all of them are."""
    return _value(accuracy_statistic(labels, predictions))


def accuracy_statistic(labels: ArrayLike, predictions: ArrayLike) -> Statistic:
    """Accuracy over `[n]` classes or `[n, C]` yes/no."""
    right = np.asarray(labels) == np.asarray(predictions)
    return mean_statistic("accuracy", (right.all(1) if right.ndim == 2 else right).astype(np.float64))


def precision(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Macro precision: mean over classes seen in labels or predictions of tp / predicted; 0 / 0 counts 0."""
    return _value(class_statistic("precision", labels, predictions))


def recall(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Macro recall: mean over classes seen in labels or predictions of tp / true; 0 / 0 counts 0."""
    return _value(class_statistic("recall", labels, predictions))


def f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Macro F1: mean over classes seen in labels or predictions of 2 tp / (predicted + true).

    Labels 0 0 1 1, predictions 0 1 1 1: F1 is 2/3 and 4/5, their mean 0.7333.
    """
    return _value(class_statistic("f1", labels, predictions))


def class_statistic(name: str, labels: ArrayLike, predictions: ArrayLike) -> Statistic:
    """Macro `precision`, `recall` or `f1`; rows are (tp, predicted, true) per class, K = 3C."""
    true, guess = _yes_no(labels, predictions)
    rows = np.concatenate([true * guess, guess, true], 1)
    return Statistic(name, rows, lambda sums: _macro(name, sums))


def _macro(name: str, sums: Array) -> Array:
    hit, predicted, actual = np.split(sums, 3, axis=1)
    below = {"precision": predicted, "recall": actual, "f1": (predicted + actual) / 2}[name]
    seen = predicted + actual > 0
    each = np.where(below > 0, hit / np.where(below > 0, below, 1), 0.0)
    return (each * seen).sum(1) / np.maximum(seen.sum(1), 1)


def _yes_no(labels: ArrayLike, predictions: ArrayLike) -> tuple[Array, Array]:
    """Both as `[n, C]` of 0 and 1."""
    true, guess = np.asarray(labels), np.asarray(predictions)
    if true.ndim == 2:
        return true.astype(np.float64), guess.astype(np.float64)
    classes = np.unique(np.concatenate([true, guess]))
    return tuple((part[:, None] == classes[None]).astype(np.float64) for part in (true, guess))  # type: ignore[return-value]


def mcc(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, eq. 8); 0 when one side never varies."""
    return _value(mcc_statistic(labels, predictions))


def mcc_statistic(labels: ArrayLike, predictions: ArrayLike) -> Statistic:
    """With c right of s, p_k predicted and t_k true: (c·s - Σ p t) / √((s² - Σ p²)(s² - Σ t²))."""
    true, guess = _yes_no(labels, predictions)
    rows = np.concatenate([np.ones((len(true), 1)), (true * guess).sum(1, keepdims=True), guess, true], 1)
    return Statistic("mcc", rows, _matthews)


def _matthews(sums: Array) -> Array:
    total, right = sums[:, 0], sums[:, 1]
    predicted, actual = np.split(sums[:, 2:], 2, axis=1)
    above = right * total - (predicted * actual).sum(1)
    squares = (total**2 - (predicted**2).sum(1)) * (total**2 - (actual**2).sum(1))
    return np.where(squares > 0, above / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a row labelled 1 scores above one labelled 0, ties counting half.

    ValueError when only one class is there.
    """
    true, given = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    num_true, num_false = int(true.sum()), int((~true).sum())
    if num_true == 0 or num_false == 0:
        raise ValueError("the area under the curve needs rows of both classes")
    _, inverse, counts = np.unique(given, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return float((ranks[true].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation; NaN when one side never varies."""
    x, y = (np.asarray(part, dtype=np.float64) - np.mean(np.asarray(part, dtype=np.float64)) for part in (a, b))
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else float("nan")


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of completions equal to their reference, white space aside; case and punctuation count."""
    return _value(exact_match_statistic(predictions, references))


def exact_match_statistic(predictions: Sequence[str], references: Sequence[str]) -> Statistic:
    """One 0 or 1 per row."""
    same = [a.split() == b.split() for a, b in zip(predictions, references, strict=True)]
    return mean_statistic("exact_match", np.asarray(same, dtype=np.float64))


class _Words:
    """Words of any script in lower case, Han and kana one by one; rouge-score's own knows only a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F (Lin 2004): 2·LCS / (words of both). "a b c d" against "a c d e": LCS 3, so 0.75."""
    return _value(rouge_l_statistic(predictions, references))


def rouge_l_statistic(predictions: Sequence[str], references: Sequence[str]) -> Statistic:
    """One F value per row, from rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, predictions, strict=True)
    return mean_statistic("rouge_l", [float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in pairs])


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, as sacrebleu computes it with its defaults (13a, exponential smoothing)."""
    return _value(bleu_statistic(predictions, references))


def bleu_statistic(predictions: Sequence[str], references: Sequence[str]) -> Statistic:
    """Rows are sacrebleu's counts: 4 matches, 4 totals, both lengths."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(effective_order=True)  # for single sentences; the counts are the same
    scores = [scorer.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    rows = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores]
    return Statistic("bleu", np.asarray(rows, dtype=np.float64).reshape(-1, 10), _corpus_bleu)


def _corpus_bleu(sums: Array) -> Array:
    from sacrebleu.metrics.bleu import BLEU

    whole = np.rint(sums).astype(int).tolist()
    values = [BLEU.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp").score for s in whole]
    return np.asarray(values, dtype=np.float64)


CLASS_METRICS: dict[str, Callable[[Ints, Ints], Statistic]] = {
    "accuracy": accuracy_statistic,
    "f1": lambda a, b: class_statistic("f1", a, b),
    "mcc": mcc_statistic,
    "precision": lambda a, b: class_statistic("precision", a, b),
    "recall": lambda a, b: class_statistic("recall", a, b),
}
TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Statistic]] = {
    "exact_match": exact_match_statistic,
    "rouge_l": rouge_l_statistic,
    "bleu": bleu_statistic,
}
