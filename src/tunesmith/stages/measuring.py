"""What is measured before and after training. `before` is measured once and kept in the run, rows and all, so that a
resumed run compares with the same numbers and never measures the base again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from tunesmith.data.batches import collate
from tunesmith.data.naming import told_apart
from tunesmith.data.store import SampleStore
from tunesmith.errors import RunError
from tunesmith.evaluate.compare import compare
from tunesmith.evaluate.generate import GenerationResult, Question
from tunesmith.evaluate.intervals import Estimate, Statistic, bootstrap, plain
from tunesmith.model.language import LanguageModel
from tunesmith.rundir import RunDir
from tunesmith.stages import finals
from tunesmith.stages.job import Built, Inputs, Job, Measured
from tunesmith.stages.likelihood import measure_likelihood

Json = dict[str, Any]
MAX_SOURCES = 20


@dataclass(frozen=True, slots=True)
class Moment:
    """One measurement of everything: held-out rows, test rows, the probe, the recipe's sentences."""

    held_out: Measured | None
    test: Measured | None
    probe: Measured | None
    sentences: list[Json]


def measure(built: Built, job: Job, say: Callable[[str], None], when: str) -> Moment:
    """Measure the model as it is now."""
    inputs = job.inputs
    held_out = built.measure(inputs.eval, True) if inputs.eval is not None else None
    test = built.measure(inputs.test, False) if inputs.test is not None else None
    probe = None
    model = built.plain or built.stage.model
    if inputs.probe is not None and isinstance(model, LanguageModel):
        probe = measure_likelihood(job, model, inputs.probe, collate)
    if held_out is not None:
        say(f"{when}: " + "  ".join(f"{name} {e.value:.4f}" for name, e in held_out.metrics.items()))
    return Moment(held_out, test, probe, finals.label_sentences(job, built.stage.model))


def measure_before(run: RunDir, built: Built, job: Job, say: Callable[[str], None]) -> None:
    """Measure the untouched base and keep it in before.json, unless this run has done so already."""
    key = measurement_key(job)
    if run.file("before").is_file() and _kept(run).get("key") == key:
        return
    moment = measure(built, job, say, "before")
    parts = {name: as_json(getattr(moment, name)) for name in ("held_out", "test", "probe")}
    run.write_text("before", json.dumps({"key": key, **parts, "sentences": moment.sentences}) + "\n")


def keep_after(run: RunDir, job: Job, after: Moment) -> None:
    """Keep the measurement of the tuned model, row by row, in after.json, for whoever compares runs."""
    parts = {name: as_json(getattr(after, name)) for name in ("held_out", "test", "probe")}
    run.write_text("after", json.dumps(parts | {"origins": origins_of(job.inputs)}) + "\n")


def origins_of(inputs: Inputs) -> dict[str, list[str]]:
    """Where each held-out and test row stands, `file:line`."""
    stores = {"held_out": inputs.eval, "test": inputs.test}
    return {name: [s.origin(i) for i in range(len(s))] for name, s in stores.items() if s is not None}


def before_of(run: RunDir, after: Moment) -> Moment:
    """The measurement that `measure_before` kept; `after` knows how its rows add up to each metric."""
    kept = _kept(run)
    parts = {name: from_json(kept[name], getattr(after, name)) for name in ("held_out", "test", "probe")}
    return Moment(**parts, sentences=kept["sentences"])


def _kept(run: RunDir) -> Json:
    kept = run.read_json("before")
    if not isinstance(kept, dict) or not {"key", "held_out", "test", "probe", "sentences"} <= set(kept):
        raise RunError(f"{run.file('before')} is damaged; remove it, and the base is measured again")
    return kept


def measurement_key(job: Job) -> str:
    """What a measurement of the base depends on beside the base itself, which a resumed run is held to anyway."""
    stores = (job.inputs.eval, job.inputs.test, job.inputs.probe)
    parts = [
        job.recipe.evaluate.model_dump(), job.precision, job.recipe.seed, job.recipe.train.micro_batch_tokens,
        [None if store is None else store.fingerprint for store in stores],
        [] if job.own is None else [metric.content for metric in job.own.metrics],
    ]  # fmt: skip
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def as_json(measured: Measured | None) -> Json | None:
    """A measurement, rows and all, as a file keeps it."""
    if measured is None:
        return None
    generation = measured.generation
    return {
        "rows": {name: [[plain(v) for v in row] for row in s.rows.tolist()] for name, s in measured.statistics.items()},
        "metrics": measured.as_json(),
        "per_class": {name: estimate.as_json() for name, estimate in measured.per_class.items()},
        "predictions": [dict(row) for row in measured.predictions],
        "generation": None if generation is None else [
            {"ids": list(q.prompt_ids), "prompt": q.prompt, "reference": q.reference, "origin": q.origin,
             "completion": completion, "ended": ended}
            for q, completion, ended in zip(generation.questions, generation.completions, generation.ended, strict=True)
        ],
    }  # fmt: skip


def from_json(kept: Json | None, after: Measured | None) -> Measured | None:
    """The measurement that a file keeps; `after`, of the same rows, knows how these add up to each metric."""
    if kept is None or after is None:
        return None
    statistics = {
        name: Statistic(name, _rows(kept["rows"][name]), like.of)
        for name, like in after.statistics.items()
        if name in kept["rows"]
    }
    metrics = {name: _estimate(entry) for name, entry in kept["metrics"].items()}
    per_class = {name: _estimate(entry) for name, entry in kept["per_class"].items()}
    return Measured(statistics, metrics, _generation(kept["generation"]), tuple(kept["predictions"]), per_class)


def _rows(values: list[list[Any]]) -> Any:
    """As wide as they were: a class that only one of the two measurements predicts has columns there alone."""
    return np.asarray([[float(v) for v in row] for row in values], dtype=np.float64).reshape(len(values), -1)


def _estimate(entry: Mapping[str, Any]) -> Estimate:
    low, high = (None if entry[k] is None else float(entry[k]) for k in ("low", "high"))
    return Estimate(float(entry["value"]), low, high, int(entry["n"]))


def _generation(kept: list[Json] | None) -> GenerationResult | None:
    if kept is None:
        return None
    return GenerationResult(
        tuple(Question(tuple(row["ids"]), row["prompt"], row["reference"], row["origin"]) for row in kept),
        tuple(row["completion"] for row in kept),
        tuple(row["ended"] for row in kept),
        (),
    )


def pair(before: Measured, after: Measured, seed: int) -> Json:
    """`{before, after, difference}`, each `{metric: {value, low, high, n}}`."""
    changes = compare(before.statistics, after.statistics, seed=seed)
    difference = {name: change.as_json() for name, change in changes.items()}
    return {"before": before.as_json(), "after": after.as_json(), "difference": difference}


def by_class(before: Measured, after: Measured) -> Json:
    """Share found of each label's rows, before and after: what a tuned model came to neglect shows here."""
    return {
        name: {"before": before.per_class[name].as_json(), "after": estimate.as_json()}
        for name, estimate in after.per_class.items()
        if name in before.per_class
    }


def by_source(before: Measured, after: Measured, store: SampleStore, seed: int) -> Json:
    """The same metrics for each of several held-out files, as for the tasks of a mix; empty for a single file."""
    rows: dict[str, list[int]] = {}
    for index in range(len(store)):
        rows.setdefault(store.origin(index).rpartition(":")[0], []).append(index)
    if not 1 < len(rows) <= MAX_SOURCES:
        return {}
    names = told_apart(list(rows))
    return {
        names[source]: {"before": _metrics_of(before, chosen, len(store), seed),
                        "after": _metrics_of(after, chosen, len(store), seed)}
        for source, chosen in sorted(rows.items())
    }  # fmt: skip


def _metrics_of(measured: Measured, rows: list[int], total: int, seed: int) -> Json:
    return {
        name: bootstrap(Statistic(name, statistic.rows[rows], statistic.of), seed=seed).as_json()
        for name, statistic in measured.statistics.items()
        if statistic.n == total
    }
