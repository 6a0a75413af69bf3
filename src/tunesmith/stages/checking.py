"""Everything a run would notice before its first step, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.data.records import read_records
from tunesmith.errors import DataError
from tunesmith.recipe import Resolved
from tunesmith.stages.prepare import Say, prepare


def check_recipe(resolved: Resolved, *, say: Say) -> dict[str, Any]:
    """What would train on what; raises what a run would raise."""
    job, base = prepare(resolved.recipe, resolved.folder, say=say)
    train = job.inputs.train
    return {
        "stage": resolved.recipe.stage,
        "base": base,
        "train": {"samples": len(train), "tokens": train.num_tokens},
        "eval": None if job.inputs.eval is None else {"samples": len(job.inputs.eval)},
        "labels": list(job.inputs.label_names),
        "trainable_parameters": job.trainable.trainable,
        "total_parameters": job.trainable.total,
        "notes": [*resolved.warnings, *job.inputs.notes],
    }


def check_data(spec: str) -> dict[str, Any]:
    """What a data file is recognised as for each stage, and how many records it gives."""
    found: dict[str, Any] = {}
    problems = []
    for stage in ("sft", "classify", "pretrain"):
        try:
            records = read_records(spec, stage=stage)
            found[stage] = {"format": records.describe(), "records": sum(1 for _ in records)}
        except DataError as error:
            problems.append(f"{stage}: {error}")
    if not found:
        raise DataError("\n".join(problems))
    return {"data": str(Path(spec)), "stages": found}
