"""A backbone made lean computes what it computed: every family, adapter or not, fp32 and bf16; controls that differ."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, tiny_causal, tiny_masked
from torch import nn

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate
from tunesmith.model import lean
from tunesmith.model.adapters import disabled
from tunesmith.model.language import LanguageModel
from tunesmith.model.packing import flat_hidden, recompute_activations
from tunesmith.model.trainable import TrainableSpec, make_trainable

LENGTHS = (5, 17, 1, 9)


def batch_of(seed: int = 3) -> Batch:
    draw = np.random.default_rng(seed)
    return collate([row_of(draw, length) for length in LENGTHS])


def row_of(draw: np.random.Generator, length: int) -> Sample:
    """Random tokens, all but the first trained on."""
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Sample(draw.integers(7, 300, length).astype(np.int32), weights, origin="row:1")


def step(backbone: Any, causal: bool, compute: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradient of every trained parameter by name."""
    model = LanguageModel(backbone, causal=causal, compute=compute).train()
    logprobs = model(batch_of()).logprobs
    assert logprobs is not None
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_every_family_answers_and_learns_as_before(family: str, method: str) -> None:
    causal = family in CAUSAL
    extra: Any = {"attention_dropout": 0.0} if family == "modernbert" else {}
    backbone = (tiny_causal if causal else tiny_masked)(family, **extra)
    _without_dropout(backbone)
    make_trainable(backbone, TrainableSpec(method, rank=4, alpha=8.0))
    changed = copy.deepcopy(backbone)
    lean.make_lean(changed, torch.float32)
    assert [n for n, _ in changed.named_parameters()] == [n for n, _ in backbone.named_parameters()]
    expected, wanted = step(backbone, causal, torch.float32)
    found, gradients = step(changed, causal, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        scale = float(wanted[name].abs().max().clamp_min(1e-3))
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def _without_dropout(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_norms_are_replaced_and_gated_mlps_where_they_are_silu(family: str) -> None:
    backbone = tiny_causal(family)
    lean.make_lean(backbone, torch.float32)
    kinds = [type(module).__name__ for module in backbone.modules()]
    assert "LeanRMSNorm" in kinds and not any(kind.endswith("RMSNorm") for kind in kinds if kind != "LeanRMSNorm")
    assert ("LeanGatedMLP" in kinds) == (family != "gemma3"), "Gemma's MLP has GELU"


@pytest.mark.parametrize("again", [False, True])
def test_blocks_that_are_computed_again_keep_nothing_of_their_mlp(again: bool) -> None:
    backbone, kept = tiny_causal("llama"), []
    make_trainable(backbone, TrainableSpec("lora", rank=4, alpha=8.0))
    if again:
        recompute_activations(backbone)
    lean.make_lean(backbone, torch.float32)
    model = LanguageModel(backbone).train()
    for layer in backbone.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, __, out: kept.append(weakref.ref(out)))
    logprobs = model(batch_of()).logprobs
    gc.collect()
    assert logprobs is not None
    assert [made() is None for made in kept] == [again] * 2, "control: without, it is kept for the backward"


def test_a_norm_that_computes_something_else_stays() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden / hidden.abs().mean(-1, keepdim=True) * self.weight

    holder = nn.ModuleDict({"norm": OddRMSNorm()})
    lean.make_lean(holder, torch.float32)
    assert isinstance(holder["norm"], OddRMSNorm)


def test_narrow_weights_give_the_products_that_autocast_gives() -> None:
    """Only linears: rounding at every product and rounding once are the same numbers."""
    backbone = tiny_causal("llama")
    make_trainable(backbone, TrainableSpec("lora", rank=4, alpha=8.0, targets=["q_proj"]))
    changed = copy.deepcopy(backbone)
    lean.narrow_frozen(changed, torch.bfloat16)
    expected, wanted = step(backbone, True, torch.bfloat16)
    found, gradients = step(changed, True, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-2 * wanted[name].abs().max(), name
    layer = changed.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == layer.self_attn.q_proj.base.weight.dtype == torch.bfloat16
    assert layer.input_layernorm.weight.dtype == torch.float32


def test_what_narrowing_leaves_alone() -> None:
    tied = tiny_causal("llama", tie_word_embeddings=True)
    make_trainable(tied, TrainableSpec("lora", rank=4, alpha=8.0, dora=True))
    lean.narrow_frozen(tied, torch.bfloat16)
    assert tied.lm_head.weight.dtype == torch.float32, "the embedding reads it too"
    assert tied.model.layers[0].mlp.up_proj.base.weight.dtype == torch.float32, "DoRA reads it exactly"
    full = tiny_causal("llama")
    lean.narrow_frozen(full, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in full.parameters()), "what trains is in fp32"


def test_bfloat16_stays_near_and_the_base_can_be_had_back() -> None:
    backbone = tiny_causal("llama")
    make_trainable(backbone, TrainableSpec("lora", rank=4, alpha=8.0))
    expected, _ = step(copy.deepcopy(backbone), True, torch.float32)
    lean.make_lean(backbone, torch.bfloat16)
    found, gradients = step(backbone, True, torch.bfloat16)
    assert (found - expected).abs().max() < 0.15
    assert all(g.dtype == torch.float32 for g in gradients.values())
    model = LanguageModel(backbone, compute=torch.bfloat16).eval()
    with disabled(backbone), torch.no_grad():
        assert model(batch_of()).logprobs is not None
    with torch.no_grad():
        assert torch.isfinite(backbone(input_ids=torch.tensor([[7, 8, 9]])).logits).all(), "asked in fp32 too"


@pytest.mark.parametrize("tokens", [(33,), (16, 17), (100, 31)])
def test_rows_are_brought_to_a_round_size_that_nobody_sees(tokens: tuple[int, ...]) -> None:
    backbone, seen = tiny_causal("llama"), []
    LanguageModel(backbone)  # registers the attention that keeps segments apart
    backbone.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    draw = np.random.default_rng(0)
    rows = [row_of(draw, n) for n in tokens]
    with torch.no_grad():
        together = flat_hidden(backbone, collate(rows), causal=True, offset=0)
        alone = torch.cat([flat_hidden(backbone, collate([row]), causal=True, offset=0) for row in rows])
    assert len(together) == sum(tokens)
    assert seen[0] % 8 == 0 and sum(tokens) <= seen[0] <= max(sum(tokens) * 17 / 16, sum(tokens) + 8)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_long_row_of_short_segments_asks_for_no_position_that_a_family_lacks() -> None:
    backbone, draw = tiny_causal("gpt2"), np.random.default_rng(0)
    LanguageModel(backbone)
    longest = int(backbone.config.max_position_embeddings)
    rows = [row_of(draw, longest) for _ in range(32)] + [row_of(draw, 7)]
    assert -sum(len(row.ids) for row in rows) % 512 > longest, "one segment would be too long"
    with torch.no_grad():
        together = flat_hidden(backbone, collate(rows), causal=True, offset=0)
        alone = flat_hidden(backbone, collate(rows[-1:]), causal=True, offset=0)
    torch.testing.assert_close(together[-7:], alone, rtol=1e-5, atol=1e-5)


def test_dropout_is_replaced_and_draws_what_it_should() -> None:
    holder = nn.ModuleDict({"drop": nn.Dropout(0.1)}).train()
    lean.make_lean(holder, torch.float32)
    assert isinstance(holder["drop"], lean.LeanDropout) and holder["drop"].training
    rows = torch.ones(400, 300, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = holder["drop"](rows)
        torch.manual_seed(0)
        assert torch.equal(out, holder["drop"](rows)), "the step's seed decides"
        assert not torch.equal(out, holder["drop"](rows))
    assert abs(float((out == 0).float().mean()) - 0.1) < 0.005
    assert set(out.detach().unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9))}
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert torch.equal(gradient, out.detach())
    assert torch.equal(holder["drop"].eval()(rows), rows)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox", "modernbert"])
def test_rotary_embeddings_answer_in_the_compute_type_and_only_there(family: str) -> None:
    causal, seen = family in CAUSAL, []
    backbone = (tiny_causal if causal else tiny_masked)(family)
    expected, _ = step(copy.deepcopy(backbone), causal, torch.float32)
    lean.make_lean(backbone, torch.bfloat16)
    rotary = [m for m in backbone.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    assert rotary
    rotary[0].register_forward_hook(lambda m, args, out: seen.append(out[0].dtype))
    with lean.narrowed(backbone, torch.bfloat16):
        assert len(rotary[0]._forward_hooks) == 2, "no second hook of the same kind"
    found, _ = step(backbone, causal, torch.bfloat16)
    assert seen[-1] == torch.bfloat16 and torch.float32 in seen, "the check at load is in fp32"
    assert (found - expected).abs().max() < 0.3


def test_hooks_of_sampling_are_taken_off_again() -> None:
    backbone = tiny_causal("llama")
    with lean.narrowed(backbone, torch.bfloat16):
        assert backbone.model.rotary_emb._forward_hooks
    assert not backbone.model.rotary_emb._forward_hooks


def test_without_weights_structure_decides() -> None:
    """On the meta device nothing can be compared: a gated MLP of another activation must not become one of SiLU."""

    class GatedMLP(nn.Module):
        def __init__(self, act_fn: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = act_fn

    with torch.device("meta"):
        model = nn.ModuleDict({"silu": GatedMLP(nn.SiLU()), "gelu": GatedMLP(nn.GELU()), "drop": nn.Dropout(0.1)})
        full = tiny_causal("llama")
    lean.make_lean(model, torch.bfloat16)
    assert [type(model[name]).__name__ for name in model] == ["LeanGatedMLP", "GatedMLP", "LeanDropout"]
    lean.make_lean(full, torch.bfloat16)
    kinds = {type(module).__name__ for module in full.modules()}
    assert {"LeanRMSNorm", "LeanGatedMLP"} <= kinds and "LlamaRMSNorm" not in kinds


def test_a_frozen_head_is_rounded_once_and_anew_when_it_is_exchanged() -> None:
    backbone = tiny_causal("llama")
    make_trainable(backbone, TrainableSpec("lora", rank=4, alpha=8.0, train_also=["lm_head"]))
    nn.init.normal_(backbone.lm_head.weight.data, std=0.3)
    backbone.requires_grad_(False)
    model = LanguageModel(backbone, compute=torch.bfloat16).eval()

    def answer(of: LanguageModel) -> torch.Tensor:
        with torch.no_grad():
            logprobs = of(batch_of()).logprobs
        assert logprobs is not None
        return logprobs

    tuned = answer(model)
    assert model._rounded is not None
    kept = model._rounded[2]
    assert torch.equal(answer(model), tuned) and model._rounded[2] is kept
    with disabled(backbone):
        base = answer(model)
        assert torch.equal(base, answer(LanguageModel(backbone, compute=torch.bfloat16).eval()))
    assert (base - tuned).abs().max() > 1e-2  # control: the head does matter
    assert torch.equal(answer(model), tuned)
    with torch.no_grad():
        backbone.lm_head.weight.mul_(0.5)
    assert not torch.equal(answer(model), tuned)
