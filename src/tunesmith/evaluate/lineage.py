"""The lineage of a chain: which model came from which, what each stage did to its own task, to the tasks before it and
to text outside all of them. Read from the files of the stages alone; drawn as a tree, checked link by link."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluate.compare import judge, main_metric, number
from tunesmith.evaluate.run_files import as_number, dig, estimate, estimates, read_run
from tunesmith.rundir import LAYOUT

Json = dict[str, Any]
FORMAT = 1
PROBE_METRICS = ("bits_per_byte", "loss")
"""What the alignment tax is told in, the first that was measured."""


def read_lineage(folder: Path, stages: Sequence[str], *, cached: Collection[str] = ()) -> Json:
    """The whole lineage of the chain in `folder`; `cached` are the stages that were taken over from before."""
    entries = [_stage(folder / name, name, name in cached) for name in stages]
    _add_tax(entries)
    roots = [e["starts_from"] for e in entries if e["starts_from"].get("stage") is None]
    return {
        "format": FORMAT,
        "chain": folder.resolve().name,
        "roots": list({r["content"]: {k: r.get(k) for k in ("base", "content", "licence")} for r in roots}.values()),
        "stages": entries,
        "tasks": task_table(entries),
        "problems": broken_links(entries),
    }  # fmt: skip


def _stage(folder: Path, name: str, cached: bool) -> Json:
    run, handoff = read_run(folder), _json(folder / LAYOUT["handoff"])
    preferred = dig(run.recipe, "train.select_by")
    differences = run.differences()
    main = main_metric(differences or estimates(run.result.get("after")), preferred)
    own: Json = {"metric": main, "before": None, "after": None, "verdict": run.text("verdict", otherwise="")}
    if main is not None:
        own |= {when: estimates(run.result.get(when)).get(main) for when in ("before", "after")}
        own["judged"] = differences[main].verdict if main in differences else None
    return {
        "name": name,
        "stage": run.text("stage", otherwise="?"),
        "method": run.text("method", "tune.method", otherwise="?"),
        "key": handoff["key"],
        "starts_from": handoff["starts_from"],
        "rewards": handoff["rewards"],
        "gives": handoff.get("gives"),
        "notes": handoff["notes"],
        "cached": cached,
        "own_task": own,
        "metrics": {when: estimates(run.result.get(when)) for when in ("before", "after")},
        "probe": _probe(run.result.get("probe")),
        "earlier_tasks": _json(folder / LAYOUT["earlier"], otherwise={}).get("metrics", {}),
        "trainable_parameters": run.result.get("trainable_parameters"),
        "seconds": run.result.get("seconds"),
    }


def _probe(part: Any) -> Json | None:
    """The fixed text outside the task: before, after and the signed difference, or None where it was not measured."""
    change = estimates(dig(part, "difference"))
    metric = next((name for name in PROBE_METRICS if name in change), None)
    if metric is None:
        return None
    before, after = (estimates(part[when]).get(metric, {}).get("value") for when in ("before", "after"))
    verdict = judge(metric, estimate(change[metric]))
    return {"metric": metric, "before": before, "after": after, "change": change[metric], "verdict": verdict}


def _add_tax(entries: Sequence[Json]) -> None:
    """The same probe from the plain base to each stage: what the chain has cost so far."""
    by_name = {entry["name"]: entry for entry in entries}
    for entry in entries:
        line = [entry]
        while (parent := line[0]["starts_from"].get("stage")) in by_name:
            line.insert(0, by_name[parent])
        first = next((e["probe"] for e in line if e["probe"]), None)
        if entry["probe"] and first and first["metric"] == entry["probe"]["metric"]:
            change = as_number(entry["probe"]["after"]) - as_number(first["before"])
            entry["probe"]["since_base"] = change


def task_table(entries: Sequence[Json]) -> list[Json]:
    """One row per task and metric: its value before its own stage, after it, and after each later stage asked."""
    rows = []
    for entry in entries:
        for metric, before in entry["metrics"]["before"].items():
            values: Json = {}
            if metric in entry["metrics"]["after"]:
                values[entry["name"]] = entry["metrics"]["after"][metric]
            for later in entries:
                found = estimates(later["earlier_tasks"].get(entry["name"]))
                if metric in found:
                    values[later["name"]] = found[metric]
            rows.append({"task": entry["name"], "metric": metric, "before": before, "after": values})
    return rows


def broken_links(entries: Sequence[Json]) -> list[str]:
    """Every stage whose start, or whose reward, is not what the stage it names has given; empty when all links hold."""
    given = {entry["name"]: entry["gives"] for entry in entries}
    problems = []
    for entry in entries:
        links = [entry["starts_from"]] if entry["starts_from"].get("stage") is not None else []
        for link in [*links, *entry["rewards"]]:
            if given.get(link["stage"]) != link["content"]:
                problems.append(
                    f"{entry['name']} was made from {link['stage']} with content {str(link['content'])[:12]}, which is "
                    f"now {str(given.get(link['stage']))[:12]}"
                )
    return problems


def tree(lineage: Mapping[str, Any]) -> list[str]:
    """The lineage as lines: bases at the left, every stage under the one it started from."""
    lines = [str(lineage["chain"])]
    for root in lineage["roots"]:
        lines.append(f"{root['base']}  [{str(root['content'])[:12]}]")
        children = [s for s in lineage["stages"] if _starts(s, None) and s["starts_from"]["content"] == root["content"]]
        lines += _branch(children, lineage["stages"], "")
    lines += [f"broken: {problem}" for problem in lineage["problems"]]
    return lines


def _starts(stage: Mapping[str, Any], parent: str | None) -> bool:
    return stage["starts_from"].get("stage") == parent


def _branch(children: Sequence[Json], stages: Sequence[Json], indent: str) -> list[str]:
    lines: list[str] = []
    for i, child in enumerate(children):
        last = i == len(children) - 1
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{_line(child)}")
        below = [stage for stage in stages if _starts(stage, child["name"])]
        lines += _branch(below, stages, indent + ("   " if last else "│  "))
    return lines


def _line(stage: Mapping[str, Any]) -> str:
    parts = [f"{stage['name']}  {stage['method']}  [{str(stage['gives'])[:12]}]"]
    if stage["rewards"]:
        parts.append(
            ("paid by " if stage["stage"] in ("ppo", "grpo") else "judged by ")
            + ", ".join(str(reward["stage"]) for reward in stage["rewards"])
        )
    own, probe = stage["own_task"], stage["probe"]
    if own["before"] and own["after"]:
        values = " -> ".join(number(as_number(own[when]["value"])) for when in ("before", "after"))
        parts.append(
            f"{own['metric'].replace('_', ' ')} {values}" + (f" ({own['judged']})" if own.get("judged") else "")
        )
    if probe:
        parts.append(f"outside the task {tax(probe)}")
    parts += ["cached"] if stage["cached"] else []
    return "  ".join([*parts, *(f"({note})" for note in stage["notes"])])


def tax(probe: Mapping[str, Any]) -> str:
    """The signed number: `+0.0312 bits per byte (worse)`; positive is forgetting."""
    value = number(as_number(probe["change"]["value"]), sign=True)
    return f"{value} {str(probe['metric']).replace('_', ' ')} ({probe['verdict']})"


def _json(path: Path, *, otherwise: Any = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if otherwise is not None:
            return otherwise
        raise RunError(f"{path} is missing: this stage was not made by a chain") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
