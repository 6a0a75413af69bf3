"""Losses row by row: kept while training and evaluating, from numbers that are computed anyway."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.engine.metrics import MetricsLog
from tunesmith.rundir import RunDir
from tunesmith.stages.job import Built, Job, Measured, Store
from tunesmith.stages.likelihood import quick_metrics

DIGITS = 5
LOGS = ("train_rows", "eval_rows")


def watched(built: Built, job: Job) -> Built:
    """The stage, evaluated on its held-out rows; where the recipe has it so, each row's loss goes into a log.

    A line is `{"step": 12, "rows": {"reviews.jsonl": [[17, 0.69315], ...]}}`: line number and loss, nats, by file.
    """
    run, held_out = job.run, job.inputs.eval
    keeps = run is not None and job.recipe.evaluate.row_losses != "none" and job.recipe.stage not in ("ppo", "grpo")
    logs = {name: MetricsLog(run.file(name)) for name in LOGS} if keeps and run is not None else {}

    def keep(step: int, batches: Sequence[tuple[Batch, Tensor]]) -> None:
        rows = [pair for batch, losses in batches for pair in _of_batch(batch, losses)]
        if rows:
            logs["train_rows"].append({"step": step, "rows": by_file(rows)})

    def evaluate(step: int) -> Mapping[str, float]:
        assert held_out is not None
        measured = built.measure(held_out, False)
        if logs and (rows := _of_store(held_out, measured)):
            logs["eval_rows"].append({"step": step, "rows": by_file(rows)})
        return quick_metrics(measured)

    stage = replace(built.stage, evaluate=None if held_out is None else evaluate, keep_rows=keep if logs else None)
    return replace(built, stage=stage, logs=logs)


def keep_final(run: RunDir, built: Built, job: Job, step: int) -> None:
    """Under `evaluate.row_losses: all`, the loss of every training row under the weights that are kept."""
    if job.recipe.evaluate.row_losses == "all" and built.logs:
        rows = by_file(_of_store(job.inputs.train, built.measure(job.inputs.train, False)))
        run.write_text("final_rows", json.dumps({"step": step, "rows": rows}) + "\n")


def by_file(rows: Sequence[tuple[str, float]]) -> dict[str, list[list[Any]]]:
    """(origin, loss) of rows as `{file: [[line, loss], ...]}`; losses to five digits, what is not a number left out."""
    found: dict[str, list[list[Any]]] = {}
    for origin, loss in rows:
        name, _, line = origin.rpartition(":")
        if math.isfinite(loss):
            found.setdefault(name, []).append([int(line) if line.isdigit() else line, float(f"{loss:.{DIGITS}g}")])
    return found


def _of_batch(batch: Batch, losses: Tensor) -> list[tuple[str, float]]:
    """(origin, loss) of every segment, of a group's segments once."""
    pairs = list(zip(batch.origins, losses.tolist(), strict=True))
    if batch.groups is None:
        return pairs
    return list({int(group): pair for group, pair in zip(batch.groups.tolist(), pairs, strict=True)}.values())


def _of_store(store: Store, measured: Measured) -> list[tuple[str, float]]:
    """(origin, loss) of every measured row; empty where the measurement is of something else than the rows."""
    statistic = measured.statistics.get("loss")
    if statistic is None:
        return []
    firsts = range(len(store)) if store.groups is None else np.flatnonzero(np.diff(store.groups, prepend=-1)).tolist()
    if len(firsts) != statistic.n:
        return []
    losses = statistic.rows[:, 0] / np.maximum(statistic.rows[:, 1], 1e-12)
    return [(store.origin(i), float(loss)) for i, loss in zip(firsts, losses, strict=True)]
