"""Curves of a run as SVG, drawn with matplotlib's own objects: no window, no global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 600
BLUE, ORANGE, GREY = "#1f5fa8", "#c2570c", "#9aa4af"


def curve(rows: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], metric: str | None) -> bytes | None:
    """Training loss of each step and, beside it, `metric` on the held-out rows. None when there is nothing to draw."""
    train = points(rows, "loss")
    held = [(step, value) for step, value, _, _ in held_out(evaluations, "loss")]
    other = held_out(evaluations, metric) if metric and metric != "loss" else []
    if not train and not held and not other:
        return None
    with_loss = bool(train or held)
    figure = _figure(9, 3.4)
    axes = figure.subplots(1, int(with_loss) + bool(other), squeeze=False)[0]
    if with_loss:
        _loss(axes[0], train, held)
    if other:
        _metric(axes[-1], other, metric or "")
    return _svg(figure)


def change(before: dict[str, Any], after: dict[str, Any], names: Sequence[str]) -> bytes | None:
    """Before and after with their intervals, one small plot a metric."""
    usable = [n for n in names if _finite(before.get(n)) and _finite(after.get(n))][:4]
    if not usable:
        return None
    figure = _figure(9, 2.6)
    for axis, name in zip(figure.subplots(1, len(usable), squeeze=False)[0], usable, strict=True):
        for x, (entry, colour) in enumerate(((before[name], GREY), (after[name], BLUE))):
            value = entry["value"]
            low, high = (entry.get(k) if entry.get(k) is not None else value for k in ("low", "high"))
            if all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)):
                axis.plot([x, x], [low, high], color=colour, linewidth=3, solid_capstyle="butt")
            axis.plot([x], [value], "o", color=colour, markersize=7)
        axis.set_xticks([0, 1], ["before", "after"])
        axis.set_xlim(-0.6, 1.6)
        _dress(axis, name)
    return _svg(figure)


def ways(rows: Sequence[dict[str, Any]], metric: str) -> bytes | None:
    """Every way to tune with its interval, the best on top."""
    usable = [row for row in rows if all(_number(row.get(name)) for name in ("value", "low", "high"))]
    if not usable:
        return None
    figure = _figure(9, 1 + 0.32 * len(usable))
    axes = figure.subplots()
    for y, row in enumerate(reversed(usable)):
        colour = BLUE if y == len(usable) - 1 else GREY
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot([row["value"]], [y], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(usable)), [str(row["name"]) for row in reversed(usable)], parse_math=False)
    _dress(axes, f"{metric}, held out")
    axes.grid(axis="y", alpha=0)
    axes.grid(axis="x", alpha=0.25)
    return _svg(figure)


def reliability(bins: Sequence[dict[str, Any]]) -> bytes | None:
    """Share of pairs in the right order over how sure the model was; on the line it is as sure as it should be."""
    usable = [b for b in bins if all(_number(b.get(name)) for name in ("predicted", "observed", "low", "high"))]
    if not usable:
        return None
    figure = _figure(4.6, 3.6)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], "--", color=GREY, linewidth=1)
    for entry in usable:
        axes.plot([entry["predicted"]] * 2, [entry["low"], entry["high"]], color=BLUE, linewidth=2, alpha=0.5)
    axes.plot([b["predicted"] for b in usable], [b["observed"] for b in usable], "o", color=BLUE, markersize=6)
    axes.set_xlabel("sure by")
    axes.set_ylim(0, 1.03)
    _dress(axes, "share in the right order")
    return _svg(figure)


def trade_off(lines: Sequence[tuple[float, float, float]], kept: float, limit: float, metric: str) -> bytes | None:
    """`metric` over forgetting in percent, a point an evaluation, joined in order; limit and kept one stand out.

    `lines` are (step, forgetting as a share, metric). None when there is nothing to draw.
    """
    usable = [line for line in lines if all(math.isfinite(value) for value in line)]
    if not usable:
        return None
    figure = _figure(5.4, 3.6)
    axes = figure.subplots()
    axes.plot([100 * x for _, x, _ in usable], [y for _, _, y in usable], "o-", color=GREY, linewidth=1, markersize=4)
    axes.axvline(100 * limit, color=ORANGE, linestyle="--", linewidth=1, label="limit")
    chosen = [line for line in usable if line[0] == kept]
    axes.plot([100 * x for _, x, _ in chosen], [y for _, _, y in chosen], "o", color=BLUE, markersize=8, label="kept")
    for step, x, y in (usable[0], usable[-1]):
        axes.annotate(f"step {step:g}", (100 * x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.legend(frameon=False)
    axes.set_xlabel("forgetting, %")
    _dress(axes, f"{metric}, held out")
    return _svg(figure)


def points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has a finite value, at most `MAX_POINTS`: means over equal stretches."""
    found = [(float(r["step"]), float(r[name])) for r in rows if _number(r.get("step")) and _number(r.get(name))]
    stretch = math.ceil(len(found) / MAX_POINTS) if found else 1
    if stretch == 1:
        return found
    parts = [found[i : i + stretch] for i in range(0, len(found), stretch)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def held_out(
    evaluations: Sequence[dict[str, Any]], metric: str
) -> list[tuple[float, float, float | None, float | None]]:
    """(step, value, low, high) of one metric; a plain number has no interval."""
    found = []
    for line in evaluations:
        metrics = line.get("metrics")
        entry = metrics.get(metric) if isinstance(metrics, dict) else None
        entry = entry if isinstance(entry, dict) else {"value": entry}
        step, value = line.get("step"), entry.get("value")
        if _number(step) and _number(value):
            low, high = (float(v) if _number(v) else None for v in (entry.get("low"), entry.get("high")))
            found.append((float(step), float(value), low, high))
    return found


def _loss(axis: Axes, train: list[tuple[float, float]], held: list[tuple[float, float]]) -> None:
    if train:
        axis.plot(*zip(*train, strict=True), color=GREY, linewidth=1, label="training")
    if held:
        axis.plot(*zip(*held, strict=True), "o-", color=BLUE, linewidth=1.5, markersize=4, label="held out")
    axis.legend(frameon=False)
    axis.set_xlabel("step")
    _dress(axis, "loss")


def _metric(axis: Axes, rows: list[tuple[float, float, float | None, float | None]], name: str) -> None:
    steps, values = [r[0] for r in rows], [r[1] for r in rows]
    banded = [r for r in rows if r[2] is not None and r[3] is not None]
    if banded:
        low, high = [r[2] or 0.0 for r in banded], [r[3] or 0.0 for r in banded]
        axis.fill_between([r[0] for r in banded], low, high, color=ORANGE, alpha=0.15, linewidth=0)
    axis.plot(steps, values, "o-", color=ORANGE, linewidth=1.5, markersize=4)
    axis.set_xlabel("step")
    _dress(axis, f"{name}, held out")


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title.replace("_", " "), fontsize=10, loc="left", parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.tick_params(labelsize=8)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, inches. A run begins long before its first plot, so matplotlib is only loaded here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "tunesmith"}):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # a metric's name in a script the font lacks
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(entry: Any) -> bool:
    return isinstance(entry, dict) and _number(entry.get("value"))
