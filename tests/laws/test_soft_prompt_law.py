"""Law: a soft prompt packed is one by one, is PEFT's own both ways, and off is not there. Control: on, it does much."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.laws.test_packing_law import grads, make_samples
from tests.tiny import CAUSAL, save_tiny, tiny_causal, tiny_classifier, tiny_masked, tiny_tokenizer

from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.errors import ModelError
from tunesmith.export.merge import export_run
from tunesmith.model import adapters, soft_prompt
from tunesmith.model.critic import Critic, ValueHead
from tunesmith.model.language import LanguageModel, Policy
from tunesmith.model.lean import make_lean
from tunesmith.model.packing import (
    Layout,
    flat_hidden,
    layout_for,
    own_logits,
    probe_batch,
    recompute_activations,
    segment_hidden,
)
from tunesmith.model.score import ScoreModel
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.rollout.actor import Actor
from tunesmith.rollout.sampler import Sampler

peft = pytest.importorskip("peft")
N = 3
IDS = torch.arange(7, 19)[None]
WINDOWED = ("gemma3", "mistral")
WHOLE = tuple(family for family in CAUSAL if family not in WINDOWED)
SETUPS = [*((f, "PROMPT_TUNING") for f in CAUSAL), *((f, "PREFIX_TUNING") for f in WHOLE)]
both_kinds = pytest.mark.parametrize("kind", soft_prompt.KINDS)


def spec(kind, **options):
    return TrainableSpec("peft", peft={"peft_type": kind, "num_virtual_tokens": N, **options})


def prompted(family, kind, build=tiny_causal, **options):
    backbone = build(family)
    make_trainable(backbone, spec(kind, **options))
    return backbone


@torch.no_grad()
def alone(backbone, ids=IDS):
    """The family's own logits of one row behind the soft prompt."""
    inputs, before = soft_prompt.row_inputs(backbone, ids)
    logits = backbone(**inputs).logits
    return logits[:, before:] if logits.dim() == 3 else logits


@torch.no_grad()
def theirs(model, kind, *, classifier=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits[:, N:] if kind == "PROMPT_TUNING" and not classifier else logits


def opened_by_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def made_by_peft(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(("family", "kind"), SETUPS)
def test_packed_is_one_by_one_in_value_and_gradient(family, kind):
    model = LanguageModel(prompted(family, kind))
    assert model.layout is Layout.PACKED
    samples = make_samples()
    packed = model(collate(samples)).logprobs
    packed.sum().backward()
    found = grads(model)
    parts = []
    for sample in samples:
        rows = soft_prompt.row_inputs(model.backbone, torch.tensor(sample.ids.astype("int64"))[None])
        logits = model.backbone(**rows[0]).logits[0, rows[1] :].log_softmax(-1)
        targets = torch.tensor(sample.ids[1:].astype("int64"))
        weighed = torch.tensor(sample.weights[1:]) > 0
        parts += [logits[:-1].gather(1, targets[:, None])[:, 0] * weighed, torch.zeros(1)]
    torch.testing.assert_close(packed[0], torch.cat(parts), rtol=1e-4, atol=1e-5)
    model.zero_grad()
    torch.cat(parts).sum().backward()
    assert found.abs().max() > 1e-2, "control: the soft prompt has a gradient"
    torch.testing.assert_close(found, grads(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), SETUPS)
def test_ours_opens_in_peft_and_theirs_here_with_the_same_logits(family, kind, tmp_path):
    ours = prompted(family, kind)
    adapters.save_adapter(ours, tmp_path / "ours", "tiny/base")
    torch.testing.assert_close(
        theirs(opened_by_peft(tiny_causal(family), tmp_path / "ours"), kind), alone(ours), rtol=1e-4, atol=1e-5
    )
    config = peft.get_peft_config({"peft_type": kind, "num_virtual_tokens": N, "task_type": "CAUSAL_LM"})
    made = made_by_peft(tiny_causal(family), config)
    made.save_pretrained(str(tmp_path / "theirs"))
    opened = tiny_causal(family)
    adapters.load_adapter(opened, tmp_path / "theirs")
    torch.testing.assert_close(alone(opened), theirs(made, kind), rtol=1e-4, atol=1e-5)
    assert (alone(opened) - alone(ours)).abs().max() > 1e-2, "control: two prompts differ"
    adapters.load_adapter(again := tiny_causal(family), tmp_path / "ours")
    assert torch.equal(alone(again), alone(ours))


def test_a_prefix_that_peft_reparametrised_opens_too(tmp_path):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=8
    )
    made = made_by_peft(tiny_causal("gpt2"), config)
    made.save_pretrained(str(tmp_path))
    adapters.load_adapter(opened := tiny_causal("gpt2"), tmp_path)
    torch.testing.assert_close(alone(opened), theirs(made, "PREFIX_TUNING"), rtol=1e-4, atol=1e-5)


@both_kinds
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_it_trains_and_off_it_is_the_base(family, kind):
    backbone = tiny_causal(family)
    base = alone(backbone)
    made = make_trainable(backbone, spec(kind))
    width = 16 if family == "llama" else 32
    assert made.trainable == (N * 32 if kind == "PROMPT_TUNING" else N * 2 * 2 * width)
    assert made.names == ("soft_prompt.prompt_embeddings",)
    tuned = alone(backbone)
    assert (tuned - base).abs().max() > 1e-2
    with adapters.disabled(backbone):
        assert torch.equal(alone(backbone), base)
        model = LanguageModel(backbone)
        off = model(collate(make_samples())).logprobs
    assert torch.equal(alone(backbone), tuned)
    assert (model(collate(make_samples())).logprobs - off).abs().max() > 1e-2
    adapters.remove(backbone)
    assert torch.equal(alone(backbone), base) and not hasattr(backbone, soft_prompt.PLACE)


@pytest.mark.parametrize(("family", "kind"), SETUPS)
def test_greedy_sampling_is_the_argmax_of_the_whole_forward(family, kind):
    model = LanguageModel(prompted(family, kind))
    sampler = Sampler(model, tiny_tokenizer())
    prompts = [[7, 8, 9, 30, 31, 40, 41, 42, 43], [12], [60, 61, 62, 63]]
    rollouts = sampler.sample(prompts, max_tokens=6, temperature=0.0, num_per_prompt=2)
    assert sampler.why_slow == "a soft prompt stands before its tokens" or family not in ("llama", "qwen3")
    for rollout in rollouts:
        row = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
        logits = alone(model.backbone, row)[0, len(rollout.prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(rollout.ids)
        logprobs = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def test_the_sampler_leaves_room_for_virtual_tokens():
    model = LanguageModel(prompted("gpt2", "PROMPT_TUNING"))
    sampler = Sampler(model, tiny_tokenizer())
    with pytest.raises(ModelError, match="takes 253 in all"):
        sampler.sample([[7] * 253], max_tokens=4)
    (rollout,) = sampler.sample([[7] * 250], max_tokens=9, temperature=0.0)
    assert len(rollout.ids) <= 3


def test_classifier_and_critic_behind_a_prompt(tmp_path):
    backbone = prompted("llama", "PROMPT_TUNING", tiny_classifier)
    assert {p for p, q in backbone.named_parameters() if q.requires_grad} == {
        "score.weight", "soft_prompt.prompt_embeddings",
    }  # fmt: skip
    model = ScoreModel(backbone)
    batch = probe_batch(backbone)
    torch.testing.assert_close(
        model(batch).scores, own_logits(backbone, batch, Layout.ALONE).float(), rtol=1e-4, atol=1e-5
    )
    backbone.score.weight.data.mul_(2)
    adapters.save_adapter(backbone, tmp_path, "tiny/base")
    there = opened_by_peft(tiny_classifier("llama"), tmp_path)
    torch.testing.assert_close(theirs(there, "PROMPT_TUNING", classifier=True), alone(backbone), rtol=1e-4, atol=1e-5)
    adapters.load_adapter(again := tiny_classifier("llama"), tmp_path)
    assert torch.equal(alone(again), alone(backbone))


@both_kinds
def test_values_of_a_head_on_the_policy_are_read_at_its_own_tokens(kind):
    backbone = prompted("llama", kind)
    head = ValueHead(32)
    torch.nn.init.normal_(head.linear.weight)
    model = LanguageModel(backbone, critic=head)
    samples = make_samples()
    values = model(collate(samples)).values[0]
    one_by_one = torch.cat([model(collate([sample])).values[0] for sample in samples])
    torch.testing.assert_close(values, one_by_one, rtol=1e-4, atol=1e-5)
    model.layout = Layout.ALONE
    torch.testing.assert_close(model(collate(samples)).values[0], values, rtol=1e-4, atol=1e-4)


def test_a_critic_of_its_own_reads_behind_its_prompt():
    critic = Critic(prompted("llama", "PROMPT_TUNING", lambda family: tiny_classifier(family, labels=1)))
    assert critic.layout is Layout.PACKED and critic(collate(make_samples())).shape == (1, 32)


@both_kinds
def test_kept_activations_and_bfloat16_change_nothing_but_rounding(kind):
    model = LanguageModel(prompted("llama", kind)).train()
    model(collate(make_samples())).logprobs.sum().backward()
    expected = grads(model)
    model.zero_grad()
    recompute_activations(model.backbone)
    model(collate(make_samples())).logprobs.sum().backward()
    assert torch.equal(grads(model), expected)
    low = prompted("llama", kind)
    make_lean(low, torch.bfloat16)
    narrow = LanguageModel(low, compute=torch.bfloat16)
    difference = narrow(collate(make_samples())).logprobs - model(collate(make_samples())).logprobs
    assert 0 < difference.abs().max() < 0.2
    (rollout,) = Sampler(narrow, tiny_tokenizer()).sample([[7, 8, 9]], max_tokens=4, temperature=0.0)
    assert len(rollout.ids) > 0


def test_first_values(tmp_path):
    def start(**options):
        return prompted("gpt2", options.pop("kind", "PROMPT_TUNING"), **options).soft_prompt.prompt_embeddings.detach()

    again, other = start(), prompted("gpt2", "PROMPT_TUNING").soft_prompt.prompt_embeddings
    assert torch.equal(again, other), "the seed decides"
    table = tiny_causal("gpt2").get_input_embeddings().weight
    drawn = start(prompt_tuning_init="SAMPLE_VOCAB")
    assert all((table == row).all(1).any() for row in drawn)
    assert not start(kind="PREFIX_TUNING", init_weights="zero").any()
    base = save_tiny(tiny_causal("gpt2"), tmp_path / "base")
    named = tiny_causal("gpt2")
    named.name_or_path = str(base)
    make_trainable(named, spec("PROMPT_TUNING", prompt_tuning_init="text", prompt_tuning_init_text="was good"))
    ids = (tiny_tokenizer()("was good")["input_ids"] * N)[:N]
    assert torch.equal(named.soft_prompt.prompt_embeddings, table[torch.tensor(ids)])
    adapters.save_adapter(named, tmp_path / "adapter", "tiny/base")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["tokenizer_name_or_path"] == "tiny/base"
    torch.testing.assert_close(
        theirs(opened_by_peft(tiny_causal("gpt2"), tmp_path / "adapter"), "PROMPT_TUNING"), alone(named),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@both_kinds
def test_a_row_that_is_long_only_with_its_virtual_tokens_goes_alone_past_a_switch_of_rotary_scaling(kind):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    backbone = tiny_causal("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    make_trainable(backbone, spec(kind, num_virtual_tokens=10))
    model = LanguageModel(backbone)
    ids = torch.randint(7, 300, (37,), generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    samples = [Sample(part, (np.arange(len(part)) > 0).astype(np.float32)) for part in (ids[:28], ids[28:])]
    batch = collate(samples)
    apart = torch.cat([model(collate([sample])).logprobs for sample in samples], 1)
    assert layout_for(backbone, model.layout, batch) is Layout.ALONE
    torch.testing.assert_close(model(batch).logprobs, apart, rtol=1e-4, atol=1e-4)
    hidden = segment_hidden(backbone, batch, model.layout, causal=True, offset=0)
    parts = [segment_hidden(backbone, collate([s]), model.layout, causal=True, offset=0) for s in samples]
    torch.testing.assert_close(hidden, torch.cat(parts), rtol=1e-4, atol=1e-4)
    packed = flat_hidden(backbone, batch, causal=True, offset=0)
    assert (packed - hidden).abs().max() > 1e-3, "control: packed all the same, it differs"
    with adapters.disabled(backbone):
        assert layout_for(backbone, model.layout, batch) is Layout.PACKED


@both_kinds
def test_a_sampler_follows_it_off_and_on_again(kind):
    backbone = prompted("llama", kind)
    sampler = Sampler(LanguageModel(backbone), tiny_tokenizer())
    asked = {"max_tokens": 6, "temperature": 0.0}
    on = sampler.sample([[7, 8, 9]], **asked)
    with adapters.disabled(backbone):
        off = sampler.sample([[7, 8, 9]], **asked)
        with adapters.disabled(backbone):
            pass
        assert soft_prompt.active(backbone) is None, "the inner one leaves the outer one as it was"
        assert sampler.why_slow == "" and len(sampler.sample([[7] * 250], max_tokens=9)[0].ids) <= 6
        with pytest.raises(ModelError, match="takes 256 in all"):
            sampler.sample([[7] * 256], max_tokens=1)
    base = Sampler(LanguageModel(tiny_causal("llama")), tiny_tokenizer()).sample([[7, 8, 9]], **asked)
    assert off[0].ids == base[0].ids and off[0].logprobs == pytest.approx(base[0].logprobs, abs=1e-5)
    assert sampler.sample([[7, 8, 9]], **asked) == on and on[0].logprobs != off[0].logprobs
    assert sampler.why_slow == "a soft prompt stands before its tokens"


def test_virtual_tokens_count_in_the_budget_of_the_cache():
    backbone = prompted("llama", "PROMPT_TUNING")
    sampler = Sampler(LanguageModel(backbone), tiny_tokenizer(), max_cache_tokens=2 * (4 + 6) + N)
    prompts = [[7] * 4, [8] * 4]
    assert list(sampler._groups(prompts, 1, 6)) == [[0], [1]]
    with adapters.disabled(backbone):
        assert list(sampler._groups(prompts, 1, 6)) == [[0, 1]]


@both_kinds
def test_the_start_of_a_policy_is_the_base_before_and_after_steps(kind):
    plain, batch = LanguageModel(tiny_causal(), policy=Policy()), collate(make_samples())
    model = LanguageModel(prompted("llama", kind), policy=Policy())
    base, actor = plain(batch).logprobs.detach(), Actor(model, base=True)
    torch.testing.assert_close(actor.reference(batch), base, rtol=1e-5, atol=1e-5)
    assert (actor.answer(batch).logprobs - base).abs().max() > 1e-2
    model(batch).logprobs.sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    torch.testing.assert_close(actor.reference(batch), base, rtol=1e-5, atol=1e-5)


REFUSED = {
    "encoder": (lambda: tiny_masked("bert"), spec("PROMPT_TUNING"), "is an encoder"),
    "encoder classifier": (lambda: tiny_classifier("distilbert"), spec("PROMPT_TUNING"), "is an encoder"),
    "prefix of a classifier": (lambda: tiny_classifier("llama"), spec("PREFIX_TUNING"), "use peft_type PROMPT_TUNING"),
    "window": (lambda: tiny_causal("mistral"), spec("PREFIX_TUNING"), "a window of 8 tokens"),
    "no number": (tiny_causal, spec("PROMPT_TUNING", num_virtual_tokens=None), "num_virtual_tokens is None"),
    "a bool": (tiny_causal, spec("PROMPT_TUNING", num_virtual_tokens=True), "num_virtual_tokens is True"),
    "another start": (tiny_causal, spec("PROMPT_TUNING", prompt_tuning_init="foo"), "is FOO: choose one of RANDOM, S"),
    "a start that is a number": (tiny_causal, spec("PROMPT_TUNING", prompt_tuning_init=5), "is 5: choose one of RAND"),
    "a text that is none": (
        tiny_causal,
        spec("PROMPT_TUNING", prompt_tuning_init="text", prompt_tuning_init_text=5),
        "init_text is 5",
    ),
    "no text": (tiny_causal, spec("PROMPT_TUNING", prompt_tuning_init="text"), "prompt_tuning_init_text can't be None"),
    "projection": (tiny_causal, spec("PREFIX_TUNING", prefix_projection=True), "prefix_projection is not supported"),
    "another width": (tiny_causal, spec("PROMPT_TUNING", token_dim=31), "token_dim is 31, and this base has 32"),
    "train_also": (tiny_causal, replace(spec("PROMPT_TUNING"), train_also=("head",)), "leave it out"),
    "p-tuning": (tiny_causal, spec("P_TUNING"), "P_TUNING is not supported: use PROMPT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_one_is_refused_by_its_reason(name):
    build, wanted, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        make_trainable(build(), wanted)


def test_a_base_whose_rows_cannot_be_packed_behind_one_is_refused(monkeypatch):
    backbone = prompted("llama", "PROMPT_TUNING")
    own = type(backbone.model).forward

    def leaky(self, *args, segment_lengths=None, **kwargs):
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(backbone.model), "forward", leaky)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot have a soft prompt: packed logits differ"):
        LanguageModel(backbone)


@both_kinds
def test_it_is_not_merged(kind, tmp_path):
    with pytest.raises(ModelError, match=r"cannot be merged.*--format adapter"):
        export_run(prompted("llama", kind), tiny_tokenizer(), tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_size_leaves_the_base_alone(tmp_path):
    adapters.save_adapter(prompted("llama", "PROMPT_TUNING"), tmp_path, "tiny/base")
    (tmp_path / "tunesmith.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    base = tiny_causal()
    with pytest.raises(ModelError, match=r"prompt_embeddings must be \(4, 32\)"):
        adapters.load_adapter(base, tmp_path)
    assert not hasattr(base, soft_prompt.PLACE)
