"""What the stages that make their own data share: policy, start, reward, rounds, and measuring on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tunesmith.data.batches import collate
from tunesmith.data.prompts import PromptSet
from tunesmith.engine.contracts import Objective, Stage
from tunesmith.engine.metrics import MetricsLog
from tunesmith.evaluate.generate import GenerationResult, Question
from tunesmith.evaluate.intervals import Estimate, Statistic, bootstrap, mean_statistic, wilson
from tunesmith.evaluate.likelihood import token_batches
from tunesmith.model.language import LanguageModel, Policy
from tunesmith.ops import segment_sums
from tunesmith.rollout.actor import Actor, without_dropout
from tunesmith.rollout.collect import Collector, Played, Sampling
from tunesmith.rollout.sampler import Sampler, stream_seed
from tunesmith.rollout.schedule import Schedule, steps_for
from tunesmith.rollout.source import Method, Mix, OnlineSource, rollout_sample
from tunesmith.stages.job import Built, Job, Measured
from tunesmith.stages.likelihood import with_own
from tunesmith.stages.own_metrics import Own
from tunesmith.stages.rewarding import build_reward

MEASURING = -2
"""The stream of rollouts that only measure; rounds have streams from 0 on."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """Sizes of a round, as the stage's section of the recipe gives them."""

    prompts: int
    num_per_prompt: int
    epochs: int
    minibatches: int


def make_policy(job: Job, *, critic: nn.Module | None = None, learn_entropy: bool = False) -> LanguageModel:
    """The base as a policy at the temperature it is sampled with, dropout off."""
    sampling = job.recipe.sampling
    temperature = 1.0 if sampling is None else sampling.temperature
    policy = Policy(temperature, learn_entropy)
    model = LanguageModel(job.backbone, compute=job.compute, policy=policy, critic=critic)
    without_dropout(model)
    return model.to(job.device)


def build_online(
    job: Job, model: LanguageModel, objective: Objective, method: Method, rounds: Rounds, *, mix: Mix | None = None
) -> Built:
    """The stage: rounds of rollouts, measured by the mean reward of held-out prompts and the KL to the start."""
    recipe, prompts = job.recipe, job.inputs.train
    assert isinstance(prompts, PromptSet) and recipe.sampling is not None, "prepared for a stage with rollouts"
    known = [s for s in (prompts, job.inputs.eval, job.inputs.test) if isinstance(s, PromptSet)]
    how = recipe.sampling
    sampling = Sampling(how.max_tokens, how.temperature, how.top_p, how.top_k, tuple(how.stop or ()))
    start = None if job.start is None or job.starts_from_base else job.start()
    actor = Actor(model, device=job.device, start=start, base=job.starts_from_base)
    collector = Collector(Sampler(model, job.tokenizer), build_reward(job, known), sampling)
    source = OnlineSource(
        _schedule(job, rounds, len(prompts)), prompts, collector, actor, method,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        log=None if job.run is None else MetricsLog(job.run.file("rollouts")),
        mix=mix, notice=watcher(job.say, how.max_tokens),
    )  # fmt: skip

    def measure(store: Any, full: bool) -> Measured:
        return measure_prompts(
            collector,
            actor,
            store,
            seed=recipe.seed,
            max_tokens=job.eval_tokens,
            full=full,
            own=job.own_for(store, full),
        )

    stage = Stage(recipe.stage, model, objective, source, describe=source.metrics)
    return Built(stage, measure, plain=LanguageModel(job.backbone, compute=job.compute))


def _schedule(job: Job, rounds: Rounds, num_prompts: int) -> Schedule:
    train = job.recipe.train
    steps = steps_for(
        num_prompts, rounds.prompts, rounds.epochs * rounds.minibatches, epochs=train.epochs, steps=train.steps
    )
    return Schedule(
        job.recipe.seed, num_prompts, rounds.prompts, rounds.num_per_prompt, rounds.epochs, rounds.minibatches, steps
    )


def measure_prompts(
    collector: Collector,
    actor: Actor,
    prompts: PromptSet,
    *,
    seed: int,
    max_tokens: int,
    full: bool,
    own: Own | None = None,
) -> Measured:
    """One completion of every prompt, the same streams before and after: reward with its parts, KL to the start
    (nats per completion), length, share that ended, and metrics of the user's own."""
    everything = range(len(prompts))
    played = collector.play(prompts, everything, num_per_prompt=1, seed=stream_seed(seed, MEASURING, 0))
    rows = {"reward": played.rewards.total, "kl": kl_to_start(actor, played, max_tokens)}
    if len(played.rewards.parts) > 1:
        rows |= {f"reward.{name}": values for name, values in played.rewards.parts.items()}
    rows |= {"response_length": played.lengths.astype(np.float64), "ended": played.ended.astype(np.float64)}
    statistics = {name: mean_statistic(name, values) for name, values in rows.items()}
    metrics = {name: _estimate(statistic, seed) for name, statistic in statistics.items()}
    measured = Measured(statistics, metrics, _shown(played, collector) if full else None)
    if own is None:
        return measured
    items = ((item.completion, item.answer, item.origin) for item in played.completed)
    return with_own(measured, own.of_completions(items), seed=seed)


def _estimate(statistic: Statistic, seed: int) -> Estimate:
    if statistic.name == "ended":
        return wilson(int(statistic.rows[:, 0].sum()), statistic.n)
    return bootstrap(statistic, seed=seed)


def kl_to_start(actor: Actor, played: Played, max_tokens: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """log π - log π_start summed over each completion `[N]`, nats; its mean over samples of π is the KL divergence."""
    samples = [rollout_sample(played, i, False) for i in range(len(played))]
    found = np.zeros(len(samples))
    for indices in token_batches([len(s) for s in samples], max_tokens):
        batch = collate([samples[i] for i in indices])
        logprobs = actor.answer(batch).logprobs
        assert logprobs is not None
        gap = (logprobs - actor.reference(batch)).double().cpu()
        found[indices] = segment_sums(gap, batch.segments, batch.num_segments).numpy()
    return found


def _shown(played: Played, collector: Collector) -> GenerationResult:
    """The completions for the page of samples."""
    decode = collector.sampler.tokenizer.decode
    questions = tuple(
        Question(r.prompt_ids, decode(r.prompt_ids), item.answer or "", item.origin)
        for r, item in zip(played.rollouts, played.completed, strict=True)
    )
    texts = tuple(item.completion for item in played.completed)
    return GenerationResult(questions, texts, tuple(r.ended for r in played.rollouts), played.rollouts)


def watcher(say: Callable[[str], None], max_tokens: int) -> Callable[[Mapping[str, float]], None]:
    """Warnings in words with the metric that shows them; each is said once, when it begins."""
    told: set[str] = set()

    def notice(metrics: Mapping[str, float]) -> None:
        found = warnings_of(metrics, max_tokens)
        for name in [name for name in found if name not in told]:
            say(f"warning: {found[name]}")
            told.add(name)

    return notice


def warnings_of(metrics: Mapping[str, float], max_tokens: int) -> dict[str, str]:
    """What is wrong with a round of rollouts, by metric."""
    found = {}
    if metrics["distinct"] < 0.1 or metrics["round_entropy"] < 0.01:
        found["distinct"] = (
            f"the policy has collapsed: {metrics['distinct']:.0%} of its completions differ (distinct) and its entropy "
            f"is {metrics['round_entropy']:.3f} nats a token (entropy); raise kl_coef or lower train.learning_rate"
        )
    if metrics["ended"] == 0.0:
        found["ended"] = (
            f"no completion ended by itself within sampling.max_tokens {max_tokens} (ended 0.00); raise it, name "
            "sampling.stop, or start from a model that was trained to end"
        )
    if metrics["reward_std"] < 1e-8:
        found["reward_std"] = (
            f"every completion of the round earned the same reward, {metrics['reward']:g} (reward_std 0), so there is "
            "nothing to learn from; is it too hard, too easy, or constant?"
        )
    return found
