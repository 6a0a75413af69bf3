"""ppo: proximal policy optimisation from rewards, as InstructGPT does it (2203.02155, 3.5 and C.4; 1707.06347).

Record `Prompt` -> one rollout a time, one rollout an episode -> log-probs and values -> `Ppo`. The reward of a token is
-kl_coef times its log-ratio to the start, and on the last one the completion's reward besides; advantages by GAE. Where
text is mixed in (PPO-ptx), its samples join each step as batches of their own, weighed by the column `ptx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.batch import Sample
from tunesmith.data.batches import order_at
from tunesmith.data.encode import Encoder, tokenizer_hash
from tunesmith.data.records import read_records
from tunesmith.data.store import SampleStore, build_store
from tunesmith.errors import ModelError
from tunesmith.model.critic import Critic, ValueHead
from tunesmith.model.load import load_backbone, load_tokenizer
from tunesmith.model.soft_prompt import context_tokens
from tunesmith.model.trainable import make_trainable
from tunesmith.objectives.advantages import adapted_kl_coef, explained_variance, gae, penalised_rewards, whiten
from tunesmith.objectives.ppo import Ppo
from tunesmith.recipe import PpoSpec
from tunesmith.rollout.actor import Tokens, without_dropout
from tunesmith.rollout.collect import Played
from tunesmith.rollout.source import Mix
from tunesmith.stages.job import Built, Job, trainable_spec
from tunesmith.stages.online import Rounds, build_online, make_policy
from tunesmith.stages.rewarding import critic_start

KIND = "causal"


@dataclass(frozen=True, slots=True)
class EpisodeMethod:
    """Penalised rewards, GAE and whitening over a round; the KL coefficient is carried from round to round."""

    spec: PpoSpec
    grouped: bool = False
    needs_reference: bool = True

    def learned(self, played: Played) -> NDArray[np.bool_]:
        """All of them."""
        return np.ones(len(played), np.bool_)

    def columns(
        self, played: Played, kept: NDArray[np.int64], tokens: Tokens, carried: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Old log-probs and values, advantages and returns."""
        assert tokens.reference is not None and tokens.values is not None, "a policy with its start and a critic"
        spec, mask = self.spec, tokens.mask
        coef = carried.get("kl_coef", spec.kl_coef)
        scores = played.rewards.total + np.where(played.ended, spec.end_bonus, -spec.missing_end_penalty)
        rewards = penalised_rewards(torch.from_numpy(scores), tokens.logprobs, tokens.reference, mask, kl_coef=coef)
        advantages, returns = gae(rewards, tokens.values * mask, mask, gamma=spec.gamma, lam=spec.lam)
        kl = float(((tokens.logprobs - tokens.reference) * mask).sum(1).mean())
        metrics = {"kl": kl, "kl_coef": coef, "return": float((returns * mask).sum() / mask.sum())}
        explained = explained_variance(tokens.values, returns, mask)
        if np.isfinite(explained):
            metrics["explained_variance"] = explained
        if spec.kl_target is not None:
            carried["kl_coef"] = adapted_kl_coef(coef, kl, spec.kl_target)
        return {
            "old_logprobs": tokens.logprobs, "old_values": tokens.values * mask, "returns": returns,
            "advantages": whiten(advantages, mask) if spec.whiten else advantages,
        }, metrics  # fmt: skip


def build(job: Job) -> Built:
    """The stage, measured by the mean reward of held-out prompts."""
    spec, sampling = job.recipe.ppo, job.recipe.sampling
    assert spec is not None and sampling is not None, "the recipe is resolved"
    model = make_policy(job, critic=_critic(job, spec), learn_entropy=spec.entropy_coef > 0)
    per_prompt = sampling.num_per_prompt or 1
    rounds = Rounds(spec.rollouts // per_prompt, per_prompt, spec.epochs, spec.minibatches)
    objective = Ppo(spec.clip, spec.value_coef, spec.value_clip, spec.entropy_coef)
    return build_online(job, model, objective, EpisodeMethod(spec), rounds, mix=_text_mix(job, spec))


def _critic(job: Job, spec: PpoSpec) -> nn.Module | None:
    """None where nothing is trained: a finished run has only its policy."""
    if job.start is not None:
        return None
    if spec.critic == "shared":
        return ValueHead(job.backbone.config.get_text_config().hidden_size)
    return _own(job)


def _own(job: Job) -> nn.Module:
    """A critic with a backbone of its own, started from the reward model where it reads the same tokens, else from
    the base; of it trains what trains of the policy, and its head."""
    backbone, what = _from_reward_run(job)
    if backbone is None:
        backbone = load_backbone(job.base, "classifier", label_names=("value",), seed=job.recipe.seed,
                                 trust=job.recipe.trust_remote_code)  # fmt: skip
    trainable = make_trainable(backbone, replace(trainable_spec(job.recipe, job.folder), adapter=None))
    job.say(f"critic from {what}: {trainable.trainable:,} of {trainable.total:,} parameters train")
    without_dropout(backbone)
    return Critic(backbone, compute=job.compute)


def _from_reward_run(job: Job) -> tuple[nn.Module | None, str]:
    run = critic_start(job.recipe, job)
    if run is None:
        return None, "the base"
    from tunesmith.stages import from_run  # it opens runs, and what opens runs knows every stage

    folder = from_run.model_folder(run.path)
    if tokenizer_hash(load_tokenizer(folder)) != tokenizer_hash(job.tokenizer):
        return None, f"the base (the reward model of {run.path} reads other tokens)"
    try:
        backbone = load_backbone(folder, "classifier")
        Critic(backbone)
    except ModelError:
        return None, f"the base (the reward model of {run.path} is not causal)"
    return backbone, f"the reward model of {run.path}"


def _text_mix(job: Job, spec: PpoSpec) -> Mix | None:
    if not spec.ptx_coef:
        return None
    assert spec.ptx_data is not None, "the recipe is checked"
    from tunesmith.stages.prepare import cache_folder, locate

    context = context_tokens(job.backbone) or 512
    encoder = Encoder(job.tokenizer, "pretrain", min(context, 512), "split")
    store = build_store(read_records(locate(spec.ptx_data, job.folder), stage="pretrain"), encoder, cache_folder(),
                        say=job.say)  # fmt: skip
    return text_mix(store, job.recipe.seed, spec)


def text_mix(store: SampleStore, seed: int, spec: PpoSpec) -> Mix:
    """`ptx_ratio` texts for each rollout of a step, in an order of each pass over them; a function of the step alone.

    The column `ptx` of a text token is ptx_coef · (completion tokens of the step / text tokens of the step).
    """

    def mix(step: int, rollouts: Sequence[Sample]) -> list[Sample]:
        num = max(1, round(spec.ptx_ratio * len(rollouts)))
        places = [divmod(place, len(store)) for place in range((step - 1) * num, step * num)]
        texts = [store[int(order_at(len(store), seed, epoch)[inside])] for epoch, inside in places]
        completion = sum(float((sample.weights > 0).sum()) for sample in rollouts)
        factor = spec.ptx_coef * completion / sum(float((text.weights > 0).sum()) for text in texts)
        names = rollouts[0].columns
        return [
            replace(
                text,
                columns={name: np.zeros(len(text), np.float32) for name in names}
                | {"ptx": np.where(text.weights > 0, factor, 0.0).astype(np.float32)},
            )
            for text in texts
        ]

    return mix
