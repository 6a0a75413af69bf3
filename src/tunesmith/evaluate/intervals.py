"""Values with 95 % intervals: every metric is a function of sums over rows, so one bootstrap serves them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUM_REPLICATES = 2000
CONFIDENCE = 0.95
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval over `n` rows; `low` and `high` are None when one row says nothing of the spread."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, float | int | str | None]:
        """`{value, low, high, n}`; JSON has no NaN and no infinity, so they become "NaN" and "Infinity"."""
        return {"value": plain(self.value), "low": plain(self.low), "high": plain(self.high), "n": self.n}


@dataclass(frozen=True, slots=True)
class Statistic:
    """A metric as `of(sums)`: `rows [n, K]` are added up over rows, `of` maps `[R, K]` sums to `[R]` values.

    A mean loss per token has K = 2, (nats, tokens), and `of` divides: the row is what is drawn, not the token.
    """

    name: str
    rows: Array
    of: Callable[[Array], Array]

    @property
    def n(self) -> int:
        """How many rows."""
        return len(self.rows)

    def value(self) -> float:
        """The metric over all rows."""
        return float(self.of(self.rows.sum(0, keepdims=True))[0])


def plain(value: float | None) -> float | str | None:
    """The number as JSON can hold it."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def ratio(sums: Array) -> Array:
    """`sums [R, 2]` -> first over second `[R]`; nothing over nothing is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def mean_statistic(name: str, values: Sequence[float] | Array) -> Statistic:
    """The plain mean of one number per row."""
    column = np.asarray(values, dtype=np.float64)
    return Statistic(name, np.stack([column, np.ones_like(column)], 1), ratio)


def mean_interval(values: Sequence[float] | Array) -> Estimate:
    """Mean and Student's t interval: mean ± t(n - 1) · s / √n. Of 1, 2, 3: 2 ± 4.303 · 1 / √3."""
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    mean = float(data.mean()) if n else math.nan
    if n < 2:
        return Estimate(mean, None, None, n)
    from scipy.stats import t

    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * float(data.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def wilson(successes: float, n: int) -> Estimate:
    """A share and Wilson's interval (1927), sound also near 0 and 1. 8 of 10 gives 0.8 (0.490 to 0.943)."""
    if n == 0:
        return Estimate(math.nan, None, None, 0)
    share, z2 = successes / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def bootstrap(statistic: Statistic, *, seed: int = 0) -> Estimate:
    """The metric and its bootstrap interval over rows (Efron and Tibshirani 1993, 13.3), widened for small n."""
    if statistic.n < 2:
        return Estimate(statistic.value() if statistic.n else math.nan, None, None, statistic.n)
    values = np.concatenate([statistic.of(w @ statistic.rows) for w in _weights(statistic.n, seed)])
    return Estimate(statistic.value(), *_percentiles(values, statistic.n), statistic.n)


def paired_difference(before: Statistic, after: Statistic, *, seed: int = 0) -> Estimate:
    """after - before on the same rows, each replicate drawing the same rows for both.

    ValueError when the two do not have the same rows.
    """
    if before.n != after.n:
        raise ValueError(f"{before.name}: {before.n} rows before and {after.n} after: a pair needs the same rows")
    value = after.value() - before.value() if before.n else math.nan
    if before.n < 2:
        return Estimate(value, None, None, before.n)
    values = np.concatenate([after.of(w @ after.rows) - before.of(w @ before.rows) for w in _weights(before.n, seed)])
    return Estimate(value, *_percentiles(values, before.n), before.n)


def paired_bootstrap(a: Sequence[float] | Array, b: Sequence[float] | Array, seed: int = 0) -> Estimate:
    """mean(b) - mean(a) for one number per row, both on the same rows."""
    return paired_difference(mean_statistic("mean", a), mean_statistic("mean", b), seed=seed)


def _weights(n: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn, `[R, n]` at a time, `NUM_REPLICATES` in all."""
    generator = np.random.default_rng([seed, n])
    part = max(1, min(NUM_REPLICATES, 2_000_000 // n))
    for start in range(0, NUM_REPLICATES, part):
        num = min(part, NUM_REPLICATES - start)
        drawn = generator.integers(n, size=(num, n)) + n * np.arange(num)[:, None]
        yield np.bincount(drawn.ravel(), minlength=num * n).reshape(num, n).astype(np.float64)


def _percentiles(values: Array, n: int) -> tuple[float | None, float | None]:
    """The expanded percentile interval (Hesterberg 2015, 1411.5279, 3.3): tails Φ(-√(n/(n-1)) · t(n-1)) on each side.

    Plain percentiles are too narrow by √((n-1)/n) and by z instead of t; from some hundred rows on they agree.
    """
    from scipy.stats import norm, t

    finite = values[~np.isnan(values)]
    if len(finite) == 0:
        return None, None
    tail = float(norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.5 + CONFIDENCE / 2, n - 1)))
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(finite, [tail, 1 - tail])
    return (None if np.isnan(low) else float(low)), (None if np.isnan(high) else float(high))
