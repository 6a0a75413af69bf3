"""The tasks of earlier stages, measured again after a later one: does sequential tuning unlearn what came before?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.store import build_store
from tunesmith.model.load import base_record
from tunesmith.recipe import load_resolved
from tunesmith.recipe_chain import GIVES
from tunesmith.rundir import RunDir
from tunesmith.stages.finals import Tuned, open_tuned
from tunesmith.stages.job import Inputs, Job, text_tokens
from tunesmith.stages.prepare import STAGES, cache_folder, make_encoder, read_sets
from tunesmith.stages.using import settled

TASKS = ("pretrain", "mlm", "sft", "classify")
"""Stages whose task any model of the same kind can be asked; the others need the reference or the reward they had."""


def measure_earlier(run: RunDir, tasks: Sequence[RunDir], *, say: Callable[[str], None]) -> dict[str, Any]:
    """`{stage name: {metric: {value, low, high, n}}}` of the model of `run` on the held-out rows of earlier stages.

    Measured once and kept in the run. A task that the model's kind cannot do, or without held-out rows, is left out.
    """
    keys = {task.name: task.read_json("handoff")["key"] for task in tasks}
    if run.file("earlier").is_file() and (kept := run.read_json("earlier"))["keys"] == keys:
        return dict(kept["metrics"])
    recipe = load_resolved(run.file("recipe"))
    wanted = [task for task in tasks if _fits(run, task)]
    found: dict[str, Any] = {}
    if wanted:
        device, precision = settled(run, recipe)
        tuned = open_tuned(run, device=device, precision=precision)
        for task in wanted:
            metrics = _measure(tuned, task, device, precision)
            if metrics is not None:
                found[task.name] = metrics
                shown = "  ".join(f"{name} {entry['value']:.4f}" for name, entry in metrics.items())
                say(f"task of {task.name} after {run.name}: {shown}")
    run.write_json("earlier", {"keys": keys, "metrics": found})
    return found


def _fits(run: RunDir, task: RunDir) -> bool:
    mine, theirs = (load_resolved(r.file("recipe")).stage for r in (run, task))
    same_labels = run.read_json("inputs")["labels"] == task.read_json("inputs")["labels"]
    return theirs in TASKS and GIVES[mine] == GIVES[theirs] and (theirs != "classify" or same_labels)


def _measure(tuned: Tuned, task: RunDir, device: str, precision: str) -> dict[str, Any] | None:
    recipe, inputs = load_resolved(task.file("recipe")), task.read_json("inputs")
    held_out = read_sets(recipe, Path(inputs["recipe_folder"])).eval
    if held_out is None:
        return None
    labels = tuple(inputs["labels"])
    context = text_tokens(tuned.recipe, base_record(tuned.base, trust=recipe.trust_remote_code))
    store = build_store(held_out, make_encoder(recipe, tuned.tokenizer, labels, context), cache_folder())
    given = Inputs(store, store, None, label_names=labels)
    job = Job(recipe, tuned.tokenizer, given, tuned.backbone, tuned.trainable, device, precision)
    return STAGES[recipe.stage].build(job).measure(store, False).as_json()
