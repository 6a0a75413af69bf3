"""What the stages that predict tokens share: measuring loss, perplexity, bits per byte and completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.evaluate.generate import GenerationResult, evaluate_generation, questions_of
from tunesmith.evaluate.intervals import Statistic, bootstrap
from tunesmith.evaluate.likelihood import Samples, bytes_of_tokens, evaluate_likelihood
from tunesmith.model.language import LanguageModel
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
    """Greedy completions of held-out prompts, when the recipe asks for metrics on generated text or for samples."""
    generate, samples = job.recipe.evaluate.generate, job.recipe.evaluate.samples
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
