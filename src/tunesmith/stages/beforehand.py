"""The pre-flight page: what a run is about to train on, looked at before its first step, and the gates it must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.data import similar
from tunesmith.data.chat import turn_end
from tunesmith.data.check import FEW_ROWS, Finding
from tunesmith.data.naming import short_names, shortened
from tunesmith.data.preview import preview, text_kept
from tunesmith.data.scan import Scan, end_ids, scan
from tunesmith.errors import DataError, several
from tunesmith.plan.hardware import available_memory
from tunesmith.plan.preflight import Verdict, found_values, judge, judged_text, refusals, scan_values
from tunesmith.recipe import Recipe
from tunesmith.stages.feature_cache import feature_bytes
from tunesmith.stages.job import Inputs, Job, text_tokens
from tunesmith.stages.load import load_of

HEADLINE = "this data would give a pointless or misleading run:"
FIRST_ROWS = 3
_LOOKED_AT = 10
"""Steps whose batches are made to see the largest: few, since the run waits."""


def look(job: Job, sets: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """The page of a run that is prepared up to its model; see docs/preflight.md. Nothing is refused here.

    `base` is the record of the base. Reads the encoded rows, and of the files only the first rows.
    """
    recipe, inputs, tokenizer = job.recipe, job.inputs, job.tokenizer
    ends = end_ids(tokenizer, turn_end(tokenizer))
    found = scan(inputs.train, tokenizer, ends)
    bounds = row_bounds(inputs.train)
    near = _near(inputs.train, bounds)
    memory = _memory(recipe, base, job.device, job.precision)
    names = short_names([name for s in (sets.train, sets.eval, sets.test) if s is not None for name in s.files])
    figures, verdicts = _judged(job, found, len(bounds) - 1, near, memory, names)
    load = load_of(recipe, tokenizer, inputs, job.device, looked_at=_LOOKED_AT)
    return {
        "sets": _sets(inputs),
        "figures": figures,
        "end_tokens": [str(t) for t in tokenizer.convert_ids_to_tokens(list(ends))],
        "balance": _balance(inputs),
        "lengths": found.quantiles,
        "limits": found.limits(),
        "max_length": recipe.data.max_length or text_tokens(recipe, base) or int(inputs.train.lengths.max()),
        "cut": {name: count for name, count in sorted(inputs.train.tally.items()) if count},
        "duplicates": {
            "exact": _count(inputs.findings, "duplicates"), "folded": _count(inputs.findings, "near_duplicates"),
            "near": len(near.pairs), "looked_at": near.rows, "of": near.of, "examples": _examples(near, inputs, bounds),
        },
        "overlap": _count(inputs.findings, "overlap", "input_overlap"),
        "conflicts": _count(inputs.findings, "label_noise", "both_orders", "two_answers"),
        "round_trip": text_kept(sets.train, tokenizer),
        "template": _template(tokenizer, recipe, _count(inputs.findings, "special_text")),
        "steps": {"steps": load.num_steps, "tokens_per_step": round(load.tokens_per_step, 1)},
        "memory": memory,
        "features": feature_bytes(recipe, job.base, inputs),
        "gates": [verdict.as_dict() for verdict in verdicts],
        "allowed": [f"{v.gate.name}: {v}" for v in verdicts if v.state == "allowed"],
        "refused": refusals(verdicts),
        "first_rows": preview(inputs.train, sets.train, tokenizer, ends=ends, names=names, rows=FIRST_ROWS),
    }  # fmt: skip


def refuse(page: Mapping[str, Any]) -> None:
    """`DataError` with every gate that is not passed; nothing when all are, or are passed knowingly."""
    if page["refused"]:
        raise several(page["refused"], DataError, headline=HEADLINE)


def joined(error: DataError, findings: Sequence[Finding], recipe: Recipe) -> DataError:
    """What stopped the encoding, with the gates that the records do not pass either."""
    values, details = found_values(findings)
    values = {name: value for name, value in values.items() if name != "special_text" or judged_text(recipe.stage)}
    found = refusals(judge(values, allowed(recipe), details))
    return type(error)(str(several([str(error), *found], DataError))) if found else error


def allowed(recipe: Recipe) -> frozenset[str]:
    """The gates that the recipe passes knowingly."""
    named = frozenset(recipe.preflight.allow) if recipe.preflight is not None else frozenset[str]()
    return named | ({"overlap"} if recipe.data.on_overlap == "allow" else set())


def row_bounds(store: Any) -> np.ndarray[Any, Any]:
    """Where each row begins among the samples, and their number `[rows + 1]`: a pair's answers are one row."""
    groups = getattr(store, "groups", None)
    if groups is None:
        return np.arange(len(store) + 1)
    return np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [len(store)]])


def _judged(
    job: Job, found: Scan, rows: int, near: similar.Similar, memory: Mapping[str, int], names: Mapping[str, str]
) -> tuple[dict[str, float | None], tuple[Verdict, ...]]:
    """(figures by gate, verdicts)."""
    recipe = job.recipe
    seen, details = found_values(job.inputs.findings)
    figures: dict[str, float | None] = {
        **seen,
        **scan_values(found, recipe.stage, rows, job.inputs.train.tally),
        "near_duplicates": len(near.pairs) / near.rows if near.rows >= FEW_ROWS else None,
        "memory": memory["held"] / max(1, memory["room"]),
    }
    judged = {k: v for k, v in figures.items() if k != "special_text" or judged_text(recipe.stage)}
    details = {gate: shortened(text, names) for gate, text in details.items()}
    return figures, judge(judged, allowed(recipe), details)


def _near(store: Any, bounds: np.ndarray[Any, Any]) -> similar.Similar:
    """Near duplicates among the first rows, as many as the cap lets."""
    totals = np.cumsum(store.lengths)[bounds[1:] - 1]
    rows = max(1, int(np.searchsorted(totals, similar.MAX_TOKENS, side="right")))
    ids, _ = store.flat(0, int(bounds[rows]))
    starts = np.concatenate([[0], totals[:rows]])
    return similar.similar_rows(np.asarray(ids), starts, len(bounds) - 1)


def _examples(near: similar.Similar, inputs: Inputs, bounds: np.ndarray[Any, Any]) -> list[str]:
    origin = inputs.train.origin
    return [f"{origin(int(bounds[b]))} = {origin(int(bounds[a]))}" for a, b in near.pairs[:20].tolist()]


def _count(findings: Sequence[Finding], *kinds: str) -> int:
    return sum(finding.count for finding in findings if finding.kind in kinds)


def _sets(inputs: Inputs) -> dict[str, dict[str, int]]:
    stores = {"training": inputs.train, "held-out": inputs.eval, "test": inputs.test}
    return {
        name: {"rows": len(row_bounds(store)) - 1, "tokens": int(store.num_tokens)}
        for name, store in stores.items()
        if store is not None
    }


def _balance(inputs: Inputs) -> dict[str, dict[str, float]] | None:
    """Of each label how many training rows have it, the most frequent first."""
    if not inputs.label_names:
        return None
    labels = inputs.train.labels
    if labels.shape[1] == 1:
        counts = np.bincount(labels[:, 0].astype(np.int64), minlength=len(inputs.label_names))
    else:
        counts = (labels > 0).sum(0)
    order = np.argsort(-counts, kind="stable")
    return {
        inputs.label_names[i]: {"count": int(counts[i]), "share": float(counts[i] / max(1, len(labels)))}
        for i in order.tolist()
    }


def _memory(recipe: Recipe, base: Mapping[str, Any], device: str, precision: str) -> dict[str, int]:
    """Bytes that are held whatever the batches are, the least that the method allows, and those there are.

    A frozen base is read in fp32 by the CPU, and reaches a GPU in the type of its products.
    """
    parameters, tune = int(base["parameters"]), recipe.tune
    plain = 2.0 if tune.method != "full" and device != "cpu" and precision == "bfloat16" else 4.0
    narrow = {"4bit": 0.5, "8bit": 1.0}.get(getattr(tune, "quantize", None) or "", plain)
    learned = parameters * (4 + (8 if recipe.train.optimizer == "adamw" else 0)) if tune.method == "full" else 0
    return {"held": int(parameters * narrow) + learned, "room": available_memory(device)}


def _template(tokenizer: Any, recipe: Recipe, marked: int) -> list[str]:
    """How prompts are written, and what is wrong with it. What would change the rows themselves is refused earlier."""
    found = []
    if recipe.stage not in ("pretrain", "mlm", "classify"):
        own = recipe.data.asked_by()
        found.append("the recipe's own" if own else "the tokenizer's chat template" if tokenizer.chat_template else
                     "none: prompt, line end, answer")  # fmt: skip
    if tokenizer.eos_token_id is None and recipe.stage != "classify":
        found.append("the tokenizer has no end token")
    if marked:
        found.append(f"{marked:,} rows hold special tokens as text")
    return found or ["nothing to remark"]
