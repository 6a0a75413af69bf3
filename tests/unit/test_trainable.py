"""Exact counts from the papers' configurations, and each way of choosing what trains."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, tiny_causal, tiny_classifier, tiny_masked
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tunesmith.errors import ModelError
from tunesmith.model.trainable import TrainableSpec, find_targets, make_trainable


def on_meta(factory, family, **extra):
    with torch.device("meta"):
        return factory.from_config(AutoConfig.for_model(family, **extra))


def distilbert():
    return on_meta(AutoModelForSequenceClassification, "distilbert")


@pytest.mark.parametrize(
    ("spec", "trainable", "total"),
    [
        (TrainableSpec("lora", rank=4, alpha=32, targets=["q_lin"]), 628_994, 66_991_874),
        (TrainableSpec("last_layers", layers=1), 7_680_002, 66_955_010),
        (TrainableSpec("head"), 592_130, 66_955_010),
        (TrainableSpec("full"), 66_955_010, 66_955_010),
    ],
    ids=lambda value: getattr(value, "method", value),
)
def test_distilbert_counts(spec, trainable, total):
    made = make_trainable(distilbert(), spec)
    assert (made.trainable, made.total) == (trainable, total)
    assert f"{trainable:,}" in made.describe()


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 64])
def test_rank_sweep_on_distilbert(rank):
    made = make_trainable(distilbert(), TrainableSpec("lora", rank=rank, targets=["q_lin"]))
    assert made.trainable - 592_130 == 9_216 * rank


def test_bloom_7b1_with_its_fused_layer():
    model = on_meta(AutoModelForCausalLM, "bloom", hidden_size=4096, n_layer=30, n_head=32, vocab_size=250880)
    made = make_trainable(model, TrainableSpec("lora", rank=16, alpha=32, targets=["query_key_value"]))
    assert (made.trainable, made.total) == (7_864_320, 7_076_880_384)
    assert f"{made.percent:.4f}" == "0.1111"


def test_mistral_7b_query_projection():
    model = on_meta(AutoModelForCausalLM, "mistral", num_key_value_heads=8)
    assert make_trainable(model, TrainableSpec("lora", rank=8, targets=["q_proj"])).trainable == 2_097_152


def test_gpt2_medium_last_two_layers_as_the_lora_paper_counts_them():
    model = on_meta(AutoModelForCausalLM, "gpt2", n_embd=1024, n_layer=24, n_head=16)
    assert make_trainable(model, TrainableSpec("last_layers", layers=2)).trainable == 25_192_448


@pytest.mark.parametrize("family", CAUSAL)
def test_all_linear_takes_every_linear_but_the_head(family):
    model = tiny_causal(family)
    targets = find_targets(model, "all-linear")
    assert targets and not any("lm_head" in name or "embed_out" in name for name in targets)
    made = make_trainable(model, TrainableSpec("lora", rank=2))
    assert made.tensors == 2 * len(targets)
    assert set(made.lora_b) == {name for name in made.names if name.endswith("lora_B")}


@pytest.mark.parametrize("family", ENCODERS)
def test_a_classifier_trains_its_head_too_and_counts_it_once(family):
    model = tiny_classifier(family)
    head = make_trainable(tiny_classifier(family), TrainableSpec("head"))
    made = make_trainable(model, TrainableSpec("lora", rank=2))
    adapter = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert made.trainable == adapter + head.trainable
    assert not any(name.startswith("classifier.lora") for name in made.names)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_last_layers_are_found_by_structure(family):
    model = tiny_causal(family, layers=3) if family in CAUSAL else tiny_classifier(family, layers=3)
    made = make_trainable(model, TrainableSpec("last_layers", layers=1))
    body = [n for n in made.names if any(f".{i}." in n for i in range(3))]
    assert body and all(".2." in name for name in body)


def test_tied_parameters_are_counted_once():
    model = tiny_causal("llama", tie_word_embeddings=True)
    made = make_trainable(model, TrainableSpec("full"))
    assert made.total == made.trainable == sum(p.numel() for p in set(model.parameters()))
    assert make_trainable(tiny_causal("llama"), TrainableSpec("full")).total > made.total


def test_bias_only():
    model = tiny_masked("bert")
    made = make_trainable(model, TrainableSpec("bias"))
    assert all(name.endswith("bias") for name in made.names) and made.trainable < made.total / 10
    with pytest.raises(ModelError, match="has no biases"):
        make_trainable(tiny_causal("llama"), TrainableSpec("bias"))


def test_unknown_targets_name_the_real_layers():
    with pytest.raises(ModelError) as problem:
        make_trainable(tiny_causal("llama"), TrainableSpec("lora", targets=["q_porj", "nothing"]))
    message = str(problem.value)
    assert "did you mean q_proj" in message and "'nothing'" in message and "down_proj" in message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TrainableSpec("lorra"), "choose one of full"),
        (TrainableSpec("last_layers", layers=3), "choose 1 to 2"),
        (TrainableSpec("last_layers", layers=0), "choose 1 to 2"),
        (TrainableSpec("lora", rank=33), "rank 33 does not fit"),
        (TrainableSpec("lora", targets=[]), "targets is empty"),
        (TrainableSpec("lora", train_also=["embed"]), "train_also 'embed' matches no module"),
        (TrainableSpec("lora", init="pisa"), "choose default or pissa"),
        (TrainableSpec("lora", targets=["q_proj"], train_also=["q_proj"]), "both a target and in train_also"),
        (TrainableSpec("peft", peft={"peft_type": "IA33"}), "choose one of"),
        (TrainableSpec("peft", peft={"peft_type": "LOHA", "rang": 2}), "LOHA has no rang"),
        (TrainableSpec("peft"), "choose one of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(spec, message):
    with pytest.raises(ModelError, match=message):
        make_trainable(tiny_causal("llama"), spec)


def test_a_tied_head_cannot_be_a_target():
    with pytest.raises(ModelError, match="tied head"):
        make_trainable(tiny_causal("gpt2"), TrainableSpec("lora", targets=["lm_head"], rank=2))
    made = make_trainable(tiny_causal("llama"), TrainableSpec("lora", targets=["lm_head"], rank=2))
    assert made.tensors == 2


def test_embeddings_beside_an_adapter():
    model = tiny_causal("llama")
    made = make_trainable(model, TrainableSpec("lora", rank=2, train_also=["embeddings", "head"]))
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(made.names)
    again = make_trainable(tiny_causal("llama"), TrainableSpec("lora", rank=2, train_also=["embed_tokens"]))
    assert "model.embed_tokens.weight" in again.names and "lm_head.weight" not in again.names


def test_two_adapters_at_once_are_refused():
    model = tiny_causal("llama")
    make_trainable(model, TrainableSpec("lora", rank=2))
    with pytest.raises(ModelError, match="already carries an adapter"):
        make_trainable(model, TrainableSpec("lora", rank=2))


@pytest.mark.parametrize("method", ["IA3", "LOHA", "VERA", "LN_TUNING"])
def test_other_methods_through_peft(method):
    options = {"peft_type": method} | ({"r": 4} if method in ("LOHA", "VERA") else {})
    model = tiny_classifier("distilbert") if method == "LOHA" else tiny_causal("llama")
    made = make_trainable(model, TrainableSpec("peft", peft=options))
    assert 0 < made.trainable < made.total
