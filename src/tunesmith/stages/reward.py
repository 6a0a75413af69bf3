"""reward: a model that scores answers as people ranked them (InstructGPT, 2203.02155, 3.5).

Record `Pair` or `Ranking` -> scores [S, 1] -> `BradleyTerry`, counted in prompts. The base is any language model, an
sft run among them: its output layer is left away and a new head of one score, seeded, reads the last real token. After
training all scores are shifted so that demonstrations average 0; their order stays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tunesmith.data.batches import collate
from tunesmith.data.columns import Chosen
from tunesmith.data.encode import Encoder
from tunesmith.data.records import read_records
from tunesmith.data.store import SampleStore, build_store
from tunesmith.engine.contracts import Stage
from tunesmith.errors import DataError
from tunesmith.evaluate.likelihood import Samples, token_batches
from tunesmith.model.packing import evaluating
from tunesmith.model.score import ScoreModel
from tunesmith.model.soft_prompt import context_tokens
from tunesmith.objectives.reward import BradleyTerry
from tunesmith.recipe_sections import RewardModelSpec
from tunesmith.stages.job import Built, Job, Measured, make_source
from tunesmith.stages.preference import measure_preferences

KIND = "classifier"
LABELS = ("reward",)


def build(job: Job) -> Built:
    """The stage; measured by the accuracy, loss and margin of held-out pairs."""
    spec = job.recipe.reward_model or RewardModelSpec()
    model = ScoreModel(job.backbone, compute=job.compute).to(job.device)
    objective = BradleyTerry(margin=spec.margin, center_coef=spec.center_coef)

    def measure(store: SampleStore, full: bool) -> Measured:
        return measure_preferences(job, model, objective, store, full=full)[0]

    stage = Stage("reward", model, objective, make_source(job))
    return Built(stage, measure, finish=partial(calibrate, job, model) if spec.calibrate else None)


def calibrate(job: Job, model: ScoreModel, say: Callable[[str], None]) -> dict[str, Any]:
    """Shift the model's scores so that demonstrations average 0 (InstructGPT, 2203.02155, 3.5)."""
    demonstrations = _demonstrations(job)
    model.set_shift(0.0)
    scores = scores_of(model, demonstrations, max_tokens=job.eval_tokens, device=job.device)
    model.set_shift(float(scores.mean()))
    mean = float((scores.astype(np.float32) - np.float32(scores.mean())).astype(np.float64).mean())
    say(f"calibrated: {len(scores):,} demonstrations averaged {scores.mean():+.4f}, now {mean:+.1e}")
    return {"calibration": {
        "demonstrations": len(scores), "shift": float(scores.mean()), "mean": mean, "deviation": float(scores.std())
    }}  # fmt: skip


def scores_of(model: ScoreModel, samples: Samples, *, max_tokens: int, device: str) -> np.ndarray:
    """The score of every sample `[n]`, float64; gradients and dropout off."""
    scores = np.zeros(len(samples))
    with evaluating(model):
        for indices in token_batches(samples.lengths, max_tokens):
            found = model(collate([samples[i] for i in indices]).to(device)).scores
            scores[indices] = found[:, 0].double().cpu().numpy()
    return scores


def _demonstrations(job: Job) -> Samples:
    """The recipe's own demonstrations, or the best answers of the training rows."""
    spec, data = job.recipe.reward_model, job.recipe.data
    if spec is None or spec.demonstrations is None:
        return Chosen(job.inputs.train)
    from tunesmith.stages.prepare import cache_folder, locate  # it knows every stage

    path = locate(spec.demonstrations, job.folder)
    records = read_records(path, stage="sft", template=data.asked_by(), on_bad_row=data.on_bad_row)
    context = context_tokens(job.backbone) or 1024
    found = build_store(records, Encoder(job.tokenizer, "sft", data.max_length or context, "truncate_left"),
                        cache_folder(), say=job.say)  # fmt: skip
    if len(found) == 0:
        raise DataError(f"reward_model.demonstrations: no row of {path} is left to calibrate on")
    return found
