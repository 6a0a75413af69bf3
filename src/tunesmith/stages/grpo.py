"""grpo: several completions of a prompt are each other's baseline (GRPO, 2402.03300, and its relatives).

Record `Prompt` -> rollouts in groups -> log-probs -> `Grpo`. The variants are settings, not branches: DAPO
(2503.14476) clips higher above than below, averages over tokens, leaves out groups whose rewards are all equal and
punishes overlong completions; Dr. GRPO (2503.20783) divides by no deviation and no length; RLOO (2402.14740) compares
with the others of the group and sums over the completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.objectives.advantages import group_advantages
from tunesmith.objectives.grpo import Grpo
from tunesmith.recipe import GrpoSpec
from tunesmith.rollout.actor import Tokens
from tunesmith.rollout.collect import Played
from tunesmith.stages.job import Built, Job
from tunesmith.stages.online import Rounds, build_online, make_policy

KIND = "causal"


@dataclass(frozen=True, slots=True)
class GroupMethod:
    """Advantages over the group; `buffer` tokens before `max_tokens` in which an overlong penalty grows, or None."""

    spec: GrpoSpec
    max_tokens: int
    grouped: bool = True

    @property
    def needs_reference(self) -> bool:
        """Only a KL term asks for it."""
        return bool(self.spec.kl_coef)

    def learned(self, played: Played) -> NDArray[np.bool_]:
        """All rollouts but those cut off, and those of groups without signal, where the recipe leaves them out."""
        kept = played.ended.copy() if self.spec.overlong == "mask" else np.ones(len(played), np.bool_)
        return kept & has_signal(self._rewards(played), played.groups) if self.spec.filter_groups else kept

    def columns(
        self, played: Played, kept: NDArray[np.int64], tokens: Tokens, carried: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One advantage for all tokens of a completion; 0 for a completion that is not learned from."""
        rewards = self._rewards(played)
        advantages = group_advantages(
            torch.from_numpy(rewards), torch.from_numpy(played.groups),
            baseline=self.spec.baseline or "mean", normalise=self.spec.normalise == "std",
        ).float() * torch.from_numpy(self.learned(played))  # fmt: skip
        signal = has_signal(rewards, played.groups)
        firsts = np.unique(played.groups, return_index=True)[1]
        metrics = {"no_signal": float(1 - signal[firsts].mean())}
        columns = {"old_logprobs": tokens.logprobs, "advantages": advantages[kept][:, None] * tokens.mask}
        if tokens.reference is not None:
            columns["reference_logprobs"] = tokens.reference
            metrics["kl"] = float(((tokens.logprobs - tokens.reference) * tokens.mask).sum(1).mean())
        return columns, metrics

    def _rewards(self, played: Played) -> NDArray[np.float64]:
        if self.spec.overlong != "penalty":
            return played.rewards.total
        assert self.spec.overlong_buffer is not None, "the recipe is resolved"
        return played.rewards.total + overlong_penalty(played.lengths, self.max_tokens, self.spec.overlong_buffer)


def has_signal(rewards: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Per rollout, whether the rewards of its group differ: equal ones have an advantage of 0 each."""
    owner = np.unique(groups, return_inverse=True)[1]
    low, high = (np.full(owner.max() + 1, sign * np.inf) for sign in (1, -1))
    np.minimum.at(low, owner, rewards)
    np.maximum.at(high, owner, rewards)
    return (high > low)[owner]


def overlong_penalty(lengths: NDArray[np.int64], max_tokens: int, buffer: int) -> NDArray[np.float64]:
    """0 up to max_tokens - buffer, then down in a straight line to -1 at max_tokens (DAPO, 2503.14476, eq. 13)."""
    return -np.clip((lengths - (max_tokens - buffer)) / buffer, 0.0, 1.0)


def build(job: Job) -> Built:
    """The stage, measured by the mean reward of held-out prompts."""
    spec, sampling = job.recipe.grpo, job.recipe.sampling
    assert spec is not None and sampling is not None and spec.clip is not None and spec.clip_high is not None
    assert spec.length_normalisation is not None, "the recipe is resolved"
    objective = Grpo(spec.clip, spec.clip_high, spec.kl_coef or 0.0, spec.length_normalisation, sampling.max_tokens)
    rounds = Rounds(spec.prompts, spec.group, spec.epochs, spec.minibatches)
    return build_online(job, make_policy(job), objective, GroupMethod(spec, sampling.max_tokens), rounds)
