"""LoRA against explicit matrices; what it keeps for the backward; its gradients; its neighbours DoRA and PiSSA."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_causal
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.model import lora
from tunesmith.model.lora import LoraLinear, LoraSpec

VARIANTS = [
    LoraSpec(rank=2),
    LoraSpec(rank=2, rank_stabilized=True),
    LoraSpec(rank=2, dora=True),
    LoraSpec(rank=2, init="pissa"),
]


def random_layer(spec: LoraSpec, *, conv: bool = False, bias: bool = True, dtype=torch.float32) -> LoraLinear:
    torch.manual_seed(0)
    base: nn.Module = Conv1D(7, 5) if conv else nn.Linear(5, 7, bias=bias)
    layer = LoraLinear(base.to(dtype), spec, name="x")
    with torch.no_grad():
        layer.lora_A.add_(0.3 * torch.randn_like(layer.lora_A))
        layer.lora_B.add_(0.3 * torch.randn_like(layer.lora_B))
    return layer


@pytest.mark.parametrize("conv", [False, True])
def test_equals_explicit_matrices(conv):
    layer = random_layer(LoraSpec(rank=2, alpha=6), conv=conv)
    x = torch.randn(3, 4, 5)
    explicit = layer.base(x) + (6 / 2) * (x @ layer.lora_A.t()) @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), explicit)
    assert not torch.allclose(layer(x), layer.base(x), atol=1e-3), "the control: an adapter that is not zero changes it"


def test_doubling_alpha_doubles_the_contribution():
    x = torch.randn(3, 5)
    once, twice = (random_layer(LoraSpec(rank=2, alpha=a)) for a in (4.0, 8.0))
    torch.testing.assert_close(twice(x) - twice.base(x), 2 * (once(x) - once.base(x)))


@pytest.mark.parametrize("spec", [spec for spec in VARIANTS if not spec.dora], ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_gradients_by_finite_differences(spec, conv):
    layer = random_layer(spec, conv=conv, dtype=torch.float64).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    parameters = (layer.lora_A, layer.lora_B)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


def test_dora_gradients_equal_autograd_with_a_constant_norm():
    layer = random_layer(LoraSpec(rank=2, dora=True))
    x = torch.randn(4, 5)
    layer(x).square().sum().backward()
    ours = [p.grad.clone() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)]
    layer.zero_grad()
    total = layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A
    scale = layer.lora_magnitude_vector / total.norm(dim=1).detach()
    (scale * (x @ total.t()) + layer.base.bias).square().sum().backward()
    for ours_part, parameter in zip(ours, (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector), strict=True):
        torch.testing.assert_close(ours_part, parameter.grad)


def test_keeps_only_the_input_and_the_inner_product():
    layer, x = random_layer(LoraSpec(rank=2)), torch.randn(50, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {layer.lora_A.data_ptr(), layer.lora_B.data_ptr(), x.data_ptr()}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in extra] == [(50, 2)]


def test_no_gradient_for_an_input_that_needs_none_and_none_for_the_base():
    layer = random_layer(LoraSpec(rank=2))
    asked = []
    layer.frozen_backward = lambda grad: asked.append(1)  # type: ignore[method-assign]
    layer(torch.randn(3, 5)).sum().backward()
    assert not asked and layer.base.weight.grad is None and layer.lora_A.grad is not None


def test_dropout_has_the_same_mask_in_the_backward_and_none_in_eval():
    layer = random_layer(LoraSpec(rank=2, dropout=0.5)).train()
    x = torch.randn(40, 5, requires_grad=True)
    torch.manual_seed(3)
    out = layer(x)
    update = out - layer.base(x)
    out.sum().backward()
    torch.manual_seed(3)
    seed = int(torch.randint(0, 2**62, ()))
    mask = lora._mask(x, 0.5, seed)
    torch.testing.assert_close(update, layer.scaling * (x * mask) @ layer.lora_A.t() @ layer.lora_B.t())
    grad_a = layer.scaling * (torch.ones(40, 7) @ layer.lora_B).t() @ (x * mask)
    torch.testing.assert_close(layer.lora_A.grad, grad_a)
    assert not torch.allclose(layer(x), out), "another draw, another mask"
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(100, 100, 2, 400), (1000, 1000, 2, 4000), (768, 3072, 4, 4 * 3840)])
def test_counts(shape):
    d, k, rank, expected = shape
    layer = LoraLinear(nn.Linear(k, d, bias=False), LoraSpec(rank=rank))
    assert tuple(layer.lora_A.shape) == (rank, k) and tuple(layer.lora_B.shape) == (d, rank)
    assert layer.lora_A.numel() + layer.lora_B.numel() == expected == lora.count([(d, k)], rank)


@pytest.mark.parametrize(("rank", "expected"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_counts_of_gpt3_on_query_and_value(rank, expected):
    assert lora.count([(12288, 12288)] * 2 * 96, rank) == expected


@pytest.mark.parametrize("rank", [0, 6])
def test_rank_that_does_not_fit_is_refused(rank):
    model = nn.Sequential(nn.Linear(5, 7))
    with pytest.raises(ModelError, match="7 x 5 matrix"):
        lora.inject(model, ["0"], LoraSpec(rank=rank))


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_merged_equals_unmerged_and_comes_back(spec):
    layer = random_layer(spec)
    model, x = nn.Sequential(layer), torch.randn(3, 5)
    before, weight = model(x), layer.base.weight.clone()
    lora.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer.base.weight, weight, atol=1e-3)
    if not spec.dora:
        lora.unmerge(model)
        torch.testing.assert_close(layer.base.weight, weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_a_nan_adapter_is_not_merged_and_changes_nothing():
    model = nn.Sequential(random_layer(LoraSpec(rank=2)), random_layer(LoraSpec(rank=2)))
    del model[1]
    model.append(nn.Linear(7, 5))
    good = model[0].base.weight.clone()
    model[0].lora_B.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"0\.lora_B"):
        lora.merge(model)
    assert torch.equal(model[0].base.weight, good)


def test_pissa_starts_at_the_leading_singular_vectors_and_leaves_the_base_alone():
    torch.manual_seed(0)
    base = nn.Linear(6, 8, bias=False)
    weight = base.weight.detach().clone()
    layer = LoraLinear(base, LoraSpec(rank=3, alpha=6, init="pissa"))
    u, s, vh = torch.linalg.svd(weight)
    best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    torch.testing.assert_close(layer.scaling * (layer.lora_B @ layer.lora_A).detach(), best, rtol=1e-4, atol=1e-5)
    assert torch.equal(base.weight, weight)


def test_rank_of_the_update_is_at_most_r():
    layer = random_layer(LoraSpec(rank=2))
    assert torch.linalg.matrix_rank(layer.merged_matrix() - layer.base.weight, atol=1e-5) == 2


def test_autocast_computes_low_and_keeps_fp32_masters():
    layer = random_layer(LoraSpec(rank=2))
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_start_does_not_depend_on_the_other_targets_nor_touch_the_global_state():
    state = torch.random.get_rng_state()
    one, two = tiny_causal("llama"), tiny_causal("llama")
    name = "model.layers.1.self_attn.q_proj"
    first = lora.inject(one, [name], LoraSpec(rank=2, seed=5))[name]
    second = lora.inject(two, ["model.layers.0.mlp.up_proj", name], LoraSpec(rank=2, seed=5))[name]
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(state, torch.random.get_rng_state())
    third = lora.inject(tiny_causal("llama"), [name], LoraSpec(rank=2, seed=6))[name]
    assert not torch.equal(first.lora_A, third.lora_A)


def test_a_family_may_write_into_what_an_adapted_layer_answers():
    layer = LoraLinear(nn.Linear(8, 6), LoraSpec(rank=2))
    x = torch.randn(2, 3, 8, requires_grad=True)
    answer = layer(x)
    answer /= 2.0
    answer.sum().backward()
    with torch.no_grad():
        expected = (torch.ones(2, 3, 6) / 2) @ layer.merged_matrix()
    torch.testing.assert_close(x.grad, expected)
