"""How well a model answers: prompts of held-out rows completed and compared with their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.evaluate.intervals import Estimate, Statistic, bootstrap, mean_statistic, wilson
from tunesmith.evaluate.likelihood import Samples
from tunesmith.evaluate.tasks import TEXT_METRICS
from tunesmith.rollout.sampler import Rollout, Sampler

SHARES = ("exact_match", "share_ended")


@dataclass(frozen=True, slots=True)
class Question:
    """The prompt of a held-out row and the answer it should get; `prompt` is the text with its special tokens."""

    prompt_ids: tuple[int, ...]
    prompt: str
    reference: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One completion per question, without special tokens, and whether it ended by itself."""

    questions: tuple[Question, ...]
    completions: tuple[str, ...]
    ended: tuple[bool, ...]
    rollouts: tuple[Rollout, ...]

    def statistics(self, names: Sequence[str] = tuple(TEXT_METRICS)) -> dict[str, Statistic]:
        """`share_ended` and, against the references, the metrics named."""
        found = {"share_ended": mean_statistic("share_ended", np.asarray(self.ended, dtype=np.float64))}
        references = [question.reference for question in self.questions]
        return found | {n: TEXT_METRICS[n](self.completions, references) for n in names if n in TEXT_METRICS}

    def metrics(self, names: Sequence[str] = tuple(TEXT_METRICS), *, seed: int = 0) -> dict[str, Estimate]:
        """Every metric with its 95 % interval: Wilson's for shares, bootstrap over rows for the rest."""
        found = {}
        for name, statistic in self.statistics(names).items():
            share = name in SHARES
            found[name] = (
                wilson(int(statistic.rows[:, 0].sum()), statistic.n) if share else bootstrap(statistic, seed=seed)
            )
        return found


def questions_of(store: Samples, tokenizer: Any, *, limit: int | None = None) -> list[Question]:
    """Prompt and reference of every sample that has both: what stands before its first target, and that target run.

    With `limit`, samples spread evenly over the store.
    """
    found = []
    num = len(store) if limit is None else min(limit, len(store))
    for i in (k * len(store) // num for k in range(num)):
        sample = store[i]
        targets = np.flatnonzero(sample.weights > 0)
        if len(targets) == 0:
            continue
        start = int(targets[0])
        gaps = np.flatnonzero(sample.weights[start:] <= 0)
        end = start + int(gaps[0]) if len(gaps) else len(sample)
        prompt, answer = (tuple(int(t) for t in part) for part in (sample.ids[:start], sample.ids[start:end]))
        text = tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True)
        found.append(Question(prompt, *text, sample.origin))
    return found


def evaluate_generation(
    sampler: Sampler,
    questions: Sequence[Question],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> GenerationResult:
    """Complete every question, greedily unless told otherwise."""
    prompts = [question.prompt_ids for question in questions]
    rollouts = sampler.sample(prompts, temperature=temperature, max_tokens=max_tokens, seed=seed, stop_ids=stop_ids)
    stops = {int(i) for i in stop_ids}
    bodies = [r.ids[:-1] if r.ended and r.ids[-1] in stops else r.ids for r in rollouts]
    texts = tuple(sampler.tokenizer.decode(body, skip_special_tokens=True) for body in bodies)
    return GenerationResult(tuple(questions), texts, tuple(r.ended for r in rollouts), tuple(rollouts))


def side_by_side(before: GenerationResult, after: GenerationResult, *, limit: int = 20) -> list[dict[str, Any]]:
    """Lines of `samples.jsonl`: `{prompt, before, after, reference, before_ended, after_ended, origin}`."""
    lines = []
    for i, question in enumerate(before.questions[:limit]):
        lines.append(
            {
                "prompt": question.prompt,
                "before": before.completions[i],
                "after": after.completions[i],
                "reference": question.reference,
                "before_ended": before.ended[i],
                "after_ended": after.ended[i],
                "origin": question.origin,
            }
        )
    return lines
