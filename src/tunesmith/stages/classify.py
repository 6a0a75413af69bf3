"""classify: which of C labels fits a text, or, multi-label, which of them do.

Record `Labelled` -> scores [S, C] -> `Classify`, counted in examples. The head is new and seeded unless the base was
saved with the same labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.batches import collate
from tunesmith.data.store import SampleStore
from tunesmith.engine.contracts import Stage
from tunesmith.evaluate.classify import ScoreResult, evaluate_scores
from tunesmith.model.score import ScoreModel
from tunesmith.objectives.classify import Classify
from tunesmith.stages.job import Built, Job, Measured, make_source
from tunesmith.stages.likelihood import with_own

KIND = "classifier"


def build(job: Job) -> Built:
    """The stage; measured by accuracy, F1, MCC and loss on held-out rows, and by metrics of the user's own."""
    model = ScoreModel(job.backbone, compute=job.compute).to(job.device)

    def measure(store: SampleStore, full: bool) -> Measured:
        result = evaluate_scores(model, store, collate=collate, max_tokens=job.eval_tokens, device=job.device)
        rows = predictions(result, job.inputs.label_names) if full else ()
        measured = Measured(
            result.statistics(),
            result.metrics(seed=job.recipe.seed),
            predictions=tuple(rows),
            per_class=result.per_class(job.inputs.label_names) if full else {},
        )
        own = job.own_for(store, full)
        found = [] if own is None else own.of_classes(result, job.inputs.label_names)
        return with_own(measured, found, seed=job.recipe.seed)

    objective = Classify(job.recipe.data.multi_label)
    return Built(Stage("classify", model, objective, make_source(job)), measure)


def predictions(result: ScoreResult, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per row: where it stands, the label it has, the label predicted and that one's probability."""
    shifted = np.exp(result.scores - result.scores.max(1, keepdims=True))
    shares = shifted / shifted.sum(1, keepdims=True)
    rows = []
    for i, origin in enumerate(result.origins):
        if result.multi_label:
            has, said = (
                [n for n, on in zip(names, row[i], strict=True) if on] for row in (result.labels, result.predictions)
            )
            rows.append({"origin": origin, "label": has, "predicted": said})
        else:
            said = int(result.predictions[i])
            share = round(float(shares[i, said]), 4)
            rows.append(
                {
                    "origin": origin,
                    "label": names[int(result.labels[i])],
                    "predicted": names[said],
                    "probability": share,
                }
            )
    return rows
