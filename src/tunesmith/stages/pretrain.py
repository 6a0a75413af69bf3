"""pretrain: go on predicting the next token of the user's own text; every token is trained on.

Record `Text` -> log-probs -> `Likelihood`, counted in tokens.
"""

from __future__ import annotations

from tunesmith.data.batches import collate
from tunesmith.data.store import SampleStore
from tunesmith.engine.contracts import Stage
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood
from tunesmith.stages.job import Built, Job, Measured, make_source
from tunesmith.stages.likelihood import measure_likelihood

KIND = "causal"


def build(job: Job) -> Built:
    """The stage, and its loss, perplexity and bits per byte on held-out text."""
    model = LanguageModel(job.backbone, compute=job.compute).to(job.device)

    def measure(store: SampleStore, full: bool) -> Measured:
        return measure_likelihood(job, model, store, collate)

    return Built(Stage("pretrain", model, Likelihood(), make_source(job)), measure)
