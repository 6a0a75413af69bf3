"""sft: supervised fine-tuning on prompts and responses; the response is trained on, its end-of-turn token included.

Record `Chat` -> log-probs of the response -> `Likelihood`, counted in response tokens (InstructGPT, 2203.02155, 3.1).
"""

from __future__ import annotations

from tunesmith.data.batches import collate
from tunesmith.data.store import SampleStore
from tunesmith.engine.contracts import Stage
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood
from tunesmith.stages.job import Built, Job, Measured, make_source
from tunesmith.stages.likelihood import completions, joined, measure_likelihood, with_reward
from tunesmith.stages.scored import reward_of_completions

KIND = "causal"


def build(job: Job) -> Built:
    """The stage; measured by the loss of held-out responses and, in full, by greedy completions of their prompts."""
    model, held_out = LanguageModel(job.backbone, compute=job.compute).to(job.device), job.inputs.eval
    rewarded = reward_of_completions(job, model)

    def measure(store: SampleStore, full: bool) -> Measured:
        measured = measure_likelihood(job, model, store, collate)
        if rewarded is not None and store is held_out:
            measured = with_reward(measured, rewarded(), seed=job.recipe.seed)
        return joined(measured, completions(job, model, store, store, full=full))

    return Built(Stage("sft", model, Likelihood(), make_source(job)), measure)
