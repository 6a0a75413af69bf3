"""4 and 8 bits: levels, bytes, errors, and a frozen linear that equals the plain one of its unpacked matrix."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, save_tiny, tiny_causal, tiny_classifier, tiny_masked
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.model import adapters, lora, quantize
from tunesmith.model.load import load_backbone
from tunesmith.model.packing import recompute_activations
from tunesmith.model.quantize import QuantizedLinear, quantize_linears, scale_bits, stored_bytes
from tunesmith.model.trainable import TrainableSpec, find_targets, make_trainable

KINDS = ("8bit", "4bit")
IDS = torch.arange(7, 19)[None]
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Appendix E of 2305.14314."""


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unpacked(matrix, kind):
    return QuantizedLinear(matrix, None, kind).matrix()


def test_the_levels_are_the_papers():
    found = quantize.nf4_levels()
    assert found == pytest.approx(PAPER, abs=1e-6)
    assert len(set(found)) == 16 and found[7] == 0.0 and (found[0], found[-1]) == (-1.0, 1.0)


def test_a_block_has_the_sixteen_levels_with_zero_and_the_ends():
    shares = torch.linspace(-1, 1, 64)[None]
    shares[0, 31] = 0.0
    meant = quantize.decode(quantize.encode(shares, "4bit"), quantize._pairs())[0]
    assert len(meant.unique()) == 16
    assert (meant[0], meant[31], meant[-1]) == (-1.0, 0.0, 1.0)
    nearest = (shares[0][:, None] - torch.tensor(PAPER)).abs().argmin(1)
    torch.testing.assert_close(meant, torch.tensor(PAPER)[nearest])


def test_the_error_on_a_normal_tensor_is_below_that_of_a_plain_4_bit_integer():
    weight = normal(256, 512)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    integers = ((blocks / scale * 7).round() / 7 * scale).view_as(weight)
    error = {kind: float((unpacked(weight, kind) - weight).square().mean()) for kind in KINDS}
    assert error["4bit"] < 0.8 * float((integers - weight).square().mean())
    assert error["8bit"] < error["4bit"] / 100


def test_bits_of_the_scales():
    assert scale_bits(group=None) == 0.5
    assert scale_bits() == pytest.approx(0.127, abs=5e-5)
    saved = 65e9 * (scale_bits(group=None) - scale_bits()) / 8
    assert saved == pytest.approx(3e9, rel=0.02), "about 3 GB of 65 billion weights"


@pytest.mark.parametrize("kind", KINDS)
def test_measured_bytes_are_those_of_the_formula(kind):
    layer = QuantizedLinear(normal(512, 1024), None, kind)
    held = sum(t.numel() * t.element_size() for name, t in layer.named_buffers() if name in quantize.STORED)
    assert held == layer.num_bytes == stored_bytes(512 * 1024, kind)
    assert 8 * held / (512 * 1024) == quantize.BITS[kind] + scale_bits()
    odd = QuantizedLinear(normal(7, 9), None, kind)
    assert odd.num_bytes == stored_bytes(63, kind) and odd.matrix().shape == (7, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_an_outlier_spoils_its_block_alone(kind):
    assert torch.equal(unpacked(torch.zeros(16, 64), kind), torch.zeros(16, 64))
    calm = normal(300, 64)
    loud = calm.clone()
    loud[5, 3] = 20.0
    others = [i for i in range(300) if i != 5]
    limit = {"8bit": 0.02, "4bit": 0.2}[kind]
    relative = (unpacked(loud, kind) - loud)[others].norm() / loud[others].norm()
    assert relative < limit, "scales are a logarithmic code: the other blocks of the group keep theirs"
    assert abs(float(unpacked(loud, kind)[5, 3]) - 20.0) < 0.5


def test_a_scale_is_never_below_the_largest_weight_of_its_block():
    scales = normal(5000).abs() * torch.logspace(-1, 1, 5000)
    codes, tops = quantize.encode_scales(scales)
    again = quantize.decode_scales(codes, tops, torch.tensor(quantize._STEPS))
    assert (again >= scales * (1 - 1e-4)).all()
    near = scales > tops.repeat_interleave(quantize.GROUP)[:5000] / 2**quantize.OCTAVES
    assert (again[near] <= scales[near] * 1.0225).all() and near.float().mean() > 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", [False, True])
def test_the_layer_is_the_plain_one_of_its_matrix(kind, conv):
    plain: nn.Module = Conv1D(48, 64) if conv else nn.Linear(64, 48)
    model = nn.ModuleDict({"x": plain})
    packed = quantize_linears(model, ["x"], kind)
    layer = model["x"]
    assert isinstance(layer, QuantizedLinear) and (packed.layers, packed.weights) == (1, 48 * 64)
    x = normal(3, 5, 64).requires_grad_()
    opened = layer.opened()
    assert type(opened) is type(plain) and opened.weight.shape == plain.weight.shape
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours, theirs = layer(x), opened(x)
        torch.testing.assert_close(ours, theirs)
        assert ours.dtype == dtype
        (mine,) = torch.autograd.grad(ours.float().square().sum(), x)
        (other,) = torch.autograd.grad(theirs.float().square().sum(), x)
        torch.testing.assert_close(mine, other, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=2e-2)
    assert not torch.allclose(layer(x), plain(x), atol=1e-4), "control: bits were lost"


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with an adapter"])
def test_no_unpacked_matrix_is_kept_for_the_backward(beside):
    layer: nn.Module = QuantizedLinear(normal(96, 64), None, "4bit")
    layer = lora.LoraLinear(layer, lora.LoraSpec(rank=2)) if beside else layer
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(normal(10, 64).requires_grad_())
    assert all(t.numel() < 96 * 64 for t in kept)


def test_large_matrices_are_unpacked_in_parts(monkeypatch):
    weight = normal(70, 96)
    whole = unpacked(weight, "4bit")
    monkeypatch.setattr(quantize, "CHUNK_BLOCKS", 7)
    assert torch.equal(unpacked(weight, "4bit"), whole)


def build(family):
    return tiny_causal(family) if family in CAUSAL else tiny_classifier(family)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_the_linears_of_the_blocks_alone_are_packed(family):
    plain, model = build(family), build(family)
    table = make_trainable(model, TrainableSpec("lora", rank=2, quantize="4bit"))
    names = {name.removesuffix(".base") for name, _ in quantize.quantized_layers(model)}
    assert names == set(find_targets(plain, "all-linear")) == set(lora.lora_layers(model))
    assert table.total - table.trainable + _new_head(plain) == sum(p.numel() for p in plain.parameters())
    kept = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in kept:
            assert torch.equal(kept[name], parameter), "embeddings, head, norms and biases are untouched"
    assert model.get_output_embeddings() is None or isinstance(model.get_output_embeddings(), nn.Linear)


def _new_head(model):
    """A classifier's head trains fully; its parameters are the base's too."""
    named = make_trainable(type(model)(model.config), TrainableSpec("lora", rank=2)).names
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


def test_a_tied_head_and_what_learns_fully_stay_plain():
    model = tiny_causal("llama", tie_word_embeddings=True)
    make_trainable(model, TrainableSpec("lora", rank=2, quantize="4bit", train_also=("down_proj",)))
    packed = [name for name, _ in quantize.quantized_layers(model)]
    assert packed and not any("down_proj" in name or "lm_head" in name for name in packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    masked = tiny_masked("bert")
    make_trainable(masked, TrainableSpec("lora", rank=2, quantize="8bit"))
    assert isinstance(masked.cls.predictions.transform.dense, nn.Linear)


def test_adapters_beside_query_alone_leave_the_whole_base_packed():
    model = tiny_causal("llama")
    make_trainable(model, TrainableSpec("lora", rank=2, quantize="4bit", targets=("q_proj",)))
    assert len(lora.lora_layers(model)) == 2 and len(list(quantize.quantized_layers(model))) == 14


def test_what_does_not_go_together_is_refused():
    for method in ("full", "last_layers", "bias", "peft"):
        with pytest.raises(ModelError, match="method lora"):
            make_trainable(tiny_causal(), TrainableSpec(method, quantize="4bit"))
    with pytest.raises(ModelError, match="8bit or 4bit"):
        make_trainable(tiny_causal(), TrainableSpec("lora", quantize="3bit"))
    broken = tiny_causal()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="up_proj holds NaN"):
        make_trainable(broken, TrainableSpec("lora", rank=2, quantize="4bit"))


def test_a_16_bit_base_is_packed_as_stored_and_the_rest_is_fp32(tmp_path):
    base = save_tiny(tiny_causal("llama").bfloat16(), tmp_path / "base")
    spec = TrainableSpec("lora", rank=2, quantize="4bit")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load_backbone(base, "causal", dtype=dtype)
        make_trainable(model, spec)
        assert {p.dtype for p in model.parameters()} == {torch.float32} == {model.dtype}
        with torch.no_grad():
            found.append(model(input_ids=IDS).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_computed_again_give_the_same_gradients(kind):
    def gradients(again):
        model = tiny_causal("llama").train()
        make_trainable(model, TrainableSpec("lora", rank=2, quantize=kind))
        for layer in lora.lora_layers(model).values():
            layer.lora_B.data += 0.1 * normal(*layer.lora_B.shape)
        if again:
            recompute_activations(model)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1).square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), sum(kept)

    (kept, much), (again, little) = gradients(False), gradients(True)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)
    assert little < much and kept.abs().max() > 1e-4


def test_two_hundred_steps_stay_finite_and_learn():
    torch.manual_seed(0)
    model = tiny_causal("llama").train()
    make_trainable(model, TrainableSpec("lora", rank=4, quantize="4bit"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.6 * losses[0]


def test_the_adapter_says_beside_what_it_was_trained_and_opens_on_either_base(tmp_path):
    base = save_tiny(tiny_causal("llama"), tmp_path / "base")
    model = load_backbone(base, "causal")
    make_trainable(model, TrainableSpec("lora", rank=2, quantize="4bit", train_also=("head",)))
    adapters.save_adapter(model, tmp_path / "adapter", "tiny/base")
    assert "4bit" in (tmp_path / "adapter" / adapters.RECORD).read_text()
    plain = load_backbone(base, "causal")
    adapters.load_adapter(plain, tmp_path / "adapter")
    again = load_backbone(base, "causal")
    table = make_trainable(again, TrainableSpec("lora", quantize="4bit", adapter=str(tmp_path / "adapter")))
    assert "lm_head.weight" in table.names and isinstance(again.lm_head, nn.Linear)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
