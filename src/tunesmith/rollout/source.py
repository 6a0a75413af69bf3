"""OnlineSource: data that the policy makes itself. Sample -> reward -> advantage -> the batches of the next steps.

A round is sampled with the weights of the moment; its rollouts serve `epochs * minibatches` steps. Old log-probs are
not the sampler's but those of the training forward, taken once a round over the very batches of its first pass, so the
ratio at the first step is 1 to the bit; the sampler's are compared with them in every round.

Resuming in the middle of a round is exact because the rollouts of the running round stand in the checkpoint, with every
number that was computed from the weights of its beginning. To make them again would need those weights as well, which
is more to keep than the rollouts are, and a reward that answers the same twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate, pack
from tunesmith.data.prompts import PromptSet
from tunesmith.engine.metrics import MetricsLog
from tunesmith.errors import ModelError
from tunesmith.rollout.actor import Actor, Tokens, padded, take_tokens
from tunesmith.rollout.collect import Collector, Played
from tunesmith.rollout.keeping import pack_samples, unpack_samples
from tunesmith.rollout.sampler import stream_seed
from tunesmith.rollout.schedule import Schedule

SAMPLER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Nats by which one token's log-prob may differ between sampler and trainer before the run stops. In fp32 the two
agree within 1e-5 on sound models; in bf16 rounding in the hidden states is worth some hundredths, rarely tenths."""


class Method(Protocol):
    """What makes PPO of rollouts, or GRPO."""

    @property
    def grouped(self) -> bool:
        """Whether the completions of a prompt stay in one batch."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the policy's start are asked for."""
        ...

    def learned(self, played: Played) -> NDArray[np.bool_]:
        """Which rollouts are learned from, `[N]`."""
        ...

    def columns(
        self, played: Played, kept: NDArray[np.int64], tokens: Tokens, carried: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(columns `[K, T]` of the K rollouts `kept`, metrics); `carried` goes from round to round and may change."""
        ...


Mix = Callable[[int, Sequence[Sample]], list[Sample]]
"""(step, its rollouts) -> samples that join it, with the same columns."""


@dataclass(frozen=True, slots=True)
class Round:
    """What the steps of one round learn from. Samples of one group stand in one unit."""

    number: int
    samples: tuple[Sample, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def units(self) -> list[list[int]]:
        """Indices of the samples that stay together."""
        found: dict[int | None, list[int]] = {}
        for i, sample in enumerate(self.samples):
            found.setdefault(sample.group, []).append(i)
        return list(found.values())


class OnlineSource:
    """The batches of `schedule`, made round by round. `log` receives every rollout; `notice` sees a round's metrics."""

    def __init__(
        self,
        schedule: Schedule,
        prompts: PromptSet,
        collector: Collector,
        actor: Actor,
        method: Method,
        *,
        micro_batch_tokens: int,
        log: MetricsLog | None = None,
        mix: Mix | None = None,
        notice: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.schedule, self.prompts, self.collector, self.actor = schedule, prompts, collector, actor
        self._method, self._micro, self._log, self._mix, self._notice = method, micro_batch_tokens, log, mix, notice
        self._round: Round | None = None
        self._carried: dict[str, float] = {}
        self._checked = False

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.schedule.num_steps

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the prompts."""
        return self.schedule.steps_per_epoch

    def at_boundary(self, step: int) -> bool:
        """True when `step` ends a pass over the prompts."""
        return step % self.steps_per_epoch == 0

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of `step`; the first of a round samples it."""
        number, inside = self.schedule.place(step)
        if self._round is None or self._round.number != number:
            self._round = self._begin(number, step)
        chosen = self._chosen(self._round, inside)
        batches = [collate([self._round.samples[i] for i in part]) for part in self._packed(self._round, chosen)]
        joined = self._mix(step, [self._round.samples[i] for i in chosen]) if self._mix is not None else []
        parts = pack([len(sample) for sample in joined], range(len(joined)), self._micro)
        return batches + [collate([joined[i] for i in part]) for part in parts]

    def metrics(self, step: int) -> Mapping[str, float]:
        """What is known of the rollouts that `step` learns from."""
        return {} if self._round is None else self._round.metrics

    def state(self) -> dict[str, Any]:
        """The running round, what is carried between rounds, and how long the log is."""
        kept = None
        if self._round is not None:
            kept = {"number": self._round.number, "metrics": dict(self._round.metrics)}
            kept["samples"] = pack_samples(self._round.samples)
        if self._log is not None:
            self._log.sync()
        size = 0 if self._log is None else self._log.size()
        return {"round": kept, "carried": dict(self._carried), "rollouts_bytes": size}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; lines of rounds that will be sampled again leave the log."""
        kept = state["round"]
        self._round = None
        if kept is not None:
            self._round = Round(kept["number"], unpack_samples(kept["samples"]), dict(kept["metrics"]))
        self._carried = dict(state["carried"])
        if self._log is not None:
            self._log.cut(state["rollouts_bytes"])

    def _chosen(self, round: Round, inside: int) -> list[int]:
        """Indices of the samples that step `inside` of the round learns from."""
        epoch, part = divmod(inside, self.schedule.minibatches)
        units = round.units
        return [i for unit in self.schedule.parts(round.number, epoch, len(units))[part] for i in units[unit]]

    def _packed(self, round: Round, chosen: Sequence[int]) -> list[list[int]]:
        """The chosen samples in micro-batches: a function of their lengths alone."""
        return pack([len(round.samples[i]) for i in chosen], chosen, self._micro)

    def _begin(self, number: int, step: int) -> Round:
        """Sample round `number`, reward it, and work out what its steps need."""
        schedule = self.schedule
        seed = stream_seed(schedule.seed, number, -1)
        played = self.collector.play(
            self.prompts, schedule.prompts_of(number), num_per_prompt=schedule.num_per_prompt, seed=seed
        )
        kept = self._kept(played)
        bare = Round(number, tuple(rollout_sample(played, i, self._method.grouped) for i in kept))
        tokens = self._tokens(played, kept, bare)
        carried = dict(self._carried)
        columns, metrics = self._method.columns(played, kept, tokens, carried)
        metrics = {**played.metrics(), **_agreement(tokens), **metrics}
        self._compare(metrics)
        samples = tuple(_with_columns(sample, columns, row) for row, sample in enumerate(bare.samples))
        self._write(played, number, step)
        self._carried = carried
        if self._notice is not None:
            self._notice({**metrics, "round_entropy": float((tokens.entropy * tokens.mask).sum() / tokens.mask.sum())})
        return Round(number, samples, metrics)

    def _kept(self, played: Played) -> NDArray[np.int64]:
        """Rollouts that go into the batches: those learned from, or all when they would not fill every step."""
        learned = self._method.learned(played)
        units = len(np.unique(played.groups[learned])) if self._method.grouped else int(learned.sum())
        return np.flatnonzero(learned) if units >= self.schedule.minibatches else np.arange(len(played))

    def _tokens(self, played: Played, kept: NDArray[np.int64], bare: Round) -> Tokens:
        """The forward passes of a round, over the batches of its first pass over the data."""
        counts = [len(played.rollouts[i].ids) for i in kept]
        width = max(counts)
        rows = {name: torch.zeros(len(kept), width) for name in ("logprobs", "entropy", "reference", "values")}
        found: set[str] = set()
        for inside in range(self.schedule.minibatches):
            for part in self._packed(bare, self._chosen(bare, inside)):
                batch = collate([bare.samples[i] for i in part])
                for name, values in self._answers(batch).items():
                    take_tokens(rows[name], batch, part, counts=[counts[i] for i in part], values=values.cpu())
                    found.add(name)
        mask = (torch.arange(width)[None] < torch.tensor(counts)[:, None]).float()
        sampled = padded((played.rollouts[i].logprobs for i in kept), width)
        return Tokens(
            mask, rows["logprobs"], sampled, rows["entropy"],
            rows["reference"] if "reference" in found else None, rows["values"] if "values" in found else None,
        )  # fmt: skip

    def _answers(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.actor.answer(batch)
        assert outputs.logprobs is not None and outputs.entropy is not None, "a policy answers with both"
        if not self._checked:
            self.actor.check(batch, outputs.logprobs)
            self._checked = True
        found = {"logprobs": outputs.logprobs, "entropy": outputs.entropy}
        if outputs.values is not None:
            found["values"] = outputs.values
        if self._method.needs_reference:
            found["reference"] = self.actor.reference(batch)
        return found

    def _compare(self, metrics: Mapping[str, float]) -> None:
        limit = SAMPLER_TOLERANCE.get(self.actor.model.compute, 1.0)
        if not metrics["sampler_error"] <= limit:
            raise ModelError(
                f"sampler and trainer disagree on a token's log-prob by {metrics['sampler_error']:.1e} nats, where "
                f"{limit:g} is the limit: this model's cache does not give what its plain forward gives"
            )

    def _write(self, played: Played, number: int, step: int) -> None:
        if self._log is None:
            return
        if number == 0:
            self._log.cut(0)  # lines of a start that left no checkpoint
        for line in played.lines(number, step):
            self._log.append(line)


def _agreement(tokens: Tokens) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's: the largest and the mean distance, nats."""
    gap = (tokens.sampled - tokens.logprobs).abs() * tokens.mask
    return {"sampler_error": float(gap.max()), "sampler_error_mean": float(gap.sum() / tokens.mask.sum())}


def rollout_sample(played: Played, index: int, grouped: bool) -> Sample:
    """Prompt and completion, the completion's tokens counting 1."""
    rollout, item = played.rollouts[index], played.completed[index]
    ids = np.asarray([*rollout.prompt_ids, *rollout.ids], np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(rollout.prompt_ids) :] = 1.0
    group = int(played.groups[index]) if grouped else int(index)
    return Sample(ids, weights, group=group, origin=f"{item.origin}#{rollout.sample_index + 1}")


def _with_columns(sample: Sample, columns: Mapping[str, Tensor], row: int) -> Sample:
    """`columns [K, T]`, from a completion's first token on, beside the sample's ids."""
    start = int(np.argmax(sample.weights > 0))
    found = {}
    for name, values in columns.items():
        column = np.zeros(len(sample), np.float32)
        column[start:] = values[row, : len(sample) - start].numpy()
        found[name] = column
    return replace(sample, columns=found)
