"""Exports: opened again and equal, in the base's dtype, or not published at all."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, save_tiny, tiny_causal, tiny_classifier, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from tunesmith.errors import ModelError
from tunesmith.export import merge
from tunesmith.export.merge import export_run
from tunesmith.export.verify import agree
from tunesmith.model import adapters, lora
from tunesmith.model.hashing import backbone_hash
from tunesmith.model.load import base_record, load_backbone, load_tokenizer
from tunesmith.model.trainable import TrainableSpec, make_trainable

IDS = torch.arange(7, 19)[None]
SPECS = [
    TrainableSpec("lora", rank=2),
    TrainableSpec("lora", rank=2, dora=True),
    TrainableSpec("lora", rank=2, init="pissa", train_also=("embeddings",)),
    TrainableSpec("full"),
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(folder, kind, spec):
    model = load_backbone(folder, kind)
    make_trainable(model, spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def base(tmp_path):
    return save_tiny(tiny_causal("llama"), tmp_path / "base")


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{s.init}-{s.dora}")
def test_merged_answers_as_the_trained_one_without_its_parts(family, spec, tmp_path):
    kind = "causal" if family in CAUSAL else "classifier"
    folder = save_tiny(tiny_causal(family) if family in CAUSAL else tiny_classifier(family), tmp_path / "base")
    model = trained(folder, kind, spec)
    tuned = logits(model)
    exported = export_run(model, load_tokenizer(folder), tmp_path / "out")
    assert exported.agreement is not None and exported.agreement.error < 1e-5
    again = load_backbone(tmp_path / "out", kind)
    torch.testing.assert_close(logits(again), tuned, rtol=1e-4, atol=1e-5)
    names = {n for n, _ in load_backbone(folder, kind).named_parameters()}
    assert {n for n, _ in again.named_parameters()} == names
    assert torch.equal(logits(model), tuned), "the trained model is as it was"
    assert base_record(tmp_path / "out")["parameters"] == base_record(folder)["parameters"]


def test_the_stored_dtype_is_kept(tmp_path):
    folder = save_tiny(tiny_causal("llama").to(torch.bfloat16), tmp_path / "base")
    model = trained(folder, "causal", TrainableSpec("lora", rank=2))
    exported = export_run(model, load_tokenizer(folder), tmp_path / "out")
    assert base_record(tmp_path / "out")["dtype"] == "BF16"
    assert exported.agreement is not None and exported.agreement.error < 5e-2 and exported.agreement.kl < 1e-4
    export_run(model, None, tmp_path / "wide", dtype=torch.float32)
    assert base_record(tmp_path / "wide")["dtype"] == "F32"


def test_template_tokenizer_and_labels_travel(tmp_path):
    folder = save_tiny(tiny_classifier("distilbert"), tmp_path / "base")
    model = load_backbone(folder, "classifier", label_names=["neg", "pos"])
    make_trainable(model, TrainableSpec("lora", rank=2))
    tokenizer = load_tokenizer(folder)
    export_run(model, tokenizer, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        again.chat_template == tokenizer.chat_template and again("the cat").input_ids == tokenizer("the cat").input_ids
    )
    assert load_backbone(tmp_path / "out", "classifier").config.id2label == {0: "neg", 1: "pos"}
    text = "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    assert str(tmp_path) not in text, "no path of this machine in the export"


def test_adapter_export_opens_on_a_fresh_base(base, tmp_path):
    model = trained(base, "causal", TrainableSpec("lora", rank=2))
    export_run(model, load_tokenizer(base), tmp_path / "out", "adapter", base_name="me/base")
    fresh = load_backbone(base, "causal")
    adapters.load_adapter(fresh, tmp_path / "out")
    assert torch.equal(logits(fresh), logits(model)) and load_tokenizer(tmp_path / "out").chat_template


def test_a_nan_adapter_is_refused_and_nothing_is_left(base, tmp_path):
    model = trained(base, "causal", TrainableSpec("lora", rank=2))
    before = backbone_hash(load_backbone(base, "causal"))
    next(iter(lora.lora_layers(model).values())).lora_B.data[0, 0] = float("nan")
    for kind in ("merged", "adapter"):
        with pytest.raises(ModelError, match=r"NaN or infinity in model\.layers\.0"):
            export_run(model, None, tmp_path / "deep" / "out", kind)
    assert not (tmp_path / "deep").exists() and backbone_hash(load_backbone(base, "causal")) == before


def test_control_a_merge_that_is_wrong_is_not_published(base, tmp_path, monkeypatch):
    model = trained(base, "causal", TrainableSpec("lora", rank=2))
    monkeypatch.setattr(lora.LoraLinear, "merged_matrix", lambda layer: lora.weight_matrix(layer.base).detach().clone())
    with pytest.raises(ModelError, match="does not answer as the trained one"):
        export_run(model, None, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_agreement_is_false_for_nan_and_for_other_shapes():
    row = torch.randn(3, 5)
    assert agree([row], [row], torch.float32).holds
    assert not agree([row], [row * float("nan")], torch.float32).holds
    assert not agree([row], [row[:2]], torch.float32).holds
    assert not agree([row], [row + 0.01], torch.float32).holds


def test_what_cannot_be_exported(base, tmp_path):
    model = trained(base, "causal", TrainableSpec("full"))
    with pytest.raises(ModelError, match="without an adapter"):
        export_run(model, None, tmp_path / "out", "adapter")
    with pytest.raises(ModelError, match="choose adapter or merged"):
        export_run(model, None, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="already exists and is not empty"):
        export_run(model, None, base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_peft_methods_merge_where_they_can(base, tmp_path):
    spec = TrainableSpec("peft", peft={"peft_type": "LOHA", "r": 2})
    model = trained(base, "causal", spec)
    exported = export_run(model, None, tmp_path / "out")
    assert exported.agreement is not None and exported.agreement.error < 1e-5
    assert adapters.adapter_of(model) is not None and merge.peft_methods._layers(model)


def test_a_merged_model_stops_where_the_chat_ends_an_answer(base, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<sep>'")
    export_run(trained(base, "causal", SPECS[0]), tokenizer, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 6]
    export_run(trained(base, "causal", SPECS[0]), load_tokenizer(base), tmp_path / "plain")
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == 2


def test_an_adapter_of_a_base_that_grew_is_refused_and_the_merged_model_has_the_rows(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(5)])
    grown = trained(save_tiny(tiny_causal("llama"), tmp_path / "base", tokenizer=tokenizer), "causal", SPECS[0])
    with pytest.raises(ModelError, match=r"4 tokens .* no rows for.*--format merged"):
        export_run(grown, tokenizer, tmp_path / "adapter", "adapter")
    assert not (tmp_path / "adapter").exists()
    export_run(grown, tokenizer, tmp_path / "merged")
    again = load_backbone(tmp_path / "merged", "causal")
    assert again.tunesmith_grown == 0 and again.get_input_embeddings().weight.shape[0] == 324
