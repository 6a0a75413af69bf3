"""report.html of a chain: the lineage, what each stage did, to the tasks before it too, and what it cost outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluate.compare import NO_CHANGE, number
from tunesmith.evaluate.lineage import tax, tree
from tunesmith.evaluate.report_html import (
    Markup,
    amount,
    duration,
    esc,
    interval,
    is_number,
    join,
    page,
    section,
    table,
    tag,
)
from tunesmith.evaluate.run_files import as_number, read_run
from tunesmith.rundir import LAYOUT, RunDir, write_whole

MAX_SAMPLES = 5
MAX_TEXT = 2000
Json = Mapping[str, Any]


def write_chain_report(folder: Path) -> Path:
    """Write `report.html` in the chain's folder from lineage.json and the stages' files; `RunError` without them."""
    lineage = RunDir(folder).read_json("lineage")
    if not isinstance(lineage, dict) or not {"stages", "tasks", "roots", "problems"} <= set(lineage):
        raise RunError(f"{folder / LAYOUT['lineage']} is damaged; go on with `tunesmith train --resume {folder}`")
    target = folder / LAYOUT["report"]
    write_whole(target, render(lineage, folder))
    return target


def render(lineage: Json, folder: Path) -> str:
    """The page: what came out, the lineage, then stage by stage."""
    stages = lineage["stages"]
    names = " → ".join(str(stage["stage"]) for stage in stages)
    bases = ", ".join(str(root["base"]) for root in lineage["roots"])
    under = tag("p", f"chain {names} from {bases}", "soft")
    body = join(
        [
            Markup(f"<header>{tag('h1', lineage['chain'])}{under}</header>"),
            _head(stages, lineage["problems"]),
            section("Lineage", tag("pre", "\n".join(tree(lineage)))),
            section("Each stage on its own task", _stages_table(stages)),
            section("The tasks of earlier stages, after each stage", *_tasks(lineage["tasks"], stages)),
            section("Alignment tax: text outside the task", _tax_table(stages), _tax_note(stages)),
            _samples(folder, stages),
            section("Hand-offs", _handoffs(stages)),
        ]
    )
    return page(f"{lineage['chain']}: tunesmith chain", body)


def _head(stages: Sequence[Json], problems: Sequence[str]) -> Markup:
    """The last stage's verdict, then every stage's in one line; broken links first of all."""
    last = stages[-1]
    judged = last["own_task"].get("judged") or NO_CHANGE
    css = "worse" if problems else ("flat" if judged == NO_CHANGE else judged)
    head = "The lineage is broken" if problems else f"{last['name']}: {judged}"
    lines = [*problems, *(f"{stage['name']}: {stage['own_task']['verdict']}" for stage in stages)]
    lines += [f"{stage['name']}: {note}." for stage in stages for note in stage["notes"]]
    inner = join([tag("strong", head), *(tag("p", line) for line in lines)])
    return Markup(f'<div class="verdict {css}" role="status">{inner}</div>')


def _stages_table(stages: Sequence[Json]) -> Markup:
    rows = []
    for stage in stages:
        own = stage["own_task"]
        rows.append(
            (
                stage["name"],
                stage["method"],
                str(own["metric"] or "–").replace("_", " "),
                _cell(own["before"]),
                _cell(own["after"]),
                tag("span", own.get("judged") or "–", _css(own.get("judged"))),
                duration(stage["seconds"]) if is_number(stage["seconds"]) else "–",
                "taken over" if stage["cached"] else "trained",
            )
        )
    return table(("stage", "method", "metric", "before", "after", "verdict", "time", "this time"), rows)


def _css(judged: Any) -> str:
    return "flat" if judged in (None, NO_CHANGE) else str(judged)


def _cell(entry: Any) -> Markup:
    if not isinstance(entry, Mapping):
        return esc("–")
    small = tag("span", interval(entry.get("low"), entry.get("high")), "soft small")
    return Markup(f"{esc(amount(entry.get('value')))} <br>{small}")


def _tasks(tasks: Sequence[Json], stages: Sequence[Json]) -> list[Markup]:
    """One row a task and metric, one column a stage; nothing where no later stage could be asked."""
    asked = {row["task"] for row in tasks if len(row["after"]) > 1}
    rows = [
        (row["task"], str(row["metric"]).replace("_", " "), _cell(row["before"]),
         *(_cell(row["after"].get(stage["name"])) for stage in stages))
        for row in tasks
        if row["task"] in asked
    ]  # fmt: skip
    if not rows:
        return []
    head = ("task of", "metric", "before its stage", *(f"after {stage['name']}" for stage in stages))
    note = "A dash: not asked, since the model of that stage is of another kind or stands on another line."
    return [table(head, rows), tag("p", note, "soft small")]


def _tax_table(stages: Sequence[Json]) -> Markup:
    rows = []
    for stage in stages:
        probe = stage["probe"]
        if not probe:
            rows.append((stage["name"], "–", "–", "not measured: its model gives no text", "–"))
            continue
        since = probe.get("since_base")
        rows.append(
            (
                stage["name"],
                amount(probe["before"]),
                amount(probe["after"]),
                tag("span", tax(probe), _css(probe["verdict"])),
                number(as_number(since), sign=True) if is_number(since) else "–",
            )
        )
    return table(("stage", "before", "after", "this stage", "since the plain base"), rows, numeric=(1, 2, 4))


def _tax_note(stages: Sequence[Json]) -> Markup:
    if not any(stage["probe"] for stage in stages):
        return Markup("")
    return tag("p", "The same text for every stage. Positive is forgetting, negative is gain.", "soft small")


def _samples(folder: Path, stages: Sequence[Json]) -> Markup:
    parts: list[Markup] = []
    for stage in stages:
        lines = read_run(folder / stage["name"]).samples[:MAX_SAMPLES]
        if lines:
            parts += [tag("h3", stage["name"]), *(_sample(line) for line in lines)]
    return section("The same prompts, before and after each stage", *parts)


def _sample(line: Json) -> Markup:
    def block(label: str, value: Any) -> str:
        return f"<div>{tag('div', label, 'label')}{tag('div', str(value or '')[:MAX_TEXT], 'text')}</div>"

    pair = f'<div class="two">{block("before", line.get("before"))}{block("after", line.get("after"))}</div>'
    return Markup(f'<div class="sample">{block("prompt", line.get("prompt"))}{pair}</div>')


def _handoffs(stages: Sequence[Json]) -> Markup:
    rows = []
    for stage in stages:
        start = stage["starts_from"]
        rows.append(
            (
                stage["name"],
                start["stage"] or start["base"],
                start["how"],
                str(start["content"])[:16],
                str(start["tokenizer"])[:16],
                start["template"] or "the tokenizer's own",
                ", ".join(f"{r['stage']} [{str(r['content'])[:12]}]" for r in stage["rewards"]) or "–",
                str(stage["gives"])[:16],
            )
        )
    head = ("stage", "starts from", "as", "content", "tokenizer", "prompt template", "reward", "gives")
    return table(head, rows)
