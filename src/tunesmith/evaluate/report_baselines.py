"""The tuned model beside simple systems, in one table: values, paired differences, tokens of a request, and whether
tuning was worth it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluate.baselines import rivals_of
from tunesmith.evaluate.compare import NO_CHANGE, number
from tunesmith.evaluate.report_html import Markup, amount, esc, interval, is_number, join, table, tag
from tunesmith.evaluate.run_files import estimates

MAX_METRICS = 3


def baseline_table(source: Mapping[str, Any], preferred: str | None = None) -> tuple[list[str], list[list[Any]]]:
    """(head, rows) of text and estimates: the tuned model first, then its base, then every baseline.

    A row is the system, its metrics, tuned minus the system, what that says of the tuned model, tokens a request reads
    and n. `source` is a result, or its `test` part. Empty without baselines.
    """
    found = source.get("baselines")
    baselines = {str(k): v for k, v in found.items() if isinstance(v, Mapping)} if isinstance(found, Mapping) else {}
    after, before = estimates(source.get("after")), estimates(source.get("before"))
    metric, rivals = rivals_of(baselines, after, preferred)
    if not baselines:
        return [], []
    shared = [n for n in after if any(n in estimates(entry.get("metrics")) for entry in baselines.values())]
    names = sorted(shared, key=lambda n: (n != metric, shared.index(n)))[:MAX_METRICS]
    verdicts = {rival.title: rival.verdict(metric) for rival in rivals}
    tokens = next(
        (entry["tuned_prompt_tokens"] for entry in baselines.values() if "tuned_prompt_tokens" in entry), None
    )
    count = after.get(metric, {}).get("n")
    rows = [["tuned", *(after.get(n) for n in names), None, "", tokens, count]]
    if before:
        change = estimates(source.get("difference")).get(metric)
        rows.append(["its base before", *(before.get(n) for n in names), change, "", tokens, count])
    for title, entry in baselines.items():
        values = estimates(entry.get("metrics"))
        change = estimates(entry.get("difference")).get(metric)
        n = next((values[name].get("n") for name in names if name in values), None)
        read = entry.get("prompt_tokens")
        rows.append([title, *(values.get(name) for name in names), change, verdicts.get(title, ""), read, n])
    head = ["system", *(n.replace("_", " ") for n in names), "tuned minus it, paired", "tuned is", "prompt tokens", "n"]
    return head, rows


def baselines_section(source: Mapping[str, Any], preferred: str | None = None) -> Markup:
    """The table and the sentence, as HTML; empty without baselines."""
    head, rows = baseline_table(source, preferred)
    if not rows:
        return Markup("")
    body = [[_cell(value, sign=i == len(head) - 4) for i, value in enumerate(row)] for row in rows]
    said = source.get("worth")
    sentence = tag("p", said) if isinstance(said, str) and said else ""
    return join(
        [tag("h3", "Baselines on the same rows"), sentence, table(head, body, numeric=(len(head) - 2, len(head) - 1))]
    )


def _cell(value: Any, *, sign: bool) -> Markup:
    if isinstance(value, Mapping):
        shown = (
            number(float(value["value"]), sign=True) if sign and is_number(value["value"]) else amount(value["value"])
        )
        return Markup(
            f"{esc(shown)} <br>{tag('span', interval(value.get('low'), value.get('high'), sign=sign), 'soft small')}"
        )
    if isinstance(value, str) and value:
        return tag("span", value, "flat" if value == NO_CHANGE else value) if value in _VERDICTS else esc(value)
    return esc("–" if value in (None, "") else f"{value:,.0f}")


_VERDICTS = ("better", "worse", NO_CHANGE)


def baselines_text(source: Mapping[str, Any], preferred: str | None = None) -> tuple[list[str], list[list[str]]]:
    """The same table as plain text, for a card or a terminal."""
    head, rows = baseline_table(source, preferred)
    return head, [[_plain(value, sign=i == len(head) - 4) for i, value in enumerate(row)] for row in rows]


def _plain(value: Any, *, sign: bool) -> str:
    if isinstance(value, Mapping):
        if not is_number(value["value"]):
            return str(value["value"])
        text = number(float(value["value"]), sign=sign)
        low, high = value.get("low"), value.get("high")
        return f"{text} ({interval(low, high, sign=sign)})" if is_number(low) and is_number(high) else text
    if value in (None, ""):
        return "–"
    return value if isinstance(value, str) else f"{value:,.0f}"
