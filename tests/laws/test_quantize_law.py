"""Law: merged is what was trained beside the quantised base. Control: the same adapter on the base's own weights."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, save_tiny, tiny_causal, tiny_classifier

from tunesmith.export.merge import export_run
from tunesmith.model import adapters, lora
from tunesmith.model.load import load_backbone
from tunesmith.model.trainable import TrainableSpec, make_trainable

IDS = torch.arange(7, 19)[None]
FAMILIES = [*CAUSAL, *ENCODERS]
VARIANTS = [
    TrainableSpec("lora", rank=2, quantize="4bit"),
    TrainableSpec("lora", rank=2, quantize="8bit"),
    TrainableSpec("lora", rank=2, quantize="4bit", dora=True),
    TrainableSpec("lora", rank=2, quantize="4bit", init="pissa"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def build(family, folders):
    """From a folder, as real bases are: an adapter names its base by the content of that."""
    kind = "causal" if family in CAUSAL else "classifier"
    if not (folders / family).is_dir():
        save_tiny(tiny_causal(family) if kind == "causal" else tiny_classifier(family), folders / family)
    return load_backbone(folders / family, kind)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def exported(model, folder):
    """The merged export, opened by transformers."""
    done = export_run(model, None, folder, "merged", dtype=torch.float32)
    assert done.agreement is not None and done.agreement.holds
    return type(model).from_pretrained(folder).eval()


def starts_as_base(layer):
    """To the bit, for rows of its own."""
    rows = torch.randn(12, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(layer(rows), layer.base(rows))


def disturb(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


CASES = [(family, VARIANTS[0]) for family in FAMILIES] + [(f, v) for f in ("llama", "gpt2") for v in VARIANTS[1:]]


@pytest.mark.parametrize(
    ("family", "spec"), CASES, ids=lambda x: x if isinstance(x, str) else f"{x.quantize}-{x.init}-{x.dora}"
)
def test_law(family, spec, tmp_path, folders):
    model = build(family, folders)
    make_trainable(model, spec)
    with adapters.disabled(model):
        base = logits(model)
    if spec.init == "default":
        assert all(starts_as_base(layer) for layer in lora.lora_layers(model).values())
        torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)  # BERT's pooler, a plain linear, is not the
        # same to the last bit for the same rows on every CPU
    disturb(model)
    tuned = logits(model)
    torch.testing.assert_close(logits(exported(model, tmp_path / "merged")), tuned, rtol=1e-4, atol=2e-5)
    adapters.save_adapter(model, tmp_path / "adapter", "tiny/base")
    plain = build(family, folders)
    adapters.load_adapter(plain, tmp_path / "adapter")
    gap = (logits(plain) - tuned).abs().max()
    assert gap > (1e-3 if spec.quantize == "8bit" else 1e-2), "control: other weights below the adapter are seen"
    with adapters.disabled(model):
        assert torch.equal(logits(model), base)
    lora.merge(model)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)], ids=str)
def test_what_no_adapter_stands_beside_is_unpacked_too(targets, tmp_path):
    model = tiny_causal("llama")
    make_trainable(model, TrainableSpec("lora", rank=2, quantize="4bit", targets=targets))
    disturb(model)
    merged = exported(model, tmp_path)
    assert {name for name, _ in merged.named_parameters()} == {
        name for name, _ in tiny_causal("llama").named_parameters()
    }
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=2e-5)
