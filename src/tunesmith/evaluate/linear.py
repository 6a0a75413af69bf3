"""Small systems that need no gradient of a language model: TF-IDF weights, logistic regression, nearest neighbours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = Any
"""`[n, D]`, dense or scipy's sparse rows."""
Classes = NDArray[np.int64]
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 strengths that a linear probe chooses among."""
FOLDS = 3
_WORD = re.compile(r"\w+")


def tfidf(train: Sequence[str], texts: Sequence[str]) -> tuple[Matrix, Matrix]:
    """Sparse rows of length 1 for both: (1 + ln count) · (1 + ln((1 + n) / (1 + documents with the word))).

    Words are lower-cased runs of letters and digits; those that no text of `train` has are left out.
    """
    counts = [Counter(_WORD.findall(text.lower())) for text in train]
    words = {word: i for i, word in enumerate(sorted({word for count in counts for word in count}))}
    documents = np.zeros(len(words))
    for count in counts:
        documents[[words[word] for word in count]] += 1
    weight = 1 + np.log((1 + len(train)) / (1 + documents))
    held = [Counter(w for w in _WORD.findall(text.lower()) if w in words) for text in texts]
    return _weighted(counts, words, weight), _weighted(held, words, weight)


def _weighted(counts: Sequence[Counter[str]], words: dict[str, int], weight: NDArray[np.float64]) -> Matrix:
    from scipy.sparse import csr_array

    sizes = np.cumsum([0, *(len(count) for count in counts)])
    places = np.asarray([words[word] for count in counts for word in count], dtype=np.int64)
    often = np.asarray([n for count in counts for n in count.values()], dtype=np.float64)
    values = (1 + np.log(often)) * weight[places] if len(often) else often
    owners = np.repeat(np.arange(len(counts)), np.diff(sizes))
    norms = np.sqrt(np.bincount(owners, values**2, minlength=len(counts)))
    return csr_array((values / norms[owners], places, sizes), shape=(len(counts), len(words)))


def fit_logistic(x: Matrix, labels: Classes, num_classes: int, strength: float = 1.0) -> NDArray[np.float64]:
    """Weights `[D + 1, C]`, the last row the intercepts, that minimise Σ cross-entropy + |W|² / (2 · strength).

    The intercepts are not penalised: what scikit-learn's `LogisticRegression(C=strength)` minimises. There, two classes
    share one vector w; as W = (-w/2, w/2) its |w|² is 2 |W|².
    """
    from scipy.optimize import minimize

    width, truth = x.shape[1], np.eye(num_classes)[labels]
    strength = strength / 2 if num_classes == 2 else strength

    def cost(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        both = flat.reshape(width + 1, num_classes)
        logs = _log_softmax(x @ both[:-1] + both[-1])
        error = np.exp(logs) - truth
        gradient = np.concatenate([x.T @ error + both[:-1] / strength, error.sum(0)[None]])
        return -float((truth * logs).sum()) + float((both[:-1] ** 2).sum()) / (2 * strength), gradient.ravel()

    found = minimize(cost, np.zeros((width + 1) * num_classes), jac=True, method="L-BFGS-B",
                     options={"maxiter": 500, "ftol": 1e-10})  # fmt: skip
    return found.x.reshape(width + 1, num_classes)


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def predict_logistic(weights: NDArray[np.float64], x: Matrix) -> Classes:
    """The likeliest class of every row, `[n]`."""
    return (x @ weights[:-1] + weights[-1]).argmax(1).astype(np.int64)


def linear_probe(train: NDArray[Any], labels: Classes, x: NDArray[Any], num_classes: int) -> Classes:
    """Classes of `x [n, D]` by a logistic regression on `train [m, D]`, both standardised by `train`.

    Its strength is the one of `STRENGTHS` with the least cross-entropy over three folds of the training rows.
    """
    mean, spread = train.mean(0), train.std(0) + 1e-8
    known, asked = ((part - mean).astype(np.float64) / spread for part in (train, x))
    best = min(STRENGTHS, key=lambda strength: _held_out_cost(known, labels, num_classes, strength))
    return predict_logistic(fit_logistic(known, labels, num_classes, best), asked)


def _held_out_cost(x: NDArray[np.float64], labels: Classes, num_classes: int, strength: float) -> float:
    fold = np.random.default_rng(len(x)).permutation(len(x)) % FOLDS
    total = 0.0
    for k in range(min(FOLDS, len(x))):
        weights = fit_logistic(x[fold != k], labels[fold != k], num_classes, strength)
        logs = _log_softmax(x[fold == k] @ weights[:-1] + weights[-1])
        total -= float(logs[np.arange(len(logs)), labels[fold == k]].sum())
    return total


def nearest(train: Matrix, x: Matrix) -> Classes:
    """Index of the row of `train` with the largest cosine to each row of `x`; of equal ones the first."""
    from scipy.sparse import issparse

    if not issparse(train):
        train, x = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (train, x))
    found = []
    for start in range(0, x.shape[0], 256):
        cosines = x[start : start + 256] @ train.T
        found.append(np.asarray(cosines.toarray() if issparse(cosines) else cosines).argmax(1))
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
