"""What the stages that predict tokens share: measuring loss, perplexity, bits per byte and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.evaluate.generate import GenerationResult, evaluate_generation, questions_of
from tunesmith.evaluate.intervals import Statistic, bootstrap
from tunesmith.evaluate.likelihood import Samples, bytes_of_tokens, evaluate_likelihood
from tunesmith.evaluate.own import own_estimate
from tunesmith.model.language import LanguageModel
from tunesmith.recipe_sections import GenerateSpec
from tunesmith.rollout.sampler import Sampler
from tunesmith.stages.job import Collate, Job, Measured


def measure_likelihood(
    job: Job, model: LanguageModel, store: Samples, collate: Collate, *, with_bytes: bool = True
) -> Measured:
    """Loss (nats per target token), perplexity and bits per byte with intervals over rows."""
    sizes = bytes_of_tokens(job.tokenizer, job.backbone.config.get_text_config().vocab_size) if with_bytes else None
    result = evaluate_likelihood(
        model, store, collate=collate, max_tokens=job.eval_tokens, device=job.device, token_bytes=sizes
    )
    return Measured(result.statistics(), result.metrics(seed=job.recipe.seed))


def quick_metrics(measured: Measured) -> Mapping[str, float]:
    """The values alone, for the line of an evaluation during training."""
    return {name: estimate.value for name, estimate in measured.metrics.items()}


def complete(job: Job, model: LanguageModel, store: Samples) -> GenerationResult | None:
    """Greedy completions of held-out prompts, when metrics on generated text or samples are wanted."""
    samples, generate = job.recipe.evaluate.samples, job.recipe.evaluate.generate
    if generate is None and job.own is not None:
        generate = GenerateSpec()
    limit = generate.examples if generate is not None else samples
    if limit == 0:
        return None
    questions = questions_of(store, job.tokenizer, limit=limit)
    if not questions:
        return None
    longest = generate.max_tokens if generate is not None else 64
    return evaluate_generation(Sampler(model, job.tokenizer), questions, max_tokens=longest, seed=job.recipe.seed)


def with_reward(measured: Measured, reward: Statistic, *, seed: int) -> Measured:
    """`measured` and the mean reward of completions, with its interval over prompts."""
    statistics = {**measured.statistics, reward.name: reward}
    return replace(
        measured, statistics=statistics, metrics={**measured.metrics, reward.name: bootstrap(reward, seed=seed)}
    )


def with_own(measured: Measured, found: Sequence[Statistic], *, seed: int) -> Measured:
    """`measured` and the user's own metrics, each with its interval over rows."""
    statistics = {**measured.statistics, **{s.name: s for s in found}}
    metrics = {**measured.metrics, **{s.name: own_estimate(s, seed=seed) for s in found}}
    return replace(measured, statistics=statistics, metrics=metrics)


def completions(job: Job, model: LanguageModel, store: Samples, samples: Samples, *, full: bool) -> Measured:
    """What completions of `samples`, the prompts of `store`, add to a measurement: none are made unless wanted.

    They are in a full one and, where a metric of the user's own judges them, on the test rows and at evaluations that
    such a metric chooses by.
    """
    inputs, nothing = job.inputs, Measured({}, {})
    judged = store is inputs.test or (job.chooses_by_own and store is inputs.eval)
    if not full and (job.own is None or not judged):
        return nothing
    generation = complete(job, model, samples)
    if generation is None:
        return nothing
    seed, scored = job.recipe.seed, job.recipe.evaluate.generate is not None
    found = with_completions(nothing, generation, scored=scored, seed=seed)
    return found if job.own is None else with_own(found, job.own.of_generation(generation), seed=seed)


def joined(measured: Measured, more: Measured) -> Measured:
    """`measured` with the metrics and the completions of `more`."""
    return replace(
        measured, statistics={**measured.statistics, **more.statistics}, metrics={**measured.metrics, **more.metrics},
        generation=more.generation,
    )  # fmt: skip


def with_completions(measured: Measured, generation: GenerationResult | None, *, scored: bool, seed: int) -> Measured:
    """`measured` and, when wanted, exact match, ROUGE-L, BLEU and the share of completions that end by themselves."""
    if generation is None:
        return measured
    statistics: dict[str, Any] = dict(measured.statistics)
    metrics: dict[str, Any] = dict(measured.metrics)
    if scored:
        statistics |= generation.statistics()
        metrics |= generation.metrics(seed=seed)
    return replace(measured, statistics=statistics, metrics=metrics, generation=generation)
