"""Ratings from 1 to 7 (Likert scale, as InstructGPT's labellers gave them, 2203.02155, 3.5): means, and paired
differences where two systems were rated on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.errors import DataError
from tunesmith.evaluate.compare import MIN_ROWS
from tunesmith.evaluate.intervals import Array, Estimate, mean_interval, wilson

LOWEST, HIGHEST = 1.0, 7.0


@dataclass(frozen=True, slots=True)
class Rating:
    """What one rater gave one answer of a system; `item` names what was answered, None where that is not known."""

    system: str
    rating: float
    item: str | None = None


def mean_ratings(ratings: Sequence[Rating]) -> dict[str, Estimate]:
    """The mean rating of every system, best first, with Student's 95 % interval within 1 to 7; `n` counts items.

    Several ratings of one answer are averaged first, so that each item counts once. 7, 6, 5, 6 is 6 ± 1.30, of which
    4.70 to 7 are possible. `DataError` when there is no rating, or only some of them name their item.
    """
    found = {name: _bounded(list(values.values()), LOWEST, HIGHEST) for name, values in _by_item(ratings).items()}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1].value, pair[0])))


def rating_differences(ratings: Sequence[Rating]) -> list[dict[str, Any]]:
    """`{a, b, value, low, high, n, verdict}`: mean of a minus b over the items rated for both, `a` rated above `b`.

    Two systems without a common item have no such row. The verdict is "better" or "worse" where the 95 % interval
    leaves out 0 and at least 5 items were compared.
    """
    by_item, names, span = _by_item(ratings), list(mean_ratings(ratings)), HIGHEST - LOWEST
    if any(one.item is None for one in ratings):
        return []
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = [item for item in by_item[a] if item in by_item[b]]
            if both:
                change = _bounded([by_item[a][item] - by_item[b][item] for item in both], -span, span)
                rows.append({"a": a, "b": b, **change.as_json(), "verdict": _verdict(change)})
    return rows


def _verdict(change: Estimate) -> str:
    if change.n < MIN_ROWS or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "no measurable difference"
    return "better" if change.value > 0 else "worse"


def _by_item(ratings: Sequence[Rating]) -> dict[str, Mapping[str | int, float]]:
    """system -> item -> mean of its ratings; a rating without item is an item of its own."""
    if not ratings:
        raise DataError("there is no rating")
    without = sum(one.item is None for one in ratings)
    if 0 < without < len(ratings):
        raise DataError(f"{without:,} of {len(ratings):,} ratings do not name their `item`; name it in all rows, or in "
                        "none")  # fmt: skip
    found: dict[str, dict[str | int, list[float]]] = {}
    for number, one in enumerate(ratings):
        found.setdefault(one.system, {}).setdefault(number if one.item is None else one.item, []).append(one.rating)
    return {name: {item: float(np.mean(values)) for item, values in items.items()} for name, items in found.items()}


def _bounded(values: Sequence[float] | Array, low: float, high: float) -> Estimate:
    """Mean and Student's interval, no wider than the scale. Values that are all alike say little of their spread:
    there it is Wilson's, for the share of the way from `low` to `high`."""
    found = mean_interval(values)
    if found.low is None or found.high is None:
        return found
    if np.ptp(values) > 0:
        return Estimate(found.value, max(low, found.low), min(high, found.high), found.n)
    share = wilson((found.value - low) / (high - low) * found.n, found.n)
    assert share.low is not None and share.high is not None, "there are two values"
    return Estimate(found.value, low + (high - low) * share.low, low + (high - low) * share.high, found.n)
