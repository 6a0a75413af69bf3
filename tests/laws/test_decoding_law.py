"""A Decoder gives the logits of the family's own forward, or says why it does not read the backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny import tiny_causal, tiny_tokenizer
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from tunesmith.model import decoding
from tunesmith.model.decoding import Decoder, why_not
from tunesmith.model.heads import LanguageHead, language_head
from tunesmith.model.language import LanguageModel
from tunesmith.model.lean import make_lean
from tunesmith.model.lora import LoraSpec, inject, lora_layers, switched_off
from tunesmith.rollout.sampler import Sampler

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rotary": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                       "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}  # fmt: skip
PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [20]]
GROWTH = torch.tensor([[30, 31, 32, 33, 34, 35], [40, 41, 42, 43, 44, 45], [50, 51, 52, 53, 54, 55]])


def backbone_of(name: str) -> Any:
    family, extra = READ[name]
    backbone = tiny_causal(family, **extra)
    for parameter in backbone.parameters():
        if parameter.dim() == 1:  # norms and biases that do something
            nn.init.normal_(parameter.data, mean=0.5, std=0.2)
    return backbone


def head_of(backbone: Any) -> LanguageHead:
    head = language_head(backbone, causal=True)
    assert head is not None
    return head


def decoded(backbone: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits `[6, V]` after the prompts (two rows each), then after each of two tokens, the last row having left."""
    with torch.no_grad():
        decoder = Decoder(backbone, head_of(backbone), dtype)
        width = max(map(len, PROMPTS))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
        found = [decoder.begin(ids, real, 2, 3), decoder.step(GROWTH[0])]
        decoder.keep(torch.tensor([0, 1, 3, 4]))
        return [*found, decoder.step(GROWTH[1, [0, 1, 3, 4]])]


def one_by_one(backbone: Any) -> list[Tensor]:
    rows = [prompt for prompt in PROMPTS for _ in range(2)]
    found = []
    with torch.no_grad():
        for more in range(3):
            chosen = [0, 1, 3, 4] if more == 2 else range(6)
            ids = [torch.tensor([[*rows[i], *GROWTH[:more, i].tolist()]]) for i in chosen]
            found.append(torch.cat([backbone(input_ids=row, use_cache=False).logits[:, -1] for row in ids]))
    return found


def assert_same(backbone: Any) -> None:
    assert why_not(backbone, head_of(backbone), torch.float32) == ""
    for ours, theirs in zip(decoded(backbone), one_by_one(backbone), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", READ)
def test_law(name: str):
    assert_same(backbone_of(name))


@pytest.mark.parametrize("joined", [0, 1 << 22])
@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj", "down_proj")])
def test_law_with_adapters_beside_some_linears(names: tuple[str, ...], joined: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "JOINED", joined)
    backbone = backbone_of("biases")
    plain = decoded(backbone)
    adapted(backbone, names)
    assert_same(backbone)
    assert (decoded(backbone)[2] - plain[2]).abs().max() > 1e-2  # control: the adapters do something
    with switched_off(backbone):
        for ours, before in zip(decoded(backbone), plain, strict=True):
            torch.testing.assert_close(ours, before)


def adapted(backbone: Any, names: tuple[str, ...], **spec: Any) -> None:
    places = [name for name, _ in backbone.named_modules() if name.endswith(names)]
    inject(backbone, places, LoraSpec(rank=3, alpha=6.0, **spec))
    for layer in lora_layers(backbone).values():
        nn.init.normal_(layer.lora_B, std=0.3)


def test_law_of_a_backbone_made_lean_in_bfloat16():
    backbone = backbone_of("qwen3")
    adapted(backbone, ("q_proj", "down_proj"))
    backbone.requires_grad_(False)
    expected = one_by_one(backbone)
    make_lean(backbone, torch.bfloat16)
    for ours, theirs in zip(decoded(backbone, torch.bfloat16), expected, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 3e-2


def with_dora(backbone: Any) -> None:
    adapted(backbone, ("q_proj",), dora=True)


def with_another_linear(backbone: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = backbone.model.layers[0].self_attn
    double = Doubled(layer.q_proj.in_features, layer.q_proj.out_features, bias=False)
    layer.q_proj = double


def with_a_louder_branch(backbone: Any) -> None:
    class Loud(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    loud = Loud(backbone.config)
    loud.load_state_dict(backbone.model.layers[0].mlp.state_dict())
    backbone.model.layers[0].mlp = loud


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("gemma3", None, "not built like a Llama"),
        ("gpt2", None, "not built like a Llama"),
        ("phi3", None, "not built like a Llama|parts not known"),
        ("mistral", None, "sees a window"),
        ("llama", with_dora, "DoRA"),
        ("llama", with_another_linear, "has a Doubled"),
        ("llama", with_a_louder_branch, "logits differ"),
    ],
)
def test_what_is_built_otherwise_is_not_read_and_runs_as_it_is(
    family: str, change: Callable[[Any], None] | None, why: str
):
    backbone = tiny_causal(family)
    if change is not None:
        change(backbone)
    sampler = Sampler(LanguageModel(backbone), tiny_tokenizer())
    ours = sampler.sample(PROMPTS, temperature=0, max_tokens=5)
    assert sampler.why_slow is not None
    assert why and any(part in sampler.why_slow for part in why.split("|")), sampler.why_slow
    for rollout, prompt in zip(ours, PROMPTS, strict=True):
        ids = list(prompt)
        for token in rollout.ids:
            with torch.no_grad():
                assert token == int(backbone(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_control_a_step_at_the_wrong_position_is_found():
    backbone = backbone_of("llama")
    right = decoded(backbone)
    rotary = backbone.model.rotary_emb.forward
    backbone.model.rotary_emb.forward = lambda x, positions: rotary(x, 2 * positions)
    assert (decoded(backbone)[2] - right[2]).abs().max() > 1e-2
