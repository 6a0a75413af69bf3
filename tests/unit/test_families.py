"""Families with ways of their own: attention that packs nothing, routers that are linear by name, positions without
an end. Each trains, or says what it does not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import save_tiny, tiny_causal, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import load_backbone, load_config
from tunesmith.model.lora import is_linear
from tunesmith.model.packing import Layout
from tunesmith.model.trainable import TrainableSpec, experts_note, find_targets, make_trainable
from tunesmith.rollout.sampler import Sampler

OWN = {
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8,
                "max_position_embeddings": 64},
    "falcon": {"num_hidden_layers": 2, "num_attention_heads": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32},
}  # fmt: skip


def build(family: str, **more: Any) -> Any:
    """A random model of a family that `tests/tiny.py` does not make."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2} | OWN.get(family, {}) | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def rows(*lengths: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    weights = [np.arange(n, dtype=np.float32).clip(0, 1) for n in lengths]
    return [Sample(draw.integers(7, 300, len(w)).astype(np.int32), w) for w in weights]


@pytest.mark.parametrize("family", ["gpt_neo", "falcon"])
def test_attention_of_their_own_is_padded_and_takes_more_tokens_than_the_model_has_positions(family):
    model = LanguageModel(build(family))
    assert model.layout is Layout.PADDED and "attention of its own" in model.why
    samples = rows(40, 30, 35)
    together = model(collate(samples)).logprobs
    alone = torch.cat([model(collate([sample])).logprobs for sample in samples], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["codegen", "rwkv"])
def test_a_family_that_knows_no_padding_opens_with_the_tokenizers(family, tmp_path):
    save_tiny(build(family), tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "pad_token_id")
    assert load_config(tmp_path).pad_token_id is None
    assert load_backbone(tmp_path, "causal").config.pad_token_id == tiny_tokenizer().pad_token_id


def test_a_family_without_an_end_of_positions_is_sampled():
    sampler = Sampler(LanguageModel(build("xlnet")), tiny_tokenizer())
    assert sampler.model.backbone.config.max_position_embeddings == -1
    found = sampler.sample([[7, 8, 9]], max_tokens=3, temperature=0.0)
    assert 1 <= len(found[0].ids) <= 3


class Router(nn.Linear):
    """Linear by name; answers with two tensors."""

    def forward(self, input: torch.Tensor) -> Any:
        scores = super().forward(input)
        return scores.softmax(-1), scores


class Plain(nn.Linear):
    """A product in its own words, as Falcon's linears have it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_by_name_alone_carries_no_adapter(device):
    assert not is_linear(Router(8, 4, device=device))
    assert is_linear(Plain(8, 4, device=device))


def test_experts_stay_frozen_and_that_is_said():
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    backbone = build("qwen2_moe", **sizes, **experts, shared_expert_intermediate_size=32)
    gates = [name for name, module in backbone.named_modules() if name.endswith("shared_expert_gate")]
    assert gates and not set(gates) & set(find_targets(backbone, "all-linear"))
    make_trainable(backbone, TrainableSpec(method="lora", rank=4))
    held = sum(p.numel() for name, p in backbone.named_parameters() if "experts." in name and p.dim() == 3)
    assert held > 0 and experts_note(backbone).startswith(f"{held:,} parameters of experts")


def test_no_experts_no_note():
    backbone = tiny_causal()
    make_trainable(backbone, TrainableSpec(method="lora", rank=4))
    assert experts_note(backbone) == ""
