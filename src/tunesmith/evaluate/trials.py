"""Trials of a comparison side by side: means over seeds, paired differences on the same rows, a recommendation, and
what a small tuned model does against a larger untuned one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.evaluate.compare import judge, main_metric, number
from tunesmith.evaluate.intervals import Estimate, Statistic, paired_difference, ratio
from tunesmith.recipe_metrics import lower_is_better

Json = dict[str, Any]
SURE = 0.95
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Rows:
    """One metric of a model row by row: `values [n, 2]`, a sum and what it is divided by, and where each row stands."""

    values: np.ndarray
    origins: tuple[str, ...]

    def fits(self, other: Rows) -> bool:
        """True when both are of the same rows."""
        return self.origins == other.origins and self.values.shape == other.values.shape


def rows_of(kept: Mapping[str, Any] | None, part: str, metric: str) -> Rows | None:
    """The rows of `metric` in a measurement that a run keeps (after.json); None where it is no mean over rows."""
    found = (kept or {}).get(part)
    values = None if found is None else found["rows"].get(metric)
    if not values or len(values[0]) != 2:
        return None
    places = (kept or {}).get("origins", {}).get(part, ())
    origins = tuple(place.replace("\\", "/").rpartition("/")[2] for place in places)
    return Rows(np.asarray([[float(v) for v in row] for row in values]), origins[: len(values)])


def mean_rows(parts: Sequence[Rows | None]) -> Rows | None:
    """Several seeds' rows as one model's; None unless all are of the same rows."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or not all(known[0].fits(part) for part in known):
        return None
    return Rows(np.sum([part.values for part in known], axis=0), known[0].origins)


def difference(a: Rows | None, b: Rows | None, *, spread: float = 0.0) -> Estimate | None:
    """a - b on the same rows with its paired 95 % interval, `spread` (a standard error, over seeds) added in squares.

    None when they are not of the same rows.
    """
    if a is None or b is None or not a.fits(b):
        return None
    change = paired_difference(Statistic("metric", b.values, ratio), Statistic("metric", a.values, ratio))
    if change.low is None or change.high is None or not spread:
        return change
    low, high = (math.hypot(end, _Z * spread) for end in (change.value - change.low, change.high - change.value))
    return Estimate(change.value, change.value - low, change.value + high, change.n)


def trial_row(name: str, results: Sequence[Json], kept: Sequence[Json | None] = ()) -> Json:
    """Means over the seeds; the interval holds both what differs between rows and what differs between seeds."""
    metric = main_metric(results[0]["after"])
    assert metric is not None, "a run with held-out rows has metrics"
    entries = [result["after"][metric] for result in results]
    values = [entry["value"] for entry in entries]
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    error = math.sqrt(statistics.fmean(_error(entry) ** 2 for entry in entries) + spread**2)
    value = statistics.fmean(values)
    forgetting = [
        r["probe"]["after"]["loss"]["value"] - r["probe"]["before"]["loss"]["value"] for r in results if "probe" in r
    ]
    return {
        "name": name, "metric": metric, "value": value, "low": value - _Z * error, "high": value + _Z * error,
        "before": statistics.fmean(r["before"][metric]["value"] for r in results), "error": error, "spread": spread,
        "n": entries[0]["n"], "seeds": len(results), "values": values,
        "forgetting": statistics.fmean(forgetting) if forgetting else None,
        "trainable_parameters": results[0]["trainable_parameters"], "parameters": results[0]["total_parameters"],
        "seconds": statistics.fmean(r["seconds"] for r in results),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in results), "file_bytes": results[0]["export_bytes"],
    }  # fmt: skip


def _error(entry: Mapping[str, Any]) -> float:
    if entry["low"] is None or entry["high"] is None:
        return 0.0
    return (entry["high"] - entry["low"]) / (2 * _Z)


def rank(rows: list[Json], held_out: Mapping[str, Rows | None]) -> list[Json]:
    """The rows, best first, each with `behind`: the best minus it on the same rows, and how sure the best is better."""
    rows = sorted(rows, key=lambda row: row["value"], reverse=not lower_is_better(rows[0]["metric"]))
    best = rows[0]
    for row in rows[1:]:
        spread = math.hypot(best["spread"], row["spread"])
        change = difference(held_out.get(best["name"]), held_out.get(row["name"]), spread=spread)
        row["paired"] = change is not None
        row["behind"] = (change or _unpaired(best, row)).as_json()
        row["sure"] = _chance(row["behind"])
    return rows


def _unpaired(best: Json, other: Json) -> Estimate:
    """As of two independent measurements: on the same rows the real one is surer, never less sure."""
    gap, error = best["value"] - other["value"], math.hypot(best["error"], other["error"])
    return Estimate(gap, gap - _Z * error, gap + _Z * error, min(best["n"], other["n"]))


def _chance(behind: Mapping[str, Any]) -> float:
    """The chance that the best is better, its lead taken as normal."""
    gap, error = abs(behind["value"]), _error(behind)
    if error == 0.0:
        return 1.0 if gap else 0.5
    return 0.5 * (1.0 + math.erf(gap / error / math.sqrt(2.0)))


def recommend(rows: Sequence[Json]) -> str:
    """The best by the held-out rows and how sure that is; of what cannot be told apart from it, the cheapest."""
    best, metric = rows[0], str(rows[0]["metric"]).replace("_", " ")
    shown = f"{best['name']}: {metric} {best['value']:.4f}"
    if len(rows) == 1:
        return f"{shown}, the only one that was tried"
    close = [row for row in rows[1:] if row["sure"] < SURE]
    if not close:
        least = min(row["sure"] for row in rows[1:])
        return f"{shown}, better than all others ({_percent(least)} sure at the least)"
    cheapest = min([best, *close], key=lambda row: (row["trainable_parameters"], row["seconds"]))
    told = ", ".join(f"{row['name']} ({_percent(row['sure'])} sure that it is behind)" for row in close)
    told = f"{shown}, not told apart from {told}"
    if cheapest is best:
        return f"{told}; it is also the one that trains least, so take it"
    return f"{told}; {cheapest['name']} trains {cheapest['trainable_parameters']:,} parameters and may do as well"


def _percent(share: float) -> str:
    return "over 99.9 %" if share > 0.999 else f"{100 * share:.3g} %"


def claim(metric: str, tuned: Json, untuned: Sequence[Json]) -> str:
    """What the tuned model shows against larger ones that were only asked.

    `tuned` is `{name, parameters, value}`, each of `untuned` `{name, parameters, value, difference}`, the difference
    being tuned - untuned on the same rows. That it beats one is said only where the interval leaves out 0.
    """
    larger = [u for u in untuned if u["parameters"] > tuned["parameters"] and u["difference"] is not None]
    if not larger:
        return ""
    beaten = [u for u in larger if _verdict(metric, u) == "better"]
    name = metric.replace("_", " ")
    if not beaten:
        return (f"That {tuned['name']} ({tuned['parameters']:,} parameters) beats a larger untuned model is not shown: "
                "no paired 95 % interval leaves out 0 in its favour.")  # fmt: skip
    told = "; ".join(
        f"{u['name']} ({u['parameters']:,}) has {number(u['value'])}, difference "
        f"{number(u['difference']['value'], sign=True)}, 95 % interval {number(u['difference']['low'], sign=True)} to "
        f"{number(u['difference']['high'], sign=True)}, n = {u['difference']['n']:,}"
        for u in beaten
    )
    rest = [u["name"] for u in larger if u not in beaten]
    also = f" Not shown against: {', '.join(rest)}." if rest else ""
    return (f"A small tuned model beats a larger untuned one: {tuned['name']} ({tuned['parameters']:,} parameters) has "
            f"{name} {number(tuned['value'])}; {told}.{also}")  # fmt: skip


def _verdict(metric: str, entry: Mapping[str, Any]) -> str:
    change = entry["difference"]
    return judge(metric, Estimate(change["value"], change["low"], change["high"], change["n"]))
