"""dpo: learn from preferences without a reward model (2305.18290), and its relatives.

Record `Pair` or `Ranking` + the reference's log-probs, computed once before the first step -> log-probs of every
answer -> `Preference`, counted in prompts. orpo and simpo need no reference.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.data.columns import Chosen, WithColumns
from tunesmith.data.store import SampleStore
from tunesmith.engine.contracts import Stage
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.dpo import Preference
from tunesmith.recipe import Recipe
from tunesmith.stages.job import Built, Job, Measured, make_source
from tunesmith.stages.likelihood import completions, joined, with_reward
from tunesmith.stages.preference import References, measure_preferences
from tunesmith.stages.scored import reward_of_completions

KIND = "causal"


def build(job: Job) -> Built:
    """The stage; measured by held-out pairs: loss, how often the better answer gained more than the worse, and by how
    much. Before training nothing has gained anything: the accuracy is 1/2 by definition where there is a reference."""
    from tunesmith.stages.prepare import cache_folder  # it knows every stage

    model = LanguageModel(job.backbone, compute=job.compute).to(job.device)
    objective, rewarded = objective_of(job.recipe), reward_of_completions(job, model)
    train, held_out = job.inputs.train, job.inputs.eval
    if job.start is None or job.starts_from_base:
        start = model
    else:
        start = LanguageModel(job.start(), compute=job.compute).to(job.device)
    references = References(start, job, cache_folder())

    def beside(store: SampleStore) -> SampleStore | WithColumns:
        return references.beside(store) if objective.needs_reference else store

    for store in (job.inputs.train, job.inputs.eval, job.inputs.test):
        if store is not None:
            beside(store)

    def measure(store: SampleStore, full: bool) -> Measured:
        measured, _ = measure_preferences(job, model, objective, beside(store), full=full)
        if rewarded is not None and store is held_out:
            measured = with_reward(measured, rewarded(), seed=job.recipe.seed)
        return joined(measured, completions(job, model, store, Chosen(store), full=full))

    return Built(Stage("dpo", model, objective, make_source(job, samples=beside(train))), measure)


def objective_of(recipe: Recipe) -> Preference:
    """The loss that the recipe's `dpo` section names."""
    spec = recipe.dpo
    assert spec is not None and spec.beta is not None, "the recipe is resolved"
    plain = Preference(spec.loss, beta=spec.beta, gamma=spec.gamma or 0.0)
    return replace(
        plain, label_smoothing=spec.label_smoothing or 0.0, length_normalized=bool(spec.length_normalized),
        sft_coef=spec.sft_coef or 0.0,
    )  # fmt: skip
