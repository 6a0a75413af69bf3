"""The pre-flight page as lines of text: what stands on it is in the mapping of `stages.beforehand`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

Page = Mapping[str, Any]
_MOST_LABELS = 12
STATES = {"passed": "ok", "failed": "REFUSED", "allowed": "passed knowingly"}


class Painted(str):
    """A line of which some parts have a style; as a plain string it is the line without styles."""

    __slots__ = ("parts",)
    parts: tuple[tuple[str, str], ...]

    def __new__(cls, *parts: tuple[str, str]) -> Painted:
        """`parts` are (style, text)."""
        made = super().__new__(cls, "".join(text for _, text in parts))
        made.parts = parts
        return made


def page_lines(page: Page, *, rows: int = 3, width: int = 400) -> list[str]:
    """The whole page; `rows` first rows, each of their parts at most `width` characters long."""
    shown = [line for row in page["first_rows"][:rows] for line in row_lines(row, width)]
    return [
        *_facts(page),
        "",
        "first rows, token by token (+ trained on, | not)",
        *shown,
        "",
        *gate_lines(page["gates"]),
    ]


def fact_pairs(page: Page) -> list[tuple[str, str]]:
    """(what, figure) of everything but the gates and the first rows."""
    return [*_sizes(page), *_shares(page), *_lengths(page), *_found(page), *_cost(page)]


def _facts(page: Page) -> list[str]:
    pairs = fact_pairs(page)
    wide = max(len(name) for name, _ in pairs)
    return [f"{name.ljust(wide)}  {text}" for name, text in pairs]


def _sizes(page: Page) -> Iterator[tuple[str, str]]:
    for name, entry in page["sets"].items():
        yield name, f"{entry['rows']:,} rows, {entry['tokens']:,} tokens"


def _shares(page: Page) -> Iterator[tuple[str, str]]:
    figures = page["figures"]
    if figures["trained_share"] is not None:
        yield "trained on", f"{share(figures['trained_share'])} of the tokens"
    if figures["end_tokens"] is not None:
        ends = ", ".join(page["end_tokens"]) or "the tokenizer has none"
        yield "end tokens", f"{share(figures['end_tokens'])} of the answers end with one ({ends})"
    yield "unknown", f"{share(figures['unknown_tokens'])} of the tokens"
    if page["balance"]:
        named = [f"{name} {share(entry['share'])}" for name, entry in list(page["balance"].items())[:_MOST_LABELS]]
        more = f" and {len(page['balance']) - _MOST_LABELS} more" if len(page["balance"]) > _MOST_LABELS else ""
        yield "labels", ", ".join(named) + more


def _lengths(page: Page) -> Iterator[tuple[str, str]]:
    yield "lengths", ", ".join(f"{name} {value:,}" for name, value in page["lengths"].items()) + " tokens"
    kept = "; ".join(
        f"{limit['max_length']:,} keeps {limit['share']:.0%} whole and cuts {share(limit['tokens_cut'])} of the tokens"
        for limit in page["limits"]
    )
    yield "a limit of", kept
    if page["cut"]:
        cut = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in page["cut"].items())
        yield "cut here", f"at {page['max_length']:,} tokens: {cut}"


def _found(page: Page) -> Iterator[tuple[str, str]]:
    twice = page["duplicates"]
    seen = "" if twice["looked_at"] == twice["of"] else f" (the first {twice['looked_at']:,} rows looked at)"
    yield (
        "duplicates",
        f"{twice['exact']:,} exact, {twice['folded']:,} but for case and space, {twice['near']:,} near{seen}",
    )
    if "held-out" in page["sets"] or "test" in page["sets"]:
        yield "in both", f"{page['overlap']:,} held-out rows also stand in training"
    yield "contradictions", f"{page['conflicts']:,} rows"
    trip = page["round_trip"]
    lost = "" if trip["example"] is None else f"; {trip['example'][0]!r} comes back as {trip['example'][1]!r}"
    yield "round trip", f"{trip['same']} of the first {trip['rows']} texts come back to the letter{lost}"
    yield "template", "; ".join(page["template"])


def _cost(page: Page) -> Iterator[tuple[str, str]]:
    steps = page["steps"]
    yield "steps", f"{steps['steps']:,} of about {steps['tokens_per_step']:,.0f} tokens"
    if page.get("features"):
        yield "features", f"{size(page['features'])} kept after one pass of the frozen body over all rows"
    memory = page["memory"]
    held = f"{size(memory['held'])} for weights, gradients and optimizer of {size(memory['room'])} there are"
    plan = page.get("plan")
    if plan is None:
        yield "plan", f"at least {held}; `tunesmith plan RECIPE` has the rest"
        return
    fits = "fits" if plan["fits"] else "does NOT fit"
    yield "plan", f"peak {size(plan['peak'])} {fits} in {size(memory['room'])}; about {seconds(plan['seconds'])}"


def row_lines(row: Mapping[str, Any], width: int) -> list[str]:
    """A row, one line for each part that has one author: `+ assistant  |fi|ne|`."""
    label = "" if row["label"] is None else f", label {row['label']}"
    lines: list[str] = [f"{row['origin']}, {row['num_tokens']:,} tokens{label}"]
    for (mark, author), tokens in groupby(row["tokens"], key=_part):
        text = "|".join(shown(token["text"]) for token in tokens if token["text"])
        text = text if len(text) <= width else f"{text[: width - 2]} …"
        lines.append(Painted(("", f"  {mark} "), ("soft", author.ljust(10)), ("", " "), (_style(mark, author), text)))
    if row["left_out"]:
        lines.append(f"    ({row['left_out']:,} tokens between its beginning and its end are not shown)")
    return lines


def _part(token: Mapping[str, Any]) -> tuple[str, str]:
    return "+" if token["trained"] else "|", "end token" if token["end"] else token["author"]


def _style(mark: str, author: str) -> str:
    """The style of a part; `trained` and `end` are for what is learned."""
    if mark == "+":
        return "end" if author == "end token" else "trained"
    return author if author in ("user", "system", "tool") else "soft"


def gate_lines(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for all gates that are passed, one for each of the others."""
    passed = [gate["gate"] for gate in gates if gate["state"] == "passed"]
    lines: list[str] = [f"gates passed: {', '.join(passed)}"] if passed else []
    for gate in gates:
        if gate["state"] != "passed":
            style = "bad" if gate["state"] == "failed" else "warn"
            lines.append(Painted((style, f"{STATES[gate['state']]}: "), ("", f"{gate['gate']}: {gate['text']}")))
    return lines


def shown(text: str) -> str:
    """A token's text on one line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def share(value: float) -> str:
    """`12.5 %`; never a rounded 0 or 100."""
    text = f"{100 * value:.2g}" if value < 0.1 else f"{100 * value:.4g}" if value > 0.999 else f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')} %"


def size(num_bytes: float) -> str:
    """`1.20 GB`, `34.1 MB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def seconds(value: float) -> str:
    """`42 s`, `3 min`, `2.5 h`."""
    if value < 90:
        return f"{max(value, 1):.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
