"""The report's part on preferences: how sure the model is, how often it is right, and what scores were shifted by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.report_html import Markup, amount, figure, interval, is_number, section, table, tag

_NUMBERS = ("n", "predicted", "observed")


def preference_section(result: Mapping[str, Any]) -> Markup:
    """Reliability table and plot of held-out pairs, and the calibration; nothing when the run has neither."""
    return section("Can its preferences be trusted?", _reliability(result), _calibration(result))


def _reliability(result: Mapping[str, Any]) -> Markup:
    found = result.get("reliability")
    listed = found.get("bins") if isinstance(found, Mapping) else None
    bins = [entry for entry in listed if _whole(entry)] if isinstance(listed, list) else []
    if not bins or not isinstance(found, Mapping):
        return Markup("")
    rows = [
        (f"{b['n']:,}", amount(b["predicted"]), f"{amount(b['observed'])} {interval(b.get('low'), b.get('high'))}")
        for b in bins
    ]
    note = (
        "Pairs of the held-out rows by how sure the model is, p = sigmoid of the gap between their two scores, equally "
        f"many in each row. Mean distance between p and the share in the right order: {amount(found.get('error'))}."
    )
    drawn = plots.reliability(bins)
    picture = figure(drawn, "How sure the model is, and how often it is right") if drawn else ""
    head = ("pairs", "sure by", "in the right order (95 % interval)")
    return Markup(f"{tag('p', note, 'soft small')}{table(head, rows, numeric=(0, 1))}{picture}")


def _whole(entry: object) -> bool:
    return isinstance(entry, Mapping) and all(is_number(entry.get(name)) for name in _NUMBERS)


def _calibration(result: Mapping[str, Any]) -> Markup:
    found = result.get("calibration")
    if not isinstance(found, Mapping) or not all(is_number(found.get(k)) for k in ("demonstrations", "shift", "mean")):
        return Markup("")
    shift, count = amount(found["shift"]), f"{found['demonstrations']:,}"
    mean = f"{found['mean']:+.0e}"
    return tag("p", f"Scores were shifted by {shift}: {count} demonstrations average {mean}; their order is as it was.")
