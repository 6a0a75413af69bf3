"""A run from beginning to end: prepare, measure, fit, measure again, report. Interrupted, it goes on exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.engine.checkpoint import check_free_space, checkpoint_bytes
from tunesmith.engine.contracts import FitSpec, Progress
from tunesmith.engine.fit import Files, StepReport, fit, resume
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.evaluate.card import write_card
from tunesmith.evaluate.compare import compare, overall
from tunesmith.evaluate.generate import side_by_side
from tunesmith.evaluate.report import write_report
from tunesmith.model.hashing import content_sums
from tunesmith.model.lean import make_lean
from tunesmith.plan.hardware import environment, memory_explained, peak_memory_bytes
from tunesmith.plan.page import page_lines
from tunesmith.recipe import Recipe, Resolved, load_resolved
from tunesmith.rundir import RunDir
from tunesmith.stages import baselining, feature_cache, finals, forgetting, measuring, named_code, row_losses
from tunesmith.stages.job import Built, Job, fit_spec, identity, warmup_note
from tunesmith.stages.measuring import Moment
from tunesmith.stages.prepare import STAGES, cache_folder, prepare

Say = Callable[[str], None]
Show = Callable[[StepReport], None]


def start(run: RunDir, resolved: Resolved, *, say: Say, show: Show) -> dict[str, Any]:
    """A new run in the locked folder `run`. The recipe is written only when everything has been checked.

    `OutOfMemoryError` with advice where memory runs out; what was saved until then is sound.
    """
    with memory_explained(_less_memory(resolved.recipe)):
        return _begin(run, resolved, say=say, show=show)


def _less_memory(recipe: Recipe) -> str:
    """What to do when memory ran out."""
    return (
        f"lower train.micro_batch_tokens (now {recipe.train.micro_batch_tokens:,}) or data.max_length, train fewer "
        "parameters (tune.method), set train.checkpoint_activations: true, or raise the limit; `tunesmith plan RECIPE` "
        "says what a run needs"
    )


def _begin(run: RunDir, resolved: Resolved, *, say: Say, show: Show) -> dict[str, Any]:
    for warning in resolved.warnings:
        say(f"note: {warning}")
    _use_threads(resolved.recipe)
    job, base = prepare(resolved.recipe, resolved.folder, say=say)
    job = replace(job, run=run)
    built = _build(job, say)
    baselining.wanted(job)  # refuses what cannot be, before anything is written
    run.write_json("origins", dict(resolved.origins))
    run.write_json("inputs", _inputs(job, base, resolved.folder))
    _show_page(run, job, say)
    if job.inputs.bad_rows:
        run.write_text("bad_rows", "".join(json.dumps(row) + "\n" for row in job.inputs.bad_rows))
    run.write_json("trainable", {**asdict(job.trainable), "names": list(job.trainable.names)})
    run.write_json("environment", environment(job.device, job.precision, torch.get_num_threads()))
    run.write_text("recipe", resolved.to_yaml())
    return _train(run, job, built, base, again=False, say=say, show=show)


def go_on(run: RunDir, *, say: Say, show: Show) -> dict[str, Any]:
    """The same run from its newest sound checkpoint, or from its beginning when it has none yet.

    Device, precision and number of threads are those the run began with: what `auto` means here and now may differ.
    """
    recipe = load_resolved(run.file("recipe"))
    with memory_explained(_less_memory(recipe)):
        return _continue(run, recipe, say=say, show=show)


def _continue(run: RunDir, recipe: Recipe, *, say: Say, show: Show) -> dict[str, Any]:
    began = run.read_json("environment")
    torch.set_num_threads(began["threads"])
    folder = Path(run.read_json("inputs")["recipe_folder"])
    named_code.refuse_changed(run, recipe, folder, say)
    precision = began["precision"] if recipe.precision == "auto" else None
    job, base = prepare(recipe, folder, say=say, device=began["device"], precision=precision)
    job = replace(job, run=run)
    return _train(run, job, _build(job, say), base, again=True, say=say, show=show)


def _show_page(run: RunDir, job: Job, say: Say) -> None:
    """What is about to be trained on, said and kept."""
    assert job.page is not None, "a run that begins was looked at"
    for line in page_lines(job.page, rows=1, width=160):
        say(line)
    run.write_json("preflight", job.page)


def _use_threads(recipe: Recipe) -> None:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


def _build(job: Job, say: Say) -> Built:
    make_lean(job.backbone, job.compute)
    built: Built = STAGES[job.recipe.stage].build(job)
    model = built.stage.model
    layout, why = str(model.layout.value), str(model.why)  # type: ignore[union-attr]
    if why:
        say(f"{job.recipe.base} runs {layout}, which is slower than packed: {why}")
    built = feature_cache.kept(built, job, cache_folder())
    return forgetting.guarded(row_losses.watched(built, job), job)


def _train(
    run: RunDir, job: Job, built: Built, base: Mapping[str, Any], *, again: bool, say: Say, show: Show
) -> dict[str, Any]:
    started = time.perf_counter()
    at_start = content_sums(job.backbone)
    stage, spec = built.stage, fit_spec(job.recipe, built.stage.source.num_steps, job.device)
    if note := warmup_note(spec, stage.source.num_steps):
        say(note)
    state = TrainState(
        step=0,
        model=stage.model,
        optimizer=build_optimizer(stage.model, spec.optim),
        source=stage.source,
        identity=identity(job, str(base["hash"])),
    )
    with job.at_start():
        measuring.measure_before(run, built, job, say)
        forgetting.measure_start(run, built, job)
        baselining.measure_baselines(run, built, job, say)
    files = _files(run, built)
    resumed = again and resume(state, files, say=say)
    if resumed:
        say(f"going on from step {state.step} of {stage.source.num_steps}")
    else:
        _start_clean(files)
        needed = 2 * checkpoint_bytes(state.capture()[0]) + 4 * _trained_bytes(state)
        check_free_space(run.path, needed)
    progress = _fit(built, state, spec, files, say, show, resumed)
    finished = built.finish(say) if built.finish is not None else {}
    after = measuring.measure(built, job, say, "after")
    before = measuring.before_of(run, after)
    finals.save(run, state)
    measuring.keep_after(run, job, after)
    row_losses.keep_final(run, built, job, progress.best_step or state.step)
    result = _result(run, job, base, progress, before, after) | dict(finished)
    result |= forgetting.outcome(run, built, job, spec, progress)
    result["tensors"] = _changed(job, at_start, say)
    for part, beside in baselining.beside(run, job, after).items():
        (result[part] if part else result).update(beside)
    result["seconds"] = round(time.perf_counter() - started, 3)
    return _publish(run, job, result, before, after, say)


def _fit(built: Built, state: TrainState, spec: FitSpec, files: Files, say: Say, show: Show, resumed: bool) -> Progress:
    try:
        return fit(built.stage, state, spec, files, say=say, show=show, resumed=resumed)
    finally:
        for log in files.logs.values():
            log.close()


def _files(run: RunDir, built: Built) -> Files:
    return Files(
        MetricsLog(run.file("metrics")), MetricsLog(run.file("evaluations")), MetricsLog(run.file("timings")),
        run.file("checkpoints"), built.logs,
    )  # fmt: skip


def _start_clean(files: Files) -> None:
    """Lines of a start that was cut off before its first checkpoint."""
    for log in files.logs.values():
        log.cut(0)


def _trained_bytes(state: TrainState) -> int:
    """AdamW's two moments come with the first step."""
    return sum(p.numel() * 4 for group in state.optimizer.param_groups for p in group["params"])


def _result(
    run: RunDir, job: Job, base: Mapping[str, Any], progress: Progress, before: Moment, after: Moment
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "run": run.name,
        "stage": job.recipe.stage,
        "base": dict(base),
        "method": job.recipe.tune.method,
        "before": None,
        "after": None,
        "trainable_parameters": job.trainable.trainable,
        "total_parameters": job.trainable.total,
        "peak_memory_bytes": peak_memory_bytes(job.device),
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
        "best_step": progress.best_step or None,
        "findings": list(job.inputs.notes),
        "preflight": _passed(run),
    }
    result |= _compared(job, before, after)
    return result


def _changed(job: Job, at_start: Mapping[str, int], say: Say) -> dict[str, int]:
    """How many tensors were to learn, how many of them came to differ from the start, and how many others did."""
    learned, now = set(job.trainable.names), content_sums(job.backbone)
    differ = {name for name, content in now.items() if content != at_start.get(name)}
    if not differ:
        say("warning: no weight differs from the start: the run taught nothing")
    return {"trainable": len(learned), "changed": len(differ & learned), "frozen_changed": len(differ - learned)}


def _passed(run: RunDir) -> dict[str, Any]:
    """What the report says of the gates: those that were passed knowingly, with what was found."""
    page = run.read_json("preflight") if run.file("preflight").is_file() else {}
    return {"gates": len(page.get("gates", ())), "allowed": page.get("allowed", [])}


def _compared(job: Job, before: Moment, after: Moment) -> dict[str, Any]:
    """What the two measurements say; test set and probe under their own names, never mixed with the held-out rows."""
    seed, found = job.recipe.seed, dict[str, Any]()
    if before.held_out is not None and after.held_out is not None and job.inputs.eval is not None:
        found |= measuring.pair(before.held_out, after.held_out, seed)
        changes = compare(before.held_out.statistics, after.held_out.statistics, seed=seed)
        found["verdict"] = overall(changes, job.recipe.train.select_by)
        found["per_class"] = measuring.by_class(before.held_out, after.held_out)
        found |= after.held_out.extra
        found["by_source"] = measuring.by_source(before.held_out, after.held_out, job.inputs.eval, seed)
    else:
        found["verdict"] = "Nothing was held out, so whether it helped is not known."
    for name in ("test", "probe"):
        first, last = getattr(before, name), getattr(after, name)
        if first is not None and last is not None:
            found[name] = measuring.pair(first, last, seed)
    return {name: value for name, value in found.items() if value != {}}


def _publish(run: RunDir, job: Job, result: dict[str, Any], before: Moment, after: Moment, say: Say) -> dict[str, Any]:
    """Samples, result, report and card; result.json last but for what reads it."""
    rows: list[dict[str, Any]] = []
    if before.held_out is not None and after.held_out is not None:
        first, last = before.held_out.generation, after.held_out.generation
        if first is not None and last is not None:
            rows += side_by_side(first, last)
    rows += [
        {"prompt": was["text"], "before": was["answer"], "after": now["answer"]}
        for was, now in zip(before.sentences, after.sentences, strict=True)
    ]
    run.write_text("samples", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result["export_bytes"] = sum(p.stat().st_size for p in run.file("final").rglob("*") if p.is_file())
    run.write_json("result", result)
    write_pages(run)
    say(result["verdict"])
    if "forget" in result:
        say(result["forget"]["verdict"])
    say(f"report: {run.file('report')}")
    return result


def write_pages(run: RunDir) -> None:
    """Report and card, from the run's files alone."""
    write_report(run.path)
    write_card(run.path)


def _inputs(job: Job, base: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    inputs = job.inputs
    sets = {"train": inputs.train, "eval": inputs.eval, "test": inputs.test}
    data = {
        name: {"samples": len(store), "tokens": store.num_tokens, "hash": store.fingerprint}
        for name, store in sets.items()
        if store is not None
    }
    return {
        "base": dict(base),
        "data": data,
        "labels": list(inputs.label_names),
        "template": job.recipe.data.asked_by(),
        "notes": list(inputs.notes),
        "recipe_folder": str(folder),
        **named_code.contents(job.recipe, folder),
    }
