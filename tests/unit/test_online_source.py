"""Rounds as pure functions, samples kept bit for bit, the start that never moves, the mix, the warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_causal, tiny_classifier, tiny_tokenizer

from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.data.kinds import Message, Prompt
from tunesmith.data.prompts import encode_prompts
from tunesmith.engine.metrics import MetricsLog
from tunesmith.errors import DataError, ModelError
from tunesmith.model.critic import Critic, ValueHead
from tunesmith.model.language import LanguageModel, Policy
from tunesmith.model.lean import make_lean
from tunesmith.model.packing import Layout
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.recipe import GrpoSpec, PpoSpec
from tunesmith.rollout import rules, sampler
from tunesmith.rollout.actor import Actor, take_tokens, without_dropout
from tunesmith.rollout.collect import Collector, Sampling
from tunesmith.rollout.keeping import pack_samples, unpack_samples
from tunesmith.rollout.rewards import Part, Reward
from tunesmith.rollout.sampler import Sampler
from tunesmith.rollout.schedule import Schedule, steps_for
from tunesmith.rollout.source import OnlineSource
from tunesmith.stages.grpo import GroupMethod
from tunesmith.stages.online import warnings_of, watcher
from tunesmith.stages.ppo import EpisodeMethod, text_mix

GRPO = GrpoSpec(
    prompts=2, group=3, epochs=2, minibatches=2, clip=0.2, clip_high=0.2, kl_coef=0.1, baseline="mean", normalise="std",
    length_normalisation="completion", overlong="keep", filter_groups=False,
)  # fmt: skip
SCHEDULE = Schedule(seed=3, num_prompts=5, prompts=2, num_per_prompt=3, epochs=2, minibatches=2, num_steps=12)


def prompt_set(num: int = 5) -> Any:
    records = [Prompt((Message("user", f"cat {i}"),), origin=f"p.jsonl:{i + 1}") for i in range(num)]
    return encode_prompts(
        records, tiny_tokenizer(), max_tokens=50, room="50", on_too_long="error", fingerprint=str(num)
    )


def policy(**options: Any) -> LanguageModel:
    backbone = tiny_causal("llama", **options)
    make_trainable(backbone, TrainableSpec("full"))
    return LanguageModel(backbone, policy=Policy(), critic=None)


def source(model: LanguageModel, folder: Path | None = None, method: Any = None, **settings: Any) -> OnlineSource:
    reward = Reward((Part("letters", rules.matches("[a-e]")),))
    collector = Collector(Sampler(model, tiny_tokenizer()), reward, Sampling(max_tokens=6, stop=("e", "o")))
    log = None if folder is None else MetricsLog(folder / "rollouts.jsonl")
    made = GroupMethod(GRPO, 6) if method is None else method
    return OnlineSource(
        SCHEDULE, prompt_set(), collector, Actor(model), made, micro_batch_tokens=60, log=log, **settings
    )


def same(a: list[Any], b: list[Any]) -> bool:
    def of(batch: Any) -> list[torch.Tensor]:
        return [batch.input_ids, batch.weights, *(batch.columns[name] for name in sorted(batch.columns))]

    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(of(p), of(q), strict=True)
    )


def test_rounds_and_their_parts_are_pure_functions():
    assert [SCHEDULE.place(step) for step in (1, 4, 5, 12)] == [(0, 0), (0, 3), (1, 0), (2, 3)]
    seen = [i for number in range(5) for i in SCHEDULE.prompts_of(number)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]  # rounds run on over the end of the data
    parts = SCHEDULE.parts(1, 0, 7)
    assert sorted(i for part in parts for i in part) == list(range(7)) and [len(p) for p in parts] == [4, 3]
    assert parts == SCHEDULE.parts(1, 0, 7) and parts != SCHEDULE.parts(1, 1, 7) and parts != SCHEDULE.parts(2, 0, 7)
    assert steps_for(10, 4, 6, epochs=1.0, steps=None) == 18 and steps_for(10, 4, 6, epochs=None, steps=7) == 7


def test_samples_are_kept_bit_for_bit():
    draw = np.random.default_rng(0)
    made = []
    for i, length in enumerate((3, 7, 2)):
        weights = np.ones(length, np.float32)
        weights[0] = 0
        columns = {"x": draw.normal(size=length).astype(np.float32), "y": np.full(length, np.float32(1e-42))}
        made.append(Sample(draw.integers(0, 9, length).astype(np.int32), weights, columns, group=i, origin=f"a:{i}"))
    back = unpack_samples(json.loads(json.dumps(pack_samples(made))))
    for was, now in zip(made, back, strict=True):
        assert (was.origin, was.group, was.ids.dtype) == (now.origin, now.group, now.ids.dtype)
        assert was.ids.tobytes() == now.ids.tobytes() and was.weights.tobytes() == now.weights.tobytes()
        assert all(was.columns[n].tobytes() == now.columns[n].tobytes() for n in ("x", "y"))
    assert unpack_samples(json.loads(json.dumps(pack_samples(made[:1]))))[0].group == 0


def test_tokens_of_a_completion_are_those_that_predict_it():
    samples = [
        Sample(np.arange(5, dtype=np.int32), np.array([0, 0, 0, 1, 1], np.float32)),
        Sample(np.arange(3, dtype=np.int32), np.array([0, 1, 1], np.float32)),
    ]
    batch = collate(samples)
    rows = torch.zeros(4, 3)
    take_tokens(rows, batch, [3, 1], counts=[2, 2], values=torch.arange(8.0)[None])
    assert rows.tolist() == [[0, 0, 0], [5, 6, 0], [0, 0, 0], [2, 3, 0]]
    assert torch.equal(batch.weights[0].nonzero().flatten(), torch.tensor([2, 3, 5, 6]))


def test_old_logprobs_are_the_training_forward_s_to_the_bit():
    model = policy()
    made = source(model)
    for batch in made.step_batches(1):
        now = model(batch).logprobs
        counted = batch.weights > 0
        assert torch.equal(now[counted], batch.columns["old_logprobs"][counted])
        assert torch.equal(batch.columns["reference_logprobs"][counted], batch.columns["old_logprobs"][counted])
    assert made.metrics(1)["sampler_error"] < 1e-5


def test_dropout_would_spoil_the_ratio_and_is_found_or_removed():
    model = policy(attention_dropout=0.5)
    with pytest.raises(ModelError, match=r"answers differently the second time.*dropout"):
        source(model).step_batches(1)
    assert len(without_dropout(model)) == 2  # one a layer
    assert source(model).step_batches(1)


def test_dropout_that_was_made_lean_is_removed_too():
    backbone = tiny_causal("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    make_trainable(backbone, TrainableSpec("lora", rank=4))
    make_lean(backbone, torch.float32)
    model = LanguageModel(backbone, policy=Policy())
    with pytest.raises(ModelError, match="answers differently the second time"):
        source(model).step_batches(1)
    without_dropout(model)
    assert source(model).step_batches(1)


def test_a_sampler_that_disagrees_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    model = policy()
    made = source(model)
    plain = sampler.next_tokens

    def louder(logits: Any, *args: Any, **settings: Any) -> Any:
        return plain(1.1 * logits, *args, **settings)

    monkeypatch.setattr(sampler, "next_tokens", louder)
    with pytest.raises(ModelError, match="sampler and trainer disagree"):
        made.step_batches(1)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 6])
def test_a_restored_source_gives_the_same_batches(tmp_path: Path, stop_after: int):
    model = policy()
    first = source(model, tmp_path)
    for step in range(1, stop_after + 1):
        first.step_batches(step)
    state = json.loads(json.dumps(first.state()))
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    later = [first.step_batches(step) for step in range(stop_after + 1, 9)]
    whole = (tmp_path / "rollouts.jsonl").read_bytes()
    again = source(model, tmp_path)
    again.restore(state)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == before
    assert all(same(a, again.step_batches(s)) for s, a in zip(range(stop_after + 1, 9), later, strict=True))
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole
    assert again.metrics(8) == first.metrics(8)


def test_the_middle_of_a_round_is_not_sampled_again(monkeypatch: pytest.MonkeyPatch):
    model = policy()
    made = source(model)
    wanted = made.step_batches(1), made.step_batches(2)
    other = source(model)
    other.restore(made.state())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # as after a step: sampling now would give other rollouts
    assert same(other.step_batches(2), wanted[1])
    fresh = source(model)
    assert not same(fresh.step_batches(2), wanted[1])  # control: without the state they differ


@pytest.mark.parametrize("method", ["full", "lora", "last_layers"])
def test_the_start_gets_no_gradient_and_does_not_move(method: str):
    backbone = tiny_causal("llama")
    make_trainable(backbone, TrainableSpec(method, rank=4))
    model = LanguageModel(backbone, policy=Policy())
    actor = Actor(model)
    batch = collate([Sample(np.array([7, 8, 9, 10], np.int32), np.array([0, 1, 1, 1], np.float32))])
    start = actor.reference(batch)
    assert torch.equal(start, actor.answer(batch).logprobs) and not start.requires_grad
    before = {name: tensor.clone() for name, tensor in actor._start.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        (-model(batch).logprobs.sum()).backward()
        optimizer.step()
    assert all(torch.equal(before[name], tensor) and tensor.grad is None for name, tensor in actor._start.items())
    assert torch.equal(actor.reference(batch), start)
    assert not torch.equal(actor.answer(batch).logprobs, start)  # control: the policy has moved


def test_an_adapter_that_goes_on_starts_where_it_was_not_at_the_base():
    backbone = tiny_causal("llama")
    make_trainable(backbone, TrainableSpec("lora", rank=4))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model = LanguageModel(backbone, policy=Policy())
    batch = collate([Sample(np.array([7, 8, 9], np.int32), np.array([0, 1, 1], np.float32))])
    assert torch.equal(Actor(model).reference(batch), model(batch).logprobs)


def test_entropy_and_its_gradient_are_those_of_the_plain_formula():
    for families in ("llama", "gemma3", "gpt2"):
        backbone = tiny_causal(families)
        sample = Sample(np.array([7, 8, 9, 10, 11], np.int32), np.array([0, 0, 1, 1, 1], np.float32))
        batch = collate([sample])
        model = LanguageModel(backbone, policy=Policy(temperature=1.7, learn_entropy=True))
        counted = batch.weights[0] > 0
        every = (model._packed_logits(batch)[counted].double() / 1.7).log_softmax(-1)
        plain = -(every.exp() * every).sum(-1), every.gather(1, batch.targets[0][counted][:, None])[:, 0]
        ours = model(batch)
        torch.testing.assert_close(ours.entropy[0][counted].double(), plain[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.logprobs[0][counted].double(), plain[1], atol=1e-5, rtol=0)
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        wanted = torch.autograd.grad((2 * plain[0] - plain[1]).sum(), parameters, allow_unused=True)
        found = torch.autograd.grad((2 * ours.entropy - ours.logprobs).sum(), parameters, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_a_critic_values_every_state_whatever_stands_beside_it():
    backbone = tiny_classifier("llama", labels=1)
    critic = Critic(backbone)
    rows = [np.array([7, 8, 9, 10], np.int32), np.array([20, 21], np.int32)]
    together = critic(collate([Sample(r, np.zeros(len(r), np.float32)) for r in rows]))
    for i, row in enumerate(rows):
        alone = critic(collate([Sample(row, np.zeros(len(row), np.float32))]))
        torch.testing.assert_close(together[:, :4] if i == 0 else together[:, 4:], alone, atol=1e-6, rtol=0)
    with torch.no_grad():
        scored = backbone(input_ids=torch.tensor(rows[0][None].astype(np.int64))).logits[0, 0]
    torch.testing.assert_close(together[0, 3], scored, atol=1e-6, rtol=0)  # its last value is the model's own score


def test_a_shared_head_starts_at_0_and_learns_through_the_policy():
    backbone = tiny_causal("llama")
    model = LanguageModel(backbone, policy=Policy(), critic=ValueHead(32))
    batch = collate([Sample(np.array([7, 8, 9], np.int32), np.array([0, 1, 1], np.float32))])
    values = model(batch).values
    assert values.tolist() == [[0.0, 0.0, 0.0]]
    values.sum().backward()
    assert model.critic.linear.weight.grad.abs().sum() > 0
    assert model(batch, values=False).values is None


def test_text_is_weighed_as_the_coefficient_says():
    store = [
        Sample(np.arange(n, dtype=np.int32), np.r_[0, np.ones(n - 1)].astype(np.float32), origin=f"t:{n}")
        for n in (3, 5, 4)
    ]
    rollouts = [
        Sample(np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], np.float32), {"old": np.zeros(6)})
    ] * 2
    mix = text_mix(store, 0, PpoSpec(ptx_coef=0.5, ptx_data="x", ptx_ratio=1.5))
    texts = mix(1, rollouts)
    assert len(texts) == 3 and {t.origin for t in texts} == {"t:3", "t:4", "t:5"}
    assert all(set(t.columns) == {"old", "ptx"} for t in texts)
    assert sum(float(t.columns["ptx"].sum()) for t in texts) == pytest.approx(0.5 * 8)
    assert len({tuple(t.origin for t in mix(step, rollouts)) for step in range(1, 9)}) > 1  # each pass in its order
    assert all(np.array_equal(a.columns["ptx"], b.columns["ptx"]) for a, b in zip(mix(1, rollouts), texts, strict=True))


def test_the_kl_coefficient_adapts_and_is_carried():
    model = policy()
    model.critic = ValueHead(32)
    made = source(model, method=EpisodeMethod(PpoSpec(kl_coef=0.1, kl_target=5.0)))
    made.step_batches(1)
    assert made.metrics(1)["kl_coef"] == 0.1 and made.metrics(1)["kl"] == 0.0
    made.step_batches(5)
    assert made.metrics(5)["kl_coef"] == pytest.approx(0.1 * 0.98)  # KL 0 is far below its target
    assert json.loads(json.dumps(made.state()))["carried"]["kl_coef"] == pytest.approx(0.1 * 0.98**2)


def test_the_reward_of_the_end_is_for_those_that_end():
    model = policy()
    model.critic = ValueHead(32)

    def total(**bonus: float) -> float:
        spec = PpoSpec(kl_coef=0.0, lam=1.0, whiten=False, **bonus)
        made = source(model, method=EpisodeMethod(spec))
        batches = [batch for step in (1, 2) for batch in made.step_batches(step)]
        return sum(float((b.columns["advantages"] * (b.weights > 0)).sum()) for b in batches), made.metrics(1)

    (plain, metrics), (bonus, _), (penalty, _) = total(), total(end_bonus=1.0), total(missing_end_penalty=1.0)
    assert 0 < metrics["ended"] < 1, "the task is chosen so that some end"
    assert bonus > plain > penalty


def rounds(**changes: float) -> Mapping[str, float]:
    return {"distinct": 1.0, "round_entropy": 2.0, "ended": 0.5, "reward_std": 0.3, "reward": 0.1} | changes


def test_warnings_name_the_metric_that_shows_it():
    assert warnings_of(rounds(), 8) == {}
    assert "collapsed" in warnings_of(rounds(distinct=0.02), 8)["distinct"]
    assert "entropy" in warnings_of(rounds(round_entropy=0.001), 8)["distinct"]
    assert "sampling.max_tokens 8" in warnings_of(rounds(ended=0.0), 8)["ended"]
    assert "same reward, 0.1" in warnings_of(rounds(reward_std=0.0), 8)["reward_std"]
    said: list[str] = []
    notice = watcher(said.append, 8)
    for metrics in (rounds(), rounds(ended=0.0), rounds(ended=0.0), rounds(ended=0.0, reward_std=0.0)):
        notice(metrics)
    assert len(said) == 2 and "(ended 0.00)" in said[0] and "reward_std" in said[1]


def test_prompts_are_refused_cut_or_dropped():
    records = [Prompt((Message("user", "a" * n),), origin=f"p.jsonl:{n}") for n in (2, 60, 90)]

    def encode(policy: str) -> Any:
        tokenizer = tiny_tokenizer(chat=False)
        return encode_prompts(records, tokenizer, max_tokens=40, room="test", on_too_long=policy, fingerprint="x")

    with pytest.raises(DataError, match=r"2 prompts have more than 40 tokens \(test\): p\.jsonl:60 .*p\.jsonl:90"):
        encode("error")
    assert [len(ids) for ids in encode("truncate_left").ids][1:] == [40, 40]
    assert len(encode("drop")) == 1 and encode("drop").tally["dropped_too_long"] == 2


def test_a_prompt_to_go_on_with_is_the_bare_text():
    records = [Prompt((Message("user", "the cat"),), origin="p.jsonl:1")]

    def ids(raw: bool) -> list[int]:
        tokenizer = tiny_tokenizer()
        made = encode_prompts(
            records, tokenizer, max_tokens=40, room="", on_too_long="error", fingerprint="", raw=raw
        )  # fmt: skip
        return list(made.ids[0])

    assert ids(True) == tiny_tokenizer()("the cat")["input_ids"] != ids(False)


@pytest.mark.parametrize("layout", [Layout.ALONE, Layout.PADDED])
def test_a_family_that_cannot_be_packed_is_the_same_policy_and_critic(layout: Layout):
    rows = [np.array([7, 8, 9, 10], np.int32), np.array([20, 21, 22], np.int32)]
    batch = collate([Sample(r, np.r_[0, np.ones(len(r) - 1)].astype(np.float32)) for r in rows])
    head = ValueHead(32)
    torch.nn.init.normal_(head.linear.weight)
    for critic in (head, Critic(tiny_classifier("llama", labels=1))):
        model = LanguageModel(tiny_causal("llama"), policy=Policy(temperature=1.3), critic=critic)
        packed = model(batch)
        assert model.layout is Layout.PACKED
        model.layout = layout
        if isinstance(critic, Critic):
            critic.layout = layout
        other = model(batch)
        for name in ("logprobs", "entropy", "values"):
            torch.testing.assert_close(getattr(other, name), getattr(packed, name), atol=1e-5, rtol=0)
