"""The pre-flight page as one self-contained file: what `tunesmith check RECIPE --html FILE` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluate.report_html import Markup, esc, join, page, section, table, tag
from tunesmith.plan.page import STATES, fact_pairs, share, shown

MAX_NOTES = 50
AUTHORS = ("user", "system", "tool", "assistant")
STYLE = Markup(
    "<style>.row{line-height:2}.t{padding:.1rem .05rem;border-radius:3px;box-shadow:inset -1px 0 var(--line)}"
    ".on{background:#2e9e5b33}.end{outline:2px solid var(--good)}.user{color:#1660a8}.system{color:#8a3ba8}"
    ".tool{color:#a8560f}.template{color:var(--soft)}@media(prefers-color-scheme:dark){.user{color:#7db8f0}"
    ".system{color:#d49be8}.tool{color:#f0b27d}}</style>"
)


def render_page(found: Mapping[str, Any]) -> str:
    """The page of what `check` found: of a recipe, or of every stage of a chain one after another."""
    stages = found.get("chain", {"": found})
    parts = [part for name, stage in stages.items() for part in _stage(name, stage)]
    return page("tunesmith: before the run", join([STYLE, *parts]))


def _stage(name: str, found: Mapping[str, Any]) -> list[Markup]:
    look = found["preflight"]
    title = f"{name + ': ' if name else ''}{found['stage']} from {dict(found['base'])['name']}"
    trained = f"{found['trainable_parameters']:,} of {found['total_parameters']:,} parameters train"
    notes = Markup("<ul>" + "".join(tag("li", note) for note in found["notes"][:MAX_NOTES]) + "</ul>")
    return [
        Markup(f"<header><h1>{esc(title)}</h1><p class='soft'>{esc(trained)}</p></header>"),
        section("Gates", _gates(look["gates"])),
        section("First rows, token by token", _legend(), *(_row(row) for row in look["first_rows"])),
        section("Figures", table(("what", "value"), fact_pairs(look))),
        section("What a limit on the length would cost", _limits(look["limits"])),
        section("Labels", _balance(look["balance"])),
        section("Noticed", notes if found["notes"] else ""),
    ]


def _gates(gates: Any) -> Markup:
    css = {"passed": "better", "failed": "worse", "allowed": "flat"}
    rows = [(g["gate"], tag("span", STATES[g["state"]], css[g["state"]]), g["text"]) for g in gates]
    return table(("gate", "", "what was found"), rows)


def _legend() -> Markup:
    words = [tag("span", "trained on", "t on"), tag("span", "end token", "t end")]
    words += [tag("span", author, author) for author in (*AUTHORS[:3], "template")]
    return Markup(f"<p class='small'>{' '.join(words)}</p>")


def _row(row: Mapping[str, Any]) -> Markup:
    label = "" if row["label"] is None else f", label {row['label']}"
    head = f"{row['origin']}: {row['num_tokens']:,} tokens{label}"
    gap = f", {row['left_out']:,} of them, between its beginning and its end, not shown" if row["left_out"] else ""
    tokens = "".join(_token(token) for token in row["tokens"] if token["text"])
    return Markup(f'<div class="sample">{tag("div", head + gap, "label")}<div class="row text">{tokens}</div></div>')


def _token(token: Mapping[str, Any]) -> Markup:
    css = ["t", *(["on"] if token["trained"] else []), *(["end"] if token["end"] else [])]
    css += [token["author"]] if token["author"] in (*AUTHORS, "template") else []
    return tag("span", shown(token["text"]), " ".join(css))


def _limits(limits: Any) -> Markup:
    rows = [(f"{row['max_length']:,}", f"{row['share']:.0%}", share(row["tokens_cut"])) for row in limits]
    return table(("data.max_length", "rows kept whole", "of all tokens cut"), rows, numeric=(0, 1, 2))


def _balance(balance: Mapping[str, Any] | None) -> Markup:
    rows = [(name, f"{entry['count']:,}", share(entry["share"])) for name, entry in (balance or {}).items()]
    return table(("label", "rows", "share"), rows, numeric=(1, 2)) if rows else Markup("")
