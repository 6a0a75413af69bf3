"""comparison.html: ways to tune side by side on one self-contained page, made of comparison.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.compare import number
from tunesmith.evaluate.report_html import (
    Markup,
    amount,
    duration,
    esc,
    figure,
    interval,
    join,
    page,
    section,
    size,
    table,
    tag,
)
from tunesmith.recipe_metrics import lower_is_better

Json = Mapping[str, Any]


def render_comparison(found: Json, title: str) -> str:
    """The page: the recommendation first, then the table, the test rows, and models that were only asked."""
    head = Markup(f"<header><h1>{esc(title)}</h1><p class='soft'>{esc(_what(found))}</p></header>")
    parts = [head, _recommended(found), _table(found), _test(found), _untuned(found), _missing(found)]
    return page(f"{title}: tunesmith comparison", join(parts))


def _what(found: Json) -> str:
    rows = found["rows"]
    best = "lower" if lower_is_better(found["metric"]) else "higher"
    runs = f"{len(rows)} ways to tune, {sum(row['seeds'] for row in rows)} runs in {duration(found['seconds'])}"
    metric = f"{found['metric'].replace('_', ' ')} ({best} is better)"
    return f"{runs}; judged by {metric} on {rows[0]['n']:,} held-out rows"


def _recommended(found: Json) -> Markup:
    lines = [tag("strong", f"Recommended: {found['best']}"), tag("p", found["recommendation"])]
    lines += [tag("p", found["untuned"]["claim"])] if found.get("untuned") and found["untuned"]["claim"] else []
    return Markup(f'<div class="verdict better" role="status">{join(lines)}</div>')


def _valued(entry: Json | None, *, sign: bool = False) -> Markup:
    if entry is None:
        return esc("–")
    shown = number(float(entry["value"]), sign=True) if sign else amount(entry["value"])
    small = tag("span", interval(entry.get("low"), entry.get("high"), sign=sign), "soft small")
    return Markup(f"{esc(shown)} <br>{small}")


def _table(found: Json) -> Markup:
    head = (
        "way", found["metric"].replace("_", " "), "the best minus it", "sure it is behind", "before", "forgets",
        "trained", "of", "time", "peak memory", "file", "seeds",
    )  # fmt: skip
    rows = [
        (
            row["name"], _valued(row), _valued(row.get("behind"), sign=True),
            f"{100 * row['sure']:.1f} %" if "sure" in row else "–", amount(row["before"]),
            "–" if row["forgetting"] is None else number(row["forgetting"], sign=True),
            f"{row['trainable_parameters']:,}", f"{row['parameters']:,}", duration(row["seconds"]),
            size(row["peak_memory_bytes"]), size(row["file_bytes"]), row["seeds"],
        ) for row in found["rows"]
    ]  # fmt: skip
    unpaired = [row["name"] for row in found["rows"] if row.get("paired") is False]
    note = "In small print: 95 % intervals over rows and seeds. Differences are paired on the same rows. "
    note += "Forgets: change of the loss (nats a token) on text outside the task."
    note += f" Not on the same rows as the best, so compared as independent: {', '.join(unpaired)}." if unpaired else ""
    drawn = plots.ways(found["rows"], found["metric"])
    shown = figure(drawn, "Held-out rows, with 95 % intervals") if drawn else ""
    return section("Ways to tune", table(head, rows, numeric=range(3, 12)), tag("p", note, "soft small"), shown)


def _test(found: Json) -> Markup:
    test = found.get("test")
    if not test:
        return Markup("")
    rows = [(name.replace("_", " "), _valued(entry), f"{entry['n']:,}") for name, entry in test["metrics"].items()]
    looked = "These rows were measured once, with the winner."
    if test["looks"] > 1:
        looked = f"These rows have been measured with {test['looks']} winners so far: they are no longer untouched."
    return section(f"Test rows: {test['best']}", tag("p", looked), table(("metric", "value", "n"), rows, numeric=(2,)))


def _untuned(found: Json) -> Markup:
    untuned = found.get("untuned")
    if not untuned:
        return Markup("")
    tuned, part = untuned["tuned"], untuned["part"]
    rows: list[tuple[Any, ...]] = [
        (f"{tuned['name']}, tuned", f"{tuned['parameters']:,}", amount(tuned["value"]), "–", "–")
    ]
    rows += [
        (row["name"], f"{row['parameters']:,}", _valued(row), _valued(row["difference"], sign=True),
         "–" if row["prompt_tokens"] is None else f"{row['prompt_tokens']:,.0f}") for row in untuned["rows"]
    ]  # fmt: skip
    head = ("model", "parameters", found["metric"].replace("_", " "), "tuned minus it, paired", "prompt tokens")
    where = "test rows" if part == "test" else "held-out rows"
    return section(f"Against models that were only asked, on the {where}", table(head, rows, numeric=(1, 4)),
                   tag("p", untuned["claim"]) if untuned["claim"] else "")  # fmt: skip


def _missing(found: Json) -> Markup:
    lines = [f"{entry['name']}, seed {entry['seed']}, failed: {entry['why']}" for entry in found["failed"]]
    lines += [f"{name}: left out, the budget was spent" for name in found["left_out"]]
    return section(
        "Not in the table", Markup("<ul>" + "".join(tag("li", line) for line in lines) + "</ul>") if lines else ""
    )
