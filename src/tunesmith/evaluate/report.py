"""report.html: one page a person reads from top to bottom, made of the files in a run folder and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.compare import NO_CHANGE, describe, number
from tunesmith.evaluate.report_baselines import baselines_section
from tunesmith.evaluate.report_forget import forget_section
from tunesmith.evaluate.report_html import (
    Markup,
    amount,
    duration,
    esc,
    figure,
    interval,
    is_number,
    join,
    page,
    section,
    size,
    table,
    tag,
)
from tunesmith.evaluate.report_preference import preference_section
from tunesmith.evaluate.run_files import (
    RunFiles,
    as_number,
    best_evaluation,
    data_facts,
    dig,
    estimate,
    estimates,
    evaluations_of,
    flat,
    read_run,
)
from tunesmith.rundir import LAYOUT, write_whole

MAX_SAMPLES = 20
MAX_TEXT = 4000
MAX_PROBLEMS = 20
GAP = 1.3
"""Held-out loss over training loss from which on the report calls it a gap."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` in the run's folder and return its path. `RunError` when it is no run or not writable."""
    run = read_run(Path(run_dir))
    target = run.path / LAYOUT["report"]
    write_whole(target, render(run))
    return target


def render(run: RunFiles) -> str:
    """The page: verdict first, then the evidence, then what it took."""
    name = run.text("run", otherwise=run.path.resolve().name)
    body = join(
        [
            _head(run, name),
            _verdict(run),
            _before_after(run, "", "Before and after"),
            _by_source(run),
            _before_after(run, "test", "Test set, used once"),
            preference_section(run.result),
            _curve(run),
            _samples(run),
            forget_section(run),
            _before_after(run, "probe", "Forgetting probe: text outside the task"),
            _checks(run),
            _trained(run),
            _cost(run),
            _data(run),
            _settings(run),
            _environment(run),
            _problems(run),
        ]
    )
    return page(f"{name}: tunesmith report", body)


def _head(run: RunFiles, name: str) -> Markup:
    stage, base = run.text("stage", otherwise="unknown stage"), run.text("base.name", "base", otherwise="unknown base")
    return Markup(f"<header><h1>{esc(name)}</h1><p class='soft'>{esc(stage)} from {esc(base)}</p></header>")


def _verdict(run: RunFiles) -> Markup:
    """The main metric's verdict, large; what got worse is never left out."""
    found, main = run.differences(), run.main_metric()
    if main is None or main not in found:
        state = "was not compared with its base" if run.result else "has not finished"
        return _banner("flat", "No verdict", f"This run {state}, so nothing can be said about its effect.")
    best = found[main]
    css = "flat" if best.verdict == NO_CHANGE else best.verdict
    head = NO_CHANGE.upper() if css == "flat" else best.verdict.capitalize()
    lines = [best.text.split(": ", 1)[1] + "."]
    if css == "flat":
        lines.append("The tuned model cannot be told from its base on this metric and these rows.")
    worse = [n.replace("_", " ") for n, d in found.items() if d.verdict == "worse" and n != main]
    better = [n.replace("_", " ") for n, d in found.items() if d.verdict == "better" and n != main]
    lines += [f"Got worse: {', '.join(worse)}."] if worse else []
    lines += [f"Also better: {', '.join(better)}."] if better else []
    forgot = [d for d in run.differences("probe").values() if d.verdict == "worse"]
    lines += [str(run.result["worth"])] if run.result.get("worth") else []
    lines += [str(kept)] if (kept := dig(run.result, "forget.verdict")) else []
    lines += [f"Forgetting: on text outside the task {forgot[0].text.split(': ', 1)[1]}."] if forgot else []
    return _banner(css, head, *lines)


def _banner(css: str, head: str, *lines: str) -> Markup:
    inner = join([tag("strong", head), *(tag("p", line) for line in lines)])
    return Markup(f'<div class="verdict {css}" role="status">{inner}</div>')


def _before_after(run: RunFiles, part: str, title: str) -> Markup:
    """Every metric before and after with 95 % intervals, the paired difference, and its verdict."""
    source = dig(run.result, part) if part else run.result
    if not isinstance(source, Mapping):
        return Markup("")
    before, after = estimates(source.get("before")), estimates(source.get("after"))
    changes = estimates(source.get("difference"))
    judged = run.differences(part)
    names = [*before, *(n for n in after if n not in before)]
    if not names:
        return Markup("")
    rows = []
    for name in names:
        verdict = judged[name].verdict if name in judged else ""
        css = "flat" if verdict == NO_CHANGE else verdict
        n = (after.get(name) or before.get(name) or {}).get("n")
        rows.append(
            (
                name.replace("_", " "),
                _cell(before.get(name)),
                _cell(after.get(name)),
                _cell(changes.get(name), sign=True),
                tag("span", verdict or "–", css),
                f"{n:,}" if isinstance(n, int) else "–",
            )
        )
    head = ("metric", "before", "after", "difference (paired)", "verdict", "n")
    note = "In small print: 95 % intervals over rows. Better or worse needs a difference whose interval leaves out 0."
    drawn = plots.change(before, after, names)
    shown = figure(drawn, "Before and after, with 95 % intervals") if drawn else ""
    rivals = baselines_section(source, run.main_metric())
    return section(title, table(head, rows, numeric=(5,)), tag("p", note, "soft small"), shown, rivals)


def _cell(entry: Mapping[str, Any] | None, *, sign: bool = False) -> Markup:
    if entry is None:
        return esc("–")
    value = entry.get("value")
    text = number(as_number(value), sign=True) if sign and is_number(value) else amount(value)
    small = tag("span", interval(entry.get("low"), entry.get("high"), sign=sign), "soft small")
    return Markup(f"{esc(text)} <br>{small}")


def _by_source(run: RunFiles) -> Markup:
    """The held-out files one by one, as for the tasks of a mix."""
    found = run.result.get("by_source")
    rows = []
    for source, pair in found.items() if isinstance(found, Mapping) else ():
        before, after = (estimates(dig(pair, key)) for key in ("before", "after"))
        rows += [(source, n.replace("_", " "), _cell(before.get(n)), _cell(entry)) for n, entry in after.items()]
    return section("By data set", table(("held-out file", "metric", "before", "after"), rows) if rows else "")


def _curve(run: RunFiles) -> Markup:
    drawn = plots.curve(run.metrics, run.evaluations, run.main_metric())
    picture = figure(drawn, "Loss of each training step, and the held-out rows") if drawn else ""
    return section("Curve", picture, evaluation_table(run))


def evaluation_table(run: RunFiles) -> Markup:
    """One row an evaluation; the untrained model first."""
    if not run.evaluations:
        return Markup("")
    names = list(dict.fromkeys(n for line in run.evaluations for n in estimates(line.get("metrics"))))
    rows = []
    for line in evaluations_of(run):
        held = estimates(line.get("metrics"))
        values = [amount(held[n]["value"]) if n in held else "–" for n in names]
        rows.append((amount_of(line.get("step")), amount_of(line.get("epoch")), *values))
    return table(("step", "epoch", *(n.replace("_", " ") for n in names)), rows, numeric=range(len(names) + 2))


def amount_of(value: Any) -> str:
    """A step or an epoch: `400`, `1.5`."""
    return f"{value:,.6g}" if is_number(value) else "–"


def _samples(run: RunFiles) -> Markup:
    """Completions side by side."""
    parts = [_sample(line) for line in run.samples[:MAX_SAMPLES]]
    more = len(run.samples) - MAX_SAMPLES
    rest = tag("p", f"{more} more in {LAYOUT['samples']}.", "soft small") if more > 0 else ""
    return section("The same prompts, before and after", *parts, rest)


def _sample(line: Mapping[str, Any]) -> Markup:
    def block(label: str, key: str) -> Markup:
        ended = line.get(f"{key}_ended")
        state = "" if ended is None else (", ended by itself" if ended else ", cut off at the limit")
        return Markup(f"<div>{tag('div', label + state, 'label')}{tag('div', _short(line.get(key)), 'text')}</div>")

    pair = f'<div class="two">{block("before", "before")}{block("after", "after")}</div>'
    reference = block("reference", "reference") if line.get("reference") not in (None, "") else ""
    return Markup(f'<div class="sample">{block("prompt", "prompt")}{pair}{reference}</div>')


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} more characters)"


def _checks(run: RunFiles) -> Markup:
    """What goes wrong most often in tuning, each looked at."""
    lines = [*_overfitting(run), *_gap(run), *_forgetting(run), *_per_class(run)]
    lines += knowingly(run)
    findings = run.result.get("findings")
    lines += [str(f) for f in findings[:MAX_PROBLEMS]] if isinstance(findings, list) else []
    listed = Markup("<ul>" + "".join(tag("li", line) for line in lines) + "</ul>") if lines else ""
    return section("Checks", listed)


def knowingly(run: RunFiles) -> list[str]:
    """What was found before the first step and trained on all the same, because the recipe says so."""
    found = dig(run.result, "preflight.allowed")
    return [f"Passed knowingly before the run: {text}." for text in found] if isinstance(found, list) else []


def _overfitting(run: RunFiles) -> list[str]:
    found = best_evaluation(run.evaluations, "loss")
    if found is None or len(run.evaluations) < 3:
        return []
    best, last = found
    low, end = (as_number(estimates(line["metrics"])["loss"]["value"]) for line in found)
    if best is last or end <= low * 1.01:
        return ["Overfitting: none seen; the held-out loss was still at its best when training ended."]
    return [
        f"Overfitting: the held-out loss was lowest at step {amount_of(best.get('step'))} ({amount(low)}) "
        f"and rose to {amount(end)} by step {amount_of(last.get('step'))}. Train for fewer epochs, or stop early."
    ]


def _gap(run: RunFiles) -> list[str]:
    """Training and held-out loss at the end of training, side by side: far apart, the rows were learned by heart."""
    found = best_evaluation(run.evaluations, "loss")
    losses = [as_number(line.get("loss")) for line in run.metrics if is_number(line.get("loss"))]
    if found is None or not losses:
        return []
    last = losses[-max(1, len(losses) // 10) :]
    trained, held = sum(last) / len(last), as_number(estimates(found[1]["metrics"])["loss"]["value"])
    pair = f"{amount(trained)} on training rows and {amount(held)} on held-out rows at the end"
    if held > GAP * trained + 0.05:
        return [f"Gap: the loss is {pair}; the model knows its training rows better than the task. More or more varied "
                "rows, fewer epochs, dropout or weight decay help."]  # fmt: skip
    return [f"Gap: none to speak of; the loss is {pair}."]


def _forgetting(run: RunFiles) -> list[str]:
    found = run.differences("probe")
    if not found:
        if "forget" in run.result:
            return []
        return ["Forgetting: not measured. Name general text under evaluate.probe to have it measured."]
    return [f"Forgetting: {d.text}." for d in found.values() if d.metric in ("bits_per_byte", "loss", "accuracy")][:1]


def _per_class(run: RunFiles) -> list[str]:
    """Classes that are found less often than before."""
    classes = run.result.get("per_class")
    lines = []
    for name, pair in classes.items() if isinstance(classes, Mapping) else ():
        if not isinstance(pair, Mapping):
            continue
        found = estimates(pair)
        if {"before", "after"} <= set(found):
            was, now = (amount(found[k]["value"]) for k in ("before", "after"))
            lines.append(f"Label {name}: {was} of its rows found before, {now} after.")
    return lines


def _trained(run: RunFiles) -> Markup:
    """What learned: counts and, by group, where."""
    counts = [
        (label, f"{value:,}")
        for label, key in (("trainable parameters", "trainable_parameters"), ("all parameters", "total_parameters"))
        if isinstance(value := run.result.get(key), int)
    ]
    if len(counts) == 2 and run.result["total_parameters"]:
        share = 100 * run.result["trainable_parameters"] / run.result["total_parameters"]
        counts.append(("share", f"{share:.4g} %"))
    tensors = run.result.get("tensors")
    if isinstance(tensors, dict) and {"trainable", "changed"} <= set(tensors):
        counts.append(("tensors that came to differ", f"{tensors['changed']} of {tensors['trainable']} to train"))
    method = run.text("tune.method", otherwise="")
    rows = [("method", method), *counts] if method else counts
    groups = run.trainable.get("groups")
    sizes = [g for g in groups if isinstance(g, list) and len(g) == 2] if isinstance(groups, list) else []
    detail = (
        table(("group", "parameters"), [(n, f"{c:,}") for n, c in sizes if is_number(c)], numeric=(1,)) if sizes else ""
    )
    return section("What trained", table(("", ""), rows, numeric=(1,)) if rows else "", detail)


def _cost(run: RunFiles) -> Markup:
    shown = (
        ("time", "seconds", duration),
        ("peak memory", "peak_memory_bytes", size),
        ("speed", "tokens_per_second", lambda v: f"{v:,.0f} tokens a second"),
        ("trained tokens", "tokens", lambda v: f"{v:,.0f}"),
        ("size of what is saved", "export_bytes", size),
    )
    rows = [(label, as_text(run.result[key])) for label, key, as_text in shown if is_number(run.result.get(key))]
    return section("Cost", table(("", ""), rows, numeric=(1,)) if rows else "")


def _data(run: RunFiles) -> Markup:
    """The base with its licence and hash, then counts and hashes of what was read."""
    found = {
        "base": run.text("base.name", "base", otherwise=""),
        "base licence": run.text("base.licence", otherwise="not stated by the base"),
        "base hash": run.text("base.hash", otherwise=""),
        **data_facts(run),
    }
    return section("Base and data", table(("what", "value"), [(k, _plain(v)) for k, v in found.items() if v != ""]))


def _settings(run: RunFiles) -> Markup:
    """Every setting and where its value came from."""
    origins = {str(k): v for k, v in flat(run.origins).items()}
    rows = [(key, _plain(value), str(origins.get(key, "–"))) for key, value in flat(run.recipe).items()]
    text = (
        Markup(f"<details><summary>recipe.yaml</summary>{tag('pre', run.recipe_text)}</details>")
        if run.recipe_text
        else ""
    )
    return section("Settings", table(("setting", "value", "from"), rows) if rows else "", text)


def _environment(run: RunFiles) -> Markup:
    rows = [(key, _plain(value)) for key, value in flat(run.environment).items()]
    return section("Environment", table(("what", "value"), rows) if rows else "")


def _plain(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 else str(value)
    )


def _problems(run: RunFiles) -> Markup:
    lines = list(run.problems[:MAX_PROBLEMS])
    if len(run.problems) > MAX_PROBLEMS:
        lines.append(f"{len(run.problems) - MAX_PROBLEMS} more like these.")
    listed = Markup("<ul>" + "".join(tag("li", line) for line in lines) + "</ul>") if lines else ""
    return section("Files that could not be read whole", listed)


def summary(run: RunFiles) -> list[str]:
    """One sentence a metric, for a terminal or the model card."""
    changes = estimates(run.result.get("difference"))
    judged = run.differences()
    return [describe(n, judged[n].before, judged[n].after, estimate(changes[n]), judged[n].verdict) for n in judged]
