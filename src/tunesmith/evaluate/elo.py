"""Elo ratings of several systems from single comparisons: the most likely ones, whatever order they came in.

System i is preferred to j with probability 1 / (1 + 10^((R_j - R_i) / 400)) (Bradley and Terry 1952; Elo 1978, in whose
units R is); a tie counts half to each side. Ratings average 1000: only differences mean something.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.errors import DataError
from tunesmith.evaluate.compare import MIN_ROWS
from tunesmith.evaluate.intervals import NUM_REPLICATES, Array, Estimate

UNITS = 400 / math.log(10)
"""Elo points to a natural unit of the logistic scale."""
ANCHOR = 1000.0
SCORES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}
"""What a winner is worth to the two systems."""
_STEPS, _DONE = 200, 1e-10


@dataclass(frozen=True, slots=True)
class Judgement:
    """One comparison of two systems by name; `winner` is a, b or tie."""

    a: str
    b: str
    winner: str


@dataclass(frozen=True, slots=True)
class Elo:
    """Ratings `[K]` of `systems`, which are in alphabetical order, and those of the bootstrap `[R, K]`.

    `played [K, K]` counts the judgements between two systems.
    """

    systems: tuple[str, ...]
    ratings: Array
    replicates: Array
    played: Array

    def estimates(self) -> dict[str, Estimate]:
        """The rating of every system, best first; `n` is the number of judgements it took part in."""
        order = sorted(range(len(self.systems)), key=lambda i: (-self.ratings[i], self.systems[i]))
        return {
            self.systems[i]: _interval(self.ratings[i], self.replicates[:, i], int(self.played[i].sum())) for i in order
        }

    def difference(self, a: str, b: str) -> Estimate:
        """Rating of `a` minus that of `b`; `n` is the number of judgements between the two."""
        i, j = self.systems.index(a), self.systems.index(b)
        gaps = self.replicates[:, i] - self.replicates[:, j]
        return _interval(self.ratings[i] - self.ratings[j], gaps, int(self.played[i, j]))

    def verdict(self, a: str, b: str) -> str:
        """ "better", "worse" or "no measurable difference" of `a` against `b`: the interval must leave out 0, and both
        must have taken part in at least 5 judgements."""
        found, least = self.difference(a, b), min(self.played[self.systems.index(name)].sum() for name in (a, b))
        if found.low is None or found.high is None or least < MIN_ROWS or found.low <= 0 <= found.high:
            return "no measurable difference"
        return "better" if found.value > 0 else "worse"

    def differences(self) -> list[dict[str, Any]]:
        """`{a, b, value, low, high, n, verdict}` of every two systems, `a` rated above `b`."""
        names = list(self.estimates())
        return [
            {"a": a, "b": b, **self.difference(a, b).as_json(), "verdict": self.verdict(a, b)}
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        ]


def rate(judgements: Sequence[Judgement], *, seed: int = 0) -> Elo:
    """The ratings that make the judgements most likely, with 95 % intervals by the Bayesian bootstrap (Rubin 1981).

    Every judgement gets a random weight, so that a replicate never loses the only defeat of a system, without which it
    would have no finite rating. Two systems with three wins to one are 400 · log10 3 = 190.85 apart. The order of the
    judgements, and which system is called a, change nothing. Raises `DataError` when systems were never compared, or
    some of them never lost to the others, not even half a point: no finite rating says that.
    """
    systems = tuple(sorted({name for one in judgements for name in (one.a, one.b)}))
    if len(systems) < 2:
        raise DataError(f"{len(judgements)} judgements of {len(systems)} systems; ratings need at least two systems")
    counts = _counted(judgements, systems)
    _refuse_apart(systems, _scores(counts, len(systems))[0])
    keys = sorted(counts)
    drawn = np.random.default_rng([seed, len(judgements)]).gamma(
        [counts[key] for key in keys], size=(NUM_REPLICATES, len(keys))
    )
    part = max(1, 1_000_000 // len(systems) ** 2)
    replicates = [
        _fitted(_scores(dict(zip(keys, drawn[low : low + part].T, strict=True)), len(systems)))
        for low in range(0, NUM_REPLICATES, part)
    ]
    played = np.zeros((len(systems), len(systems)))
    for (i, j, _), count in counts.items():
        played[i, j] += count
        played[j, i] += count
    return Elo(systems, _fitted(_scores(counts, len(systems)))[0], np.concatenate(replicates), played)


def _counted(judgements: Sequence[Judgement], systems: Sequence[str]) -> dict[tuple[int, int, str], int]:
    """How often each pair, in the order of `systems`, ended how, `a` being its first."""
    place = {name: i for i, name in enumerate(systems)}
    found: Counter[tuple[int, int, str]] = Counter()
    for one in judgements:
        i, j, winner = place[one.a], place[one.b], one.winner
        if i > j:
            i, j, winner = j, i, {"a": "b", "b": "a", "tie": "tie"}[winner]
        found[i, j, winner] += 1
    return dict(found)


def _scores(counts: Mapping[tuple[int, int, str], Any], num: int) -> Array:
    """`[R, K, K]`: the points of each system against each other, a tie being half a point; R is 1 for plain counts."""
    size = max(np.size(count) for count in counts.values())
    found = np.zeros((size, num, num))
    for (i, j, winner), count in counts.items():
        first, second = SCORES[winner]
        found[:, i, j] += first * count
        found[:, j, i] += second * count
    return found


def _refuse_apart(systems: Sequence[str], scores: Array) -> None:
    """The most likely ratings are finite where every system can be reached from every other by points (Ford 1957)."""
    from scipy.sparse.csgraph import connected_components

    num, group = connected_components(scores + scores.T, directed=False)
    if num > 1:
        parts = "; ".join(", ".join(_members(systems, group, g)) for g in range(num))
        raise DataError(f"the systems fall into {num} groups that were never compared with each other ({parts}), so "
                        "they have no common scale; judge pairs across the groups, or rate each alone")  # fmt: skip
    num, group = connected_components(scores, directed=True, connection="strong")
    if num > 1:
        top = next(g for g in range(num) if not scores[np.ix_(group != g, group == g)].any())
        raise DataError(f"{', '.join(_members(systems, group, top))} never lost to or tied with another system, so no "
                        "finite rating is most likely; give more judgements, or leave out who always wins or always "
                        "loses (of two systems, `winrate` has an interval even then)")  # fmt: skip


def _members(systems: Sequence[str], group: Any, wanted: int) -> list[str]:
    return [name for name, g in zip(systems, group, strict=True) if g == wanted]


def _fitted(scores: Array) -> Array:
    """The most likely ratings `[R, K]` for points `[R, K, K]`, in Elo units: Newton's method, steps halved where the
    likelihood would fall; it is concave."""
    num = scores.shape[1]
    played, points = scores + scores.transpose(0, 2, 1), scores.sum(2)
    strength = np.zeros(scores.shape[:2])
    reached = _likelihood(scores, strength)
    for _ in range(_STEPS):
        chance = _chances(strength)
        slope = points - (played * chance).sum(2)
        spread = played * chance * (1 - chance)
        curve = np.eye(num) * spread.sum(2)[:, :, None] - spread + 1 / num
        step = np.linalg.solve(curve, slope[:, :, None])[:, :, 0]
        if np.abs(step).max() < _DONE:
            break
        strength, reached = _moved(scores, strength, reached, step)
    strength = strength - strength.mean(1, keepdims=True)
    return ANCHOR + UNITS * strength


def _moved(scores: Array, strength: Array, reached: Array, step: Array) -> tuple[Array, Array]:
    """The strengths after a step, or after as much of it as does not lower the likelihood."""
    share = np.ones(len(strength))
    for _ in range(40):
        tried = strength + share[:, None] * step
        value = _likelihood(scores, tried)
        worse = value < reached - 1e-12 * np.abs(reached)
        if not worse.any():
            return tried, value
        share[worse] /= 2
    return strength, reached


def _chances(strength: Array) -> Array:
    """`[R, K, K]`: how likely each system is preferred to each other."""
    return np.exp(-np.logaddexp(0, strength[:, None, :] - strength[:, :, None]))


def _likelihood(scores: Array, strength: Array) -> Array:
    return -(scores * np.logaddexp(0, strength[:, None, :] - strength[:, :, None])).sum((1, 2))


def _interval(value: float, replicates: Array, n: int) -> Estimate:
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)
