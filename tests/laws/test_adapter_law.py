"""Law: B = 0 is the identity; merged is unmerged; PEFT opens ours and we open PEFT's. Control: a random B differs."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, tiny_causal, tiny_classifier

from tunesmith.model import adapters, lora
from tunesmith.model.trainable import TrainableSpec, make_trainable

peft = pytest.importorskip("peft")
IDS = torch.arange(7, 19)[None]
FAMILIES = [*CAUSAL, *ENCODERS]
SPECS = [
    TrainableSpec("lora", rank=2),
    TrainableSpec("lora", rank=2, rank_stabilized=True),
    TrainableSpec("lora", rank=2, dora=True),
    TrainableSpec("lora", rank=2, init="pissa"),
    TrainableSpec("lora", rank=2, train_also=("embeddings",)),
]
PEFT_METHODS = [
    {"peft_type": "IA3"},
    {"peft_type": "LOHA", "r": 2},
    {"peft_type": "LOKR", "r": 2},
    {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]},
    {"peft_type": "OFT", "oft_block_size": 4},
    {"peft_type": "LN_TUNING"},
]


def build(family):
    return tiny_causal(family) if family in CAUSAL else tiny_classifier(family)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def opened_by_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.init}-{s.rank_stabilized}-{s.dora}-{len(s.train_also)}")
def test_law(family, spec, tmp_path):
    model = build(family)
    base = logits(model)
    make_trainable(model, spec)
    start = (logits(model) - base).abs().max()
    assert start == 0.0 if spec.init == "default" else start < 1e-5
    disturb(model)
    tuned = logits(model)
    assert (tuned - base).abs().max() > 1e-2, "control: an adapter that learned changes the output"
    adapters.save_adapter(model, tmp_path, "tiny/base")
    ours = build(family)
    adapters.load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), tuned)
    torch.testing.assert_close(logits(opened_by_peft(build(family), tmp_path)), tuned, rtol=1e-4, atol=1e-5)
    lora.merge(ours)
    torch.testing.assert_close(logits(ours), tuned, rtol=1e-4, atol=2e-5)
    with adapters.disabled(model):
        assert torch.equal(logits(model), base)
    adapters.remove(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"x": 3}}], ids=str)
def test_we_open_what_peft_wrote(family, extra, tmp_path):
    base = build(family)
    targets = sorted({name.rpartition(".")[2] for name in _inner_linears(base)})
    also = {} if family in CAUSAL else {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    if extra.get("alpha_pattern"):
        extra = extra | {"alpha_pattern": {targets[0]: 3}, "rank_pattern": {targets[0]: 5}}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **also, **extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config).eval()
        theirs.save_pretrained(str(tmp_path))
    ours = build(family)
    adapter = adapters.load_adapter(ours, tmp_path)
    assert adapter.config is None, "opened by our own layers, not through PEFT"
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(ours) - logits(build(family))).abs().max() > 1e-3


def _inner_linears(model):
    head = ("classifier", "pre_classifier", "pooler", "lm_head", "embed_out", "head")
    return [n for n, m in model.named_modules() if lora.is_linear(m) and not set(n.split(".")) & set(head)]


@pytest.mark.parametrize("options", PEFT_METHODS, ids=lambda o: o["peft_type"])
def test_other_methods_round_trip(options, tmp_path):
    model = build("llama")
    base = logits(model)
    make_trainable(model, TrainableSpec("peft", peft=options))
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    disturb(model)
    tuned = logits(model)
    assert (tuned - base).abs().max() > 1e-3
    adapters.save_adapter(model, tmp_path, "tiny/base")
    ours = build("llama")
    adapters.load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), tuned)
    torch.testing.assert_close(logits(opened_by_peft(build("llama"), tmp_path)), tuned, rtol=1e-4, atol=1e-5)
    with adapters.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    adapters.remove(model)
    assert torch.equal(logits(model), base)
