"""Everything a run would notice before its first step, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.data.records import read_records
from tunesmith.data.store import SampleStore
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.preflight_html import render_page
from tunesmith.recipe import Resolved
from tunesmith.rundir import write_whole
from tunesmith.stages.job import Job
from tunesmith.stages.planning import peak_of
from tunesmith.stages.prepare import Say, prepare


def check_recipe(resolved: Resolved, *, say: Say) -> dict[str, Any]:
    """What would train on what; raises what a run would raise."""
    job, base = prepare(resolved.recipe, resolved.folder, say=say)
    return found_of(job, base, resolved)


def found_of(job: Job, base: dict[str, Any], resolved: Resolved) -> dict[str, Any]:
    """What `check` tells of a recipe that is prepared: the pre-flight page, with its plan, and what stands beside."""
    train = job.inputs.train
    return {
        "stage": resolved.recipe.stage,
        "base": base,
        "train": {"samples": len(train), "tokens": train.num_tokens, "trained_tokens": round(train.num_targets)},
        "eval": None if job.inputs.eval is None else {"samples": len(job.inputs.eval)},
        "labels": list(job.inputs.label_names),
        "preflight": {**(job.page or {}), "plan": _plan(job, int(base["bytes"]))},
        "first_row": first_row(train, job.tokenizer),
        "round_trip": round_trip(train, job.tokenizer),
        "trainable_parameters": job.trainable.trainable,
        "total_parameters": job.trainable.total,
        "precision": job.precision,
        "device": job.device,
        "notes": [*resolved.warnings, *job.inputs.notes],
    }


def _plan(job: Job, file_bytes: int) -> dict[str, Any] | None:
    """None for a family whose forward cannot be followed without weights: that is no reason not to train it."""
    try:
        return peak_of(job, file_bytes)
    except (RuntimeError, NotImplementedError):
        return None


def first_row(store: SampleStore, tokenizer: Any) -> dict[str, Any]:
    """The first sample as the model will see it: text, tokens, ids, and which of them are trained on."""
    sample = store[0]
    ids = sample.ids.tolist()
    return {
        "origin": f"{Path(sample.origin.rpartition(':')[0]).name}:{sample.origin.rpartition(':')[2]}",
        "text": tokenizer.decode(ids),
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "ids": ids,
        "trained": [bool(weight > 0) for weight in sample.weights],
        "label": sample.label,
    }


def round_trip(store: SampleStore, tokenizer: Any, *, rows: int = 20) -> bool:
    """True when the first rows, decoded and encoded again, are the same ids: nothing of them became unknown or changed.

    False is no fault of the data: an uncased vocabulary, or one without bytes, does not keep everything.
    """
    for index in range(min(rows, len(store))):
        ids = store[index].ids.tolist()
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids or tokenizer.unk_token_id in ids:
            return False
    return True


def write_page(found: dict[str, Any], path: Path) -> None:
    """The page of a checked recipe, or of each stage of a chain, as one self-contained file."""
    if "preflight" not in found and "chain" not in found:
        raise RecipeError("--html is the page of a recipe; a data file alone has none")
    if not path.parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent} to write {path.name} to")
    write_whole(path, render_page(found))


def check_data(spec: str) -> dict[str, Any]:
    """What a data file is recognised as for each stage, and how many records it gives."""
    found: dict[str, Any] = {}
    problems = []
    for stage in ("sft", "classify", "pretrain", "dpo"):
        try:
            records = read_records(spec, stage=stage)
            found[stage] = {"format": records.describe(), "records": sum(1 for _ in records)}
        except DataError as error:
            problems.append(f"{stage}: {error}")
    if not found:
        raise DataError("\n".join(problems))
    return {"data": str(Path(spec)), "stages": found}
