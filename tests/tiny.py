"""Tiny random models of many families, and a tiny tokenizer, made in memory: `from tests.tiny import tiny_causal`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
CAUSAL = ("llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox")
ENCODERS = ("bert", "distilbert", "roberta", "modernbert")
SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_WORDS = (
    "the cat sat on a mat and was good",
    "Q: what is two plus two?\n\nA: four",
    "user assistant system text",
    "0 1 2 3",
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_WORDS * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, chat: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 320 tokens: pad 0, bos 1, eos 2, unk 3, mask 4, cls 5, sep 6; any text encodes."""
    special = {k: v for k, v in SPECIAL.items() if pad or k != "pad_token"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **special)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(family: str, width: int, layers: int, **extra: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": width // 4}
    own: dict[str, dict[str, Any]] = {
        "llama": {"num_key_value_heads": 2},
        "qwen3": grouped,
        "gemma3_text": grouped | {"sliding_window": 8, "query_pre_attn_scalar": width // 4},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
        "ministral3": grouped,
        "phi3": {"num_key_value_heads": 2},
        "gpt2": {"n_inner": 2 * width},
        "roberta": {"max_position_embeddings": 258},
        "distilbert": {"dim": width, "n_layers": layers, "n_heads": 4, "hidden_dim": 2 * width},
        "modernbert": {
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": 5,
            "sep_token_id": 6,
        },
    }
    dropped = {"distilbert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    if family == "gpt2":
        own["gpt2"] |= {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 256}
        dropped["gpt2"] = (*dropped["distilbert"], "max_position_embeddings")
    kept = {k: v for k, v in common.items() if k not in dropped.get(family, ())}
    return AutoConfig.for_model(family, **(kept | own.get(family, {}) | extra))


def _build(factory: Any, family: str, seed: int, width: int, layers: int, extra: dict[str, Any]) -> Any:
    family = "gemma3_text" if family == "gemma3" else family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(_config(family, width, layers, **extra))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter.data, std=0.1)
    return model.eval()


def tiny_causal(family: str = "llama", *, seed: int = 0, width: int = 32, layers: int = 2, **extra: Any) -> Any:
    """A random causal language model, fp32, eval mode; about 30,000 parameters."""
    return _build(AutoModelForCausalLM, family, seed, width, layers, extra)


def tiny_masked(family: str = "bert", *, seed: int = 0, width: int = 32, layers: int = 2, **extra: Any) -> Any:
    """A random masked language model, fp32, eval mode."""
    return _build(AutoModelForMaskedLM, family, seed, width, layers, extra)


def tiny_classifier(
    family: str = "bert", *, labels: int = 2, seed: int = 0, width: int = 32, layers: int = 2, **extra: Any
) -> Any:
    """A random sequence classifier, fp32, eval mode; causal families too."""
    return _build(AutoModelForSequenceClassification, family, seed, width, layers, {"num_labels": labels} | extra)


def save_tiny(model: Any, folder: Path, *, tokenizer: Any = None) -> Path:
    """Write `model` and a tokenizer to `folder` as a base that `load_backbone` opens."""
    model.save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder
