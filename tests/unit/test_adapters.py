"""Adapter folders: what they record, what is refused, and swapping them on one base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_tiny, tiny_causal, tiny_classifier

from tunesmith.errors import ModelError
from tunesmith.model import adapters, lora
from tunesmith.model.load import load_backbone
from tunesmith.model.trainable import TrainableSpec, make_trainable

IDS = torch.arange(7, 19)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, spec=None, *, seed=0):
    """`model` with an adapter whose values are no longer the first ones."""
    make_trainable(model, spec or TrainableSpec("lora", rank=2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def saved(tmp_path):
    return adapters.save_adapter(trained(tiny_causal("llama")), tmp_path / "a", "me/base")


def test_files_and_records(saved):
    assert sorted(p.name for p in saved.iterdir()) == sorted([adapters.CONFIG, adapters.RECORD, adapters.WEIGHTS])
    config = json.loads((saved / adapters.CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 16)
    assert config["base_model_name_or_path"] == "me/base" and config["task_type"] == "CAUSAL_LM"
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    keys = load_file(saved / adapters.WEIGHTS)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


def test_targets_that_an_ending_would_not_mean_are_written_in_full(tmp_path):
    model = trained(
        tiny_causal("llama"), TrainableSpec("lora", rank=2, targets=["layers.1.self_attn.q_proj", "v_proj"])
    )
    config = json.loads((adapters.save_adapter(model, tmp_path, "b") / adapters.CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj", "v_proj"]


def test_an_adapter_of_another_base_is_refused(saved, tmp_path):
    other = tiny_causal("llama", seed=1)
    with pytest.raises(ModelError, match="trained on another base: me/base"):
        adapters.load_adapter(other, saved)
    assert adapters.adapter_of(other) is None and not lora.lora_layers(other)
    adapters.load_adapter(tiny_causal("llama"), saved)


def test_bases_in_folders_are_told_apart_by_content(tmp_path):
    one, two = (save_tiny(tiny_causal("llama", seed=s), tmp_path / str(s)) for s in (0, 1))
    folder = adapters.save_adapter(trained(load_backbone(one, "causal")), tmp_path / "a", "x")
    adapters.load_adapter(load_backbone(shutil.copytree(one, tmp_path / "moved"), "causal"), folder)
    adapters.load_adapter(load_backbone(one, "causal", dtype=torch.bfloat16), folder)
    with pytest.raises(ModelError, match="another base"):
        adapters.load_adapter(load_backbone(two, "causal"), folder)


def test_another_shape_or_family_is_refused_even_without_a_record(saved):
    (saved / adapters.RECORD).unlink()
    for model, message in (
        (tiny_causal("llama", width=64), "made for width 32, this base has 64"),
        (tiny_causal("gpt2"), "has no such layer"),
    ):
        with pytest.raises(ModelError, match=message):
            adapters.load_adapter(model, saved)
        assert not lora.lora_layers(model)


def test_a_head_of_another_size_is_refused(tmp_path):
    folder = adapters.save_adapter(trained(tiny_classifier("bert", labels=2)), tmp_path, "b")
    (folder / adapters.RECORD).unlink()
    with pytest.raises(ModelError, match=r"classifier\.weight: \(2, 32\) in the adapter, \(3, 32\)"):
        adapters.load_adapter(tiny_classifier("bert", labels=3), folder)


def _cut(folder):
    data = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(data[: len(data) // 2])


def _nan(folder):
    tensors = load_file(folder / adapters.WEIGHTS)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, folder / adapters.WEIGHTS)


def _with(change):
    """A folder whose tensors are changed."""

    def damage(folder):
        tensors = load_file(folder / adapters.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / adapters.WEIGHTS)

    return damage


def _config(key, value):
    def damage(folder):
        config = json.loads((folder / adapters.CONFIG).read_text())
        (folder / adapters.CONFIG).write_text(json.dumps({**config, key: value}))

    return damage


_A, _B = (f"{adapters.PREFIX}model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
_NORM = f"{adapters.PREFIX}model.norm.lora_"
BROKEN = {
    "no config": (lambda p: (p / adapters.CONFIG).unlink(), "is not an adapter"),
    "no weights": (lambda p: (p / adapters.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickled": (
        lambda p: (p / adapters.WEIGHTS).rename(p / "adapter_model.bin"),
        "is a pickle",
    ),
    "broken config": (lambda p: (p / adapters.CONFIG).write_text("{"), "is damaged"),
    "not peft": (lambda p: (p / adapters.CONFIG).write_text("{}"), "does not say its peft_type"),
    "cut": (_cut, "is damaged"),
    "nan": (_nan, "NaN or infinity"),
    "broken record": (lambda p: (p / adapters.RECORD).write_text("{"), r"tunesmith\.json is damaged"),
    "record of another kind": (lambda p: (p / adapters.RECORD).write_text("[1]"), r"tunesmith\.json is damaged"),
    "half of a pair": (_with(lambda t: t.pop(_B)), r"q_proj: lora_B\.weight is missing"),
    "two ranks": (_with(lambda t: t.update({_B: torch.zeros(32, 5)})), "have no common rank"),
    "no matrix": (_with(lambda t: t.update({_A: torch.zeros(32)})), "have no common rank"),
    "beside a norm": (
        _with(lambda t: t.update({f"{_NORM}A.weight": torch.zeros(2, 32), f"{_NORM}B.weight": torch.zeros(32, 2)})),
        r"model\.norm, which is no linear layer",
    ),
    "no alpha": (_config("lora_alpha", None), "no number as lora_alpha"),
    "odd pattern": (_config("alpha_pattern", "x"), "no number as lora_alpha"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_message(name, saved):
    damage, message = BROKEN[name]
    damage(saved)
    with pytest.raises(ModelError, match=message):
        adapters.load_adapter(tiny_causal("llama"), saved)


def test_nan_is_not_saved(tmp_path):
    model = trained(tiny_causal("llama"))
    next(iter(lora.lora_layers(model).values())).lora_A.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"lora_A.*nothing was written"):
        adapters.save_adapter(model, tmp_path / "a", "b")
    assert not (tmp_path / "a").exists()


def test_swapping_two_adapters_on_one_base(tmp_path):
    folders = [adapters.save_adapter(trained(tiny_causal("llama"), seed=s), tmp_path / str(s), "b") for s in (1, 2)]
    model = tiny_causal("llama")
    base, seen = logits(model), []
    for folder in (*folders, folders[0]):
        adapters.load_adapter(model, folder)
        seen.append(logits(model))
        adapters.remove(model)
        assert torch.equal(logits(model), base)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_going_on_from_an_adapter(saved):
    model = tiny_causal("llama")
    made = make_trainable(model, TrainableSpec("lora", adapter=str(saved)))
    assert made.tensors == 28 and all(".lora_" in name for name in made.names)
    again = tiny_causal("llama")
    adapters.load_adapter(again, saved)
    assert torch.equal(logits(model), logits(again)) and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    "spec", [TrainableSpec("lora", rank=2, train_also=("embeddings",)), TrainableSpec("lora", dora=True)]
)
def test_disabled_is_the_base_exactly_and_comes_back(spec):
    model = tiny_causal("llama")
    base = logits(model)
    trained(model, spec)
    tuned = logits(model)
    with adapters.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, base)


def test_a_merged_adapter_is_not_switched_off_or_taken_off():
    model = trained(tiny_causal("llama"))
    lora.merge(model)
    with pytest.raises(ModelError, match="unmerge it first"), adapters.disabled(model):
        pass
    with pytest.raises(ModelError, match="unmerge it first"):
        adapters.remove(model)
