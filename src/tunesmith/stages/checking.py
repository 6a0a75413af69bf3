"""Everything a run would notice before its first step, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.data.records import read_records
from tunesmith.data.store import SampleStore
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
        "train": {"samples": len(train), "tokens": train.num_tokens, "trained_tokens": round(train.num_targets)},
        "eval": None if job.inputs.eval is None else {"samples": len(job.inputs.eval)},
        "labels": list(job.inputs.label_names),
        "first_row": first_row(train, job.tokenizer),
        "round_trip": round_trip(train, job.tokenizer),
        "trainable_parameters": job.trainable.trainable,
        "total_parameters": job.trainable.total,
        "precision": job.precision,
        "device": job.device,
        "notes": [*resolved.warnings, *job.inputs.notes],
    }


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
