"""A Decoder gives the logits of the family's own forward, or says why it does not read the backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny import tiny_causal, tiny_tokenizer
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from tunesmith.errors import ModelError
from tunesmith.model import decoding, lora
from tunesmith.model.decoding import Decoder, why_not
from tunesmith.model.heads import LanguageHead, language_head
from tunesmith.model.language import LanguageModel
from tunesmith.model.lean import make_lean
from tunesmith.model.lora import LoraSpec, inject, lora_layers, switched_off
from tunesmith.rollout.sampler import Sampler

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


def test_law_with_adapters_that_start_at_singular_vectors_and_some_switched_off_or_merged():
    backbone = backbone_of("llama")
    adapted(backbone, ("q_proj", "k_proj", "gate_proj", "lm_head"), init="pissa")
    assert_same(backbone)
    layers = lora_layers(backbone)
    for name, layer in layers.items():
        layer.enabled = "k_proj" not in name
    assert_same(backbone)
    lora.merge(backbone)
    assert_same(backbone)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 1), (1, 6)])
def test_prompts_of_one_length_of_one_token_and_padded_ones(lengths: tuple[int, ...]):
    backbone = backbone_of("qwen3")
    rows = [list(range(7 + i, 7 + i + n)) for i, n in enumerate(lengths)]
    width = max(lengths)
    with torch.no_grad():
        decoder = Decoder(backbone, head_of(backbone), torch.float32)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        first, second = decoder.begin(ids, real, 1, 1), decoder.step(torch.tensor([30] * len(rows)))
        for i, row in enumerate(rows):
            logits = backbone(input_ids=torch.tensor([[*row, 30]]), use_cache=False).logits[0]
            torch.testing.assert_close(torch.stack([first[i], second[i]]), logits[-2:], atol=2e-5, rtol=1e-4)


def with_dora(backbone: Any) -> None:
    adapted(backbone, ("q_proj",), dora=True)


def with_another_linear(backbone: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = backbone.model.layers[0].self_attn
    double = Doubled(layer.q_proj.in_features, layer.q_proj.out_features, bias=False)
    layer.q_proj = double


def with_a_parameter_of_its_own(backbone: Any) -> None:
    backbone.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))


def with_other_key_heads(backbone: Any) -> None:
    attention = backbone.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(32, 32, bias=False))
    attention.num_key_value_groups = 1


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
        ("llama", with_a_parameter_of_its_own, "parameters outside"),
        ("llama", with_other_key_heads, "differ in their attention"),
        ("ministral3", None, "rotary parameters hold"),
        ("ernie4_5", None, "logits differ"),
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


@pytest.mark.parametrize("family", ["ernie4_5", "smollm3", "helium"])
def test_kindred_families_are_told_apart_also_where_products_run_in_bfloat16(family: str):
    """Another rotation, or none in every fourth layer: with small weights too little to be seen in bfloat16."""
    backbone, llama = quiet(tiny_causal(family, layers=8)), quiet(tiny_causal("llama", layers=8))
    assert why_not(backbone, head_of(backbone), torch.bfloat16) != ""
    assert why_not(llama, head_of(llama), torch.bfloat16) == ""  # control


def quiet(backbone: Any) -> Any:
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.5)
    return backbone


def test_a_backbone_held_in_bfloat16_is_read_when_that_is_its_type():
    backbone = tiny_causal("llama").bfloat16()
    assert why_not(backbone, head_of(backbone), torch.bfloat16) == ""
    assert "held in torch.bfloat16" in why_not(backbone, head_of(backbone), torch.float32)


def test_a_backbone_that_can_be_read_no_more_runs_as_it_is():
    backbone = tiny_causal("llama")
    with_dora(backbone)
    sampler = Sampler(LanguageModel(backbone), tiny_tokenizer())
    with switched_off(backbone):
        sampler.sample(PROMPTS, max_tokens=2)
    assert sampler.why_slow == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert len(sampler.sample(PROMPTS, max_tokens=2)) == 3
    backbone.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="weights are damaged"):
        sampler.sample(PROMPTS, max_tokens=2)


def test_control_a_step_at_the_wrong_position_is_found(monkeypatch: pytest.MonkeyPatch):
    backbone = backbone_of("llama")

    def late(self: Decoder, tokens: Tensor) -> Tensor:
        self._places = self._places + 1
        return step(self, tokens)

    step, turns = Decoder.step, Decoder._turns
    monkeypatch.setattr(Decoder, "step", late)
    monkeypatch.setattr(Decoder, "_turns", lambda self, longest: turns(self, longest + 8))
    assert "logits differ" in why_not(backbone, head_of(backbone), torch.float32)
