"""Collector: prompts -> completions with their rewards, the same for training rounds and for measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.kinds import input_text
from tunesmith.data.prompts import PromptSet
from tunesmith.rollout.rewards import Completed, Reward, Rewards
from tunesmith.rollout.sampler import Rollout, Sampler


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Played:
    """N rollouts and what they earned; those of one prompt stand together, `groups [N]` says which one."""

    rollouts: tuple[Rollout, ...]
    completed: tuple[Completed, ...]
    rewards: Rewards
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each completion, its end token included."""
        return np.asarray([len(r.ids) for r in self.rollouts], np.int64)

    @property
    def ended(self) -> NDArray[np.bool_]:
        """Which completions ended by themselves."""
        return np.asarray([r.ended for r in self.rollouts], np.bool_)

    def metrics(self) -> dict[str, float]:
        """Reward with its deviation, each part likewise, length, shares that ended and that differ from all others."""
        total = self.rewards.total
        found = {"reward": float(total.mean()), "reward_std": float(total.std())}
        for name, values in self.rewards.parts.items():
            found |= {f"reward.{name}": float(values.mean()), f"reward_std.{name}": float(values.std())}
        texts = Counter(item.completion for item in self.completed)
        return found | {
            "response_length": float(self.lengths.mean()),
            "ended": float(self.ended.mean()),
            "distinct": len(texts) / len(self.completed),
        }

    def lines(self, number: int, step: int) -> Iterator[dict[str, Any]]:
        """Lines of rollouts.jsonl: one a rollout, of round `number`, learned from first at `step`."""
        for i, (rollout, item) in enumerate(zip(self.rollouts, self.completed, strict=True)):
            yield {
                "step": step, "round": number, "origin": item.origin, "sample": rollout.sample_index,
                "prompt": item.prompt, "completion": item.completion, "reward": float(self.rewards.total[i]),
                "parts": {name: float(values[i]) for name, values in self.rewards.parts.items()},
                "tokens": len(rollout.ids), "ended": rollout.ended,
            }  # fmt: skip


class Collector:
    """Samples for prompts and has the completions rewarded."""

    def __init__(self, sampler: Sampler, reward: Reward, sampling: Sampling) -> None:
        self.sampler, self.reward, self.sampling = sampler, reward, sampling

    def play(self, prompts: PromptSet, chosen: Sequence[int], *, num_per_prompt: int, seed: int) -> Played:
        """`num_per_prompt` rollouts of each chosen prompt: a function of the weights and of (seed, place, number)."""
        how = self.sampling
        rollouts = self.sampler.sample(
            [prompts.ids[i] for i in chosen], num_per_prompt=num_per_prompt, temperature=how.temperature,
            top_p=how.top_p, top_k=how.top_k, max_tokens=how.max_tokens, seed=seed, stop=how.stop,
        )  # fmt: skip
        completed = tuple(_completed(prompts, chosen[r.prompt_index], r) for r in rollouts)
        groups = np.asarray([r.prompt_index for r in rollouts], np.int64)
        return Played(tuple(rollouts), completed, self.reward(completed), groups)


def _completed(prompts: PromptSet, index: int, rollout: Rollout) -> Completed:
    record = prompts.records[index]
    return Completed(
        input_text(record), rollout.text, record.answer, record.columns, record.messages, record.origin,
        rollout.sample_index, len(rollout.ids), rollout.ended, record.plain,
    )  # fmt: skip
