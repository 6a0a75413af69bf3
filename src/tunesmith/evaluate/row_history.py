"""What single rows cost over a run, and what that says of them: hard, never learned, probably mislabelled.

A wrong label is found by what a model expects of a row before it has learned the row by heart. Two such opinions are
added: the run's own, over all visits of the row (area under the margin, Pleiss and others, 2001.10528, eq. 1), and that
of a bag of words that was fitted without the row (confident learning, 1911.00068, 3.1, on out-of-sample
probabilities). `evidence/results/row_losses.md` has what each of them finds, and both together.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import RunError
from tunesmith.evaluate.linear import Matrix, fit_logistic

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
FOLDS = 5
STRENGTH = 0.05
"""Inverse L2 strength of the bag of words."""
ROUNDS, DOUBTED = 2, 0.05
"""Fits in turn, and the share of the rows that the next one is not fitted on."""
OWN_WEIGHT = 0.5
LARGEST = 14.0
"""Log-odds at which a loss near 0 is cut off: one in a million."""


@dataclass(frozen=True, slots=True)
class History:
    """One row's losses, nats, at the `steps` it was seen; 0 is before training. Parts of a split row are averaged."""

    origin: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def first(self) -> float:
        """At the first visit: what a model that has not seen the row makes of it."""
        return self.losses[0]

    @property
    def last(self) -> float:
        """At the last visit."""
        return self.losses[-1]

    @property
    def mean(self) -> float:
        """Over all visits."""
        return sum(self.losses) / len(self.losses)

    @property
    def against(self) -> float:
        """Mean log-odds against the row's label over its visits: minus the margin of two classes."""
        return sum(map(log_odds, self.losses)) / len(self.losses)


def log_odds(loss: float) -> float:
    """log((1 - p) / p) from -log p: 0.6931 gives 0, 0.1054 (p = 0.9) gives -2.197."""
    return max(-LARGEST, min(loss + math.log(max(-math.expm1(-loss), 1e-300)), LARGEST))


def read_histories(path: Path) -> dict[str, History]:
    """Origin -> history, from a file of row losses. `RunError` when a line is no such line."""
    found: dict[str, dict[int, list[float]]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break  # still being written
                entry = json.loads(line)
                for name, rows in entry["rows"].items():
                    for number, loss in rows:
                        visits = found.setdefault(f"{name}:{number}", {})
                        visits.setdefault(int(entry["step"]), []).append(float(loss))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); the rows of this run cannot be listed "
                       "from it") from None  # fmt: skip
    return {
        origin: History(origin, tuple(visits), tuple(sum(losses) / len(losses) for losses in visits.values()))
        for origin, visits in found.items()
    }


def expensive(histories: Iterable[History]) -> list[History]:
    """The rows that cost most at their last visit, the dearest first."""
    return sorted(histories, key=lambda row: (-row.last, row.origin))


def never_learned(histories: Iterable[History]) -> list[History]:
    """Rows that at no visit cost as little as half of all rows did at their first, the dearest first.

    Rows that were seen once only say nothing of learning and are left out.
    """
    seen = [row for row in histories if len(row.losses) > 1]
    if not seen:
        return []
    usual = float(np.median([row.first for row in seen]))
    found = [row for row in seen if min(row.losses) > usual]
    return sorted(found, key=lambda row: (-min(row.losses), row.origin))


def outside_opinion(texts: Sequence[str], labels: Sequence[str], also: Sequence[tuple[str, str]] = ()) -> Floats:
    """Log-odds against each row's label `[n]` by a bag of words fitted on the other four fifths of the rows.

    Which words and pairs of neighbours a text has, each weighed by its naive Bayes log-count ratio, and logistic
    regression of every label against the rest (Wang and Manning, "Baselines and bigrams", ACL 2012, 2.2). Rows are
    dealt to the folds label by label. Those least believed are left out of a second fit, which wrong labels disturb
    less (1911.00068, 4). `also` are further (text, label) rows, such as the held-out ones, that every fold is
    fitted on.
    """
    also = [row for row in also if row[1] in set(labels)]
    names = sorted(set(labels))
    truth = np.asarray([names.index(label) for label in [*labels, *(label for _, label in also)]])
    count = len(texts)
    order = np.random.default_rng(count).permutation(count)
    fold = np.full(len(truth), -1)
    fold[order[np.argsort(truth[order], kind="stable")]] = np.arange(count) % min(FOLDS, count)
    bag = _bag([*texts, *(text for text, _ in also)])
    against, trusted = np.zeros(count), np.ones(len(truth), np.bool_)
    for _ in range(ROUNDS):
        trusted[:count] = against <= np.quantile(against, 1 - DOUBTED)
        for k in range(fold.max() + 1):
            for c in range(len(names)):
                held = (fold == k) & (truth == c)
                against[held[:count]] = _against(bag, truth == c, (fold != k) & trusted, held)
    return against


def _against(bag: Matrix, is_class: Bools, fitted: Bools, held: Bools) -> Floats:
    """Log-odds against the class for the rows `held`, by a regression on the rows `fitted`."""
    inside, outside = (1.0 + np.asarray(bag[rows].sum(0)).ravel() for rows in (fitted & is_class, fitted & ~is_class))
    ratio = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
    weights = fit_logistic(_weighed(bag[fitted], ratio), is_class[fitted].astype(np.int64), 2, STRENGTH)
    scores = _weighed(bag[held], ratio) @ weights[:-1] + weights[-1]
    return np.clip(scores[:, 0] - scores[:, 1], -LARGEST, LARGEST)


def _weighed(bag: Matrix, ratio: Floats) -> Matrix:
    return bag.multiply(ratio[None]).tocsr()


def _bag(texts: Sequence[str]) -> Matrix:
    """Which words and, joined, which two neighbours each text has, 0 or 1; what only one text has is left out."""
    from scipy.sparse import csr_array

    every: list[set[str]] = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        every.append({*words, *(f"{a} {b}" for a, b in pairwise(words))})
    often = Counter(word for words in every for word in words)
    place = {word: i for i, word in enumerate(sorted(word for word, n in often.items() if n > 1))}
    columns = [sorted(place[word] for word in words if word in place) for words in every]
    bounds, flat = np.cumsum([0, *map(len, columns)]), [i for row in columns for i in row]
    return csr_array((np.ones(len(flat)), np.asarray(flat, np.int64), bounds), shape=(len(texts), len(place)))


def suspicion(own: Sequence[float] | Floats, outside: Sequence[float] | Floats | None = None) -> Floats:
    """How much speaks against each row's label `[n]`: opinions, each over its own spread, added.

    The run's own counts half beside the other: it was trained on the very labels that it doubts.
    """
    total = _scaled(np.asarray(own, np.float64))
    return total if outside is None else OWN_WEIGHT * total + _scaled(np.asarray(outside, np.float64))


def _scaled(values: Floats) -> Floats:
    return values / (values.std() or 1.0)


def found_among(suspicions: Mapping[str, float], planted: Iterable[str], share: float = 0.05) -> float:
    """Share of the most suspicious `share` of the rows that really are `planted`."""
    wanted = set(planted)
    top = sorted(suspicions, key=lambda origin: (-suspicions[origin], origin))[: round(share * len(suspicions))]
    return sum(origin in wanted for origin in top) / max(len(top), 1)
