"""model_card.md: what a stranger needs to use the model and to doubt it. A field nobody stated says so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.evaluate.compare import NO_CHANGE, number
from tunesmith.evaluate.report import amount_of, knowingly, summary
from tunesmith.evaluate.report_baselines import baselines_text
from tunesmith.evaluate.report_html import amount, clean, duration, is_number, size
from tunesmith.evaluate.run_files import RunFiles, data_facts, dig, estimates, evaluations_of, flat, read_run
from tunesmith.rundir import LAYOUT, write_whole

UNSTATED = "not stated"
TASKS = {
    "pretrain": "continuing text like the data below",
    "mlm": "filling in masked words, and as a base for further tuning",
    "sft": "answering prompts like those of the data below",
    "classify": "labelling text like that of the data below",
    "reward": "scoring completions like those of the data below",
}


def write_card(run_dir: Path) -> Path:
    """Write `model_card.md` in the run's folder and return its path. `RunError` when it is no run or not writable."""
    run = read_run(Path(run_dir))
    target = run.path / LAYOUT["card"]
    write_whole(target, render_card(run))
    return target


def render_card(run: RunFiles) -> str:
    """The card as Markdown."""
    parts = [
        f"# {_text(run.text('run', otherwise=run.path.resolve().name))}",
        _origin(run),
        _use(run),
        "## Results\n\n" + _results(run),
        "## Evaluations during training\n\n" + _epochs(run),
        "## Data\n\n" + _listing(data_facts(run) or {"data": UNSTATED}),
        "## Training\n\n" + _training(run),
        "## Settings\n\n" + _listing(flat(run.recipe)),
        "## Versions\n\n" + _listing(flat(run.environment)),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(run: RunFiles) -> str:
    licence = run.text("base.licence", "base.license", otherwise="")
    stated = licence or f"{UNSTATED} by the base; find out before you share or sell anything made from it"
    rows = {
        "base": run.text("base.name", "base", otherwise=UNSTATED),
        "base licence": stated,
        "base hash": run.text("base.hash", "base.fingerprint", "base_hash", otherwise="not recorded"),
        "stage": run.text("stage", otherwise=UNSTATED),
        "method": run.text("tune.method", otherwise=UNSTATED),
        "seed": run.text("seed", otherwise="not recorded"),
    }
    return _listing(rows)


def _use(run: RunFiles) -> str:
    """What it is for, and what it is not known to do."""
    task = TASKS.get(run.text("stage", otherwise=""), "the task of the data below")
    worse = [d.metric.replace("_", " ") for d in run.differences().values() if d.verdict == "worse"]
    flat_ = [d.metric.replace("_", " ") for d in run.differences().values() if d.verdict == NO_CHANGE]
    probe = run.differences("probe")
    limits = [
        "It was evaluated on the held-out rows below alone; other text, languages and lengths are untested.",
        "It keeps the biases and errors of its base and of its data, and may state false things with confidence.",
        "It was not tested for safety. Do not let it decide about people without a person who checks.",
    ]
    limits += [f"It is measurably worse than its base in: {', '.join(worse)}."] if worse else []
    limits += [f"No measurable change against its base in: {', '.join(flat_)}."] if flat_ else []
    limits += [f"Text outside the task: {d.text}." for d in list(probe.values())[:1]]
    limits += knowingly(run)
    limits += [] if probe else ["What it forgot of its base's abilities was not measured."]
    listed = "\n".join(f"- {_text(limit)}" for limit in limits)
    return f"## Intended use and limits\n\nIntended for {task}.\n\n{listed}"


def _results(run: RunFiles) -> str:
    """Before and after on the same held-out rows, and one sentence a metric."""
    parts = []
    for title, part in (("held out", ""), ("test, used once", "test"), ("probe", "probe")):
        source = dig(run.result, part) if part else run.result
        if isinstance(source, Mapping) and (rows := _metric_rows(source)):
            head = ("metric", "before", "after", "95 % interval after", "n")
            parts.append(f"{title.capitalize()} rows:\n\n{_table(head, rows)}")
            parts += _beside(source, run.main_metric())
    sentences = [f"- {_text(line)}" for line in summary(run)]
    if sentences:
        parts.append("\n".join(sentences))
    return "\n\n".join(parts) or "No evaluation was recorded for this run."


def _beside(source: Mapping[str, Any], preferred: str | None) -> list[str]:
    """Simple systems on the same rows, and whether tuning was worth it."""
    head, rows = baselines_text(source, preferred)
    said = source.get("worth")
    return [_table(head, rows), *([_text(str(said))] if said else [])] if rows else []


def _metric_rows(source: Mapping[str, Any]) -> list[Sequence[str]]:
    before, after = estimates(source.get("before")), estimates(source.get("after"))
    rows = []
    for name, entry in after.items():
        low, high, n = entry.get("low"), entry.get("high"), entry.get("n")
        known = is_number(low) and is_number(high)
        rows.append(
            (
                name,
                amount(before[name]["value"]) if name in before else "not measured",
                amount(entry["value"]),
                f"{number(float(low or 0))} to {number(float(high or 0))}" if known else "too few rows",
                f"{n:,}" if isinstance(n, int) else "not recorded",
            )
        )
    return rows


def _epochs(run: RunFiles) -> str:
    names = list(dict.fromkeys(n for line in run.evaluations for n in estimates(line.get("metrics"))))
    rows = []
    for line in evaluations_of(run) if run.evaluations else ():
        held = estimates(line.get("metrics"))
        values = [amount(held[n]["value"]) if n in held else "–" for n in names]
        rows.append((amount_of(line.get("epoch")), amount_of(line.get("step")), *values))
    return _table(("epoch", "step", *names), rows) if rows else "No evaluation was made during training."


def _training(run: RunFiles) -> str:
    shown = (
        ("trainable parameters", "trainable_parameters", lambda v: f"{v:,}"),
        ("all parameters", "total_parameters", lambda v: f"{v:,}"),
        ("time", "seconds", duration),
        ("peak memory", "peak_memory_bytes", size),
        ("tokens a second", "tokens_per_second", lambda v: f"{v:,.0f}"),
    )
    return _listing({label: as_text(run.result[k]) for label, k, as_text in shown if is_number(run.result.get(k))})


def _listing(values: Mapping[str, Any]) -> str:
    return _table(("what", "value"), [(k, str(v)) for k, v in values.items()]) if values else "Nothing was recorded."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: str) -> str:
    """One line of Markdown in which nothing of the text acts as markup."""
    line = " ".join(clean(value).split())
    if line == "---":
        return line
    return re.sub(r"([\\`*_\[\]<>|#!~$])", r"\\\1", line)
