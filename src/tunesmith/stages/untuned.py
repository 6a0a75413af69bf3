"""Models that are not trained, on the rows that a comparison judges by: larger bases that are only asked, and the test
rows of the winner."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.evaluate.trials import Rows, rows_of
from tunesmith.model.load import is_encoder
from tunesmith.recipe import load_recipe, load_resolved
from tunesmith.rundir import RunDir, write_whole
from tunesmith.stages import baselining, using
from tunesmith.stages.bases import base_path
from tunesmith.stages.job import Measured
from tunesmith.stages.measuring import as_json, origins_of
from tunesmith.stages.prepare import STAGES, prepare, read_sets

Json = dict[str, Any]
ASKED = ("zero_shot", "few_shot")


def measure_untuned(recipe: str, given: Sequence[str], base: str, file: Path, say: Callable[[str], None]) -> Json:
    """`{parameters, systems: [{title, prompt_tokens, measured}], origins}` of `base`, asked with and without examples.

    Kept in `file` and read from there the next time. Raises what preparing would raise.
    """
    if file.is_file():
        kept: Json = json.loads(file.read_text(encoding="utf-8"))
        return kept
    say(f"{base}, untuned")
    start = load_recipe(recipe, given)
    encoder = is_encoder(base_path(base, start.folder), trust=start.recipe.trust_remote_code)
    asked = [name for name in ASKED if not (encoder and name == "few_shot")]
    changes = [
        *given, f"base={base}", 'tune={"method": "full"}', "train.learning_rate=null",
        f"evaluate.baselines={json.dumps(asked)}",
    ]  # fmt: skip
    resolved = load_recipe(recipe, changes)
    job, record = prepare(resolved.recipe, resolved.folder, say=lambda _: None)
    found = baselining.measured(STAGES[resolved.recipe.stage].build(job), job, baselining.wanted(job))
    out: Json = {
        "base": _short(record["name"]), "parameters": job.trainable.total, "origins": origins_of(job.inputs),
        "systems": [
            {"title": b.title, "prompt_tokens": b.prompt_tokens,
             "measured": {part: as_json(m) for part, m in b.measured.items()}} for b in found
        ],
    }  # fmt: skip
    write_whole(file, json.dumps(out) + "\n")
    return out


def _short(name: str) -> str:
    """A hub id as it is; of a folder its last two names, since pages are passed on."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def untuned_rows(kept: Json, part: str, metric: str) -> list[tuple[Json, Rows | None]]:
    """Of each system: `{name, parameters, value, low, high, n, prompt_tokens}` and its rows; those without the metric
    are left out."""
    found = []
    for system in kept["systems"]:
        measured = system["measured"].get(part)
        if measured is None or metric not in measured["metrics"]:
            continue
        rows = rows_of({part: measured, "origins": kept["origins"]}, part, metric)
        entry = {"name": f"{kept['base']}, {system['title'].replace(', base untuned', '')}",
                 "parameters": kept["parameters"], "prompt_tokens": system["prompt_tokens"]}  # fmt: skip
        found.append((entry | measured["metrics"][metric], rows))
    return found


def measure_test(run: Path, recipe: str, overrides: Sequence[str]) -> Json | None:
    """`{metrics, test, origins}` of a run on its recipe's test rows, which no choice has seen; None without any."""
    start = load_recipe(recipe, [text for text in overrides if text != "evaluate.test=false"])
    sets = read_sets(start.recipe, start.folder)
    if sets.test is None:
        return None
    measured, origins = using.measure_records(RunDir(run), sets.test, start.recipe, start.folder)
    return {"metrics": measured.as_json(), "test": as_json(_small(measured)), "origins": {"test": origins}}


def _small(measured: Measured) -> Measured:
    """Without what only one run has a use for."""
    return replace(measured, predictions=(), generation=None)


def same_recipe(folder: Path, recipe: str, overrides: Sequence[str]) -> bool:
    """True unless the run in `folder` was begun from other settings than these."""
    if not (folder / "recipe.yaml").is_file():
        return True
    here, now = load_resolved(folder / "recipe.yaml"), load_recipe(recipe, overrides).recipe
    left_out = {"run", "threads"}
    return bool(here.model_dump(exclude=left_out) == now.model_dump(exclude=left_out))
