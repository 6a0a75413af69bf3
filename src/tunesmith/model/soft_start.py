"""How a soft prompt begins: what the recipe asks for, whether this base can have one, and its first values."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.heads import score_head
from tunesmith.model.load import load_tokenizer
from tunesmith.model.packing import attention_windows
from tunesmith.model.soft_prompt import CACHE_NAMES, PLACE, SoftPrompt

STARTS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


def put_in(backbone: Any, config: Any, *, seed: int = 0) -> None:
    """Make the soft prompt that PEFT's `config` describes, complete `config` for this base, and hang it in.

    Raises ModelError for a base or settings that cannot have one.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    _refuse_base(backbone, kind)
    if type(config.num_virtual_tokens) is not int or config.num_virtual_tokens < 1:  # a bool is an int
        raise ModelError(
            f"tune.peft.num_virtual_tokens is {config.num_virtual_tokens!r}: {kind} needs how many virtual tokens "
            "stand before every text, for instance 20"
        )
    if getattr(config, "prefix_projection", False):
        raise ModelError("tune.peft.prefix_projection is not supported: leave it out, keys and values train directly")
    heads, width, layers = _shape_of(backbone, kind)
    _complete(config, heads=heads, width=width, layers=layers)
    prefix = kind == "PREFIX_TUNING"
    values = _start(backbone, config, config.num_virtual_tokens, 2 * layers * width if prefix else width, seed)
    shape = {"layers": layers, "heads": heads} if prefix else {}
    backbone.add_module(PLACE, SoftPrompt(values.to(backbone.device), **shape))


def _refuse_base(backbone: Any, kind: str) -> None:
    name, instead = type(backbone).__name__, "use tune.method lora"
    classifier = name.endswith("ForSequenceClassification")
    head = score_head(backbone) if classifier else None
    if name.endswith("ForMaskedLM") or (head is not None and head.pool != "last"):
        raise ModelError(
            f"{kind} is for models that read from left to right, and {name} is an encoder: its answer is read at the "
            f"first token, where PEFT's format puts a virtual one; {instead}"
        )
    if classifier and kind == "PREFIX_TUNING":
        raise ModelError(
            f"PREFIX_TUNING is for language models: PEFT opens no prefix before a {name}; use peft_type PROMPT_TUNING, "
            "or tune.method lora"
        )
    accepted = inspect.signature(backbone.forward).parameters
    needed = CACHE_NAMES if kind == "PREFIX_TUNING" else ("inputs_embeds",)
    if not set(needed) & set(accepted):
        raise ModelError(f"{kind} cannot be put into {name}: its forward takes no {needed[-1]}; {instead}")
    windows = attention_windows(backbone.config.get_text_config()) if kind == "PREFIX_TUNING" else []
    if windows:
        raise ModelError(
            f"PREFIX_TUNING cannot be put into {name}: its attention sees a window of {min(windows)} tokens, and the "
            "prefix would fall out of sight; use peft_type PROMPT_TUNING, or tune.method lora"
        )


def _shape_of(backbone: Any, kind: str) -> tuple[int, int, int]:
    """(heads, width, layers) as PEFT counts them: of the model, or of the keys for a prefix."""
    config = backbone.config.get_text_config()
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    if kind == "PREFIX_TUNING":
        size = int(getattr(config, "head_dim", None) or width // heads)
        heads = int(getattr(config, "num_key_value_heads", None) or heads)
        width = size * heads
    else:
        width = int(backbone.get_input_embeddings().weight.shape[1])
    return heads, width, int(config.num_hidden_layers)


def _complete(config: Any, *, heads: int, width: int, layers: int) -> None:
    found = {
        "token_dim": width, "num_attention_heads": heads, "num_layers": layers, "num_transformer_submodules": 1,
    }  # fmt: skip
    for name, value in found.items():
        given = getattr(config, name, None)
        if given is not None and given != value:
            raise ModelError(f"tune.peft.{name} is {given}, and this base has {value}: leave it out")
        setattr(config, name, value)


def _start(backbone: Any, config: Any, num: int, width: int, seed: int) -> Tensor:
    """First values `[n, width]` fp32 as PEFT draws them, from `seed`: N(0, 1), zeros, or embeddings of real tokens."""
    if config.inference_mode or getattr(config, "init_weights", None) == "zero":
        return torch.zeros(num, width)
    generator = torch.Generator().manual_seed(seed)
    how = getattr(config, "prompt_tuning_init", "RANDOM")
    how = str(getattr(how, "value", how)).upper()
    if how not in STARTS:
        raise ModelError(f"tune.peft.prompt_tuning_init is {how}: choose one of {', '.join(STARTS)}")
    embedding = backbone.get_input_embeddings()
    if how == "RANDOM" or embedding.weight.is_meta:
        return torch.randn(num, width, generator=generator)
    if how == "SAMPLE_VOCAB":
        ids = torch.randint(0, embedding.weight.shape[0], (num,), generator=generator)
    else:
        ids = _text_ids(backbone, config, num)
    with torch.no_grad():
        return embedding(ids.to(embedding.weight.device)).float().cpu().clone()


def _text_ids(backbone: Any, config: Any, num: int) -> Tensor:
    """Ids `[n]` of the first text, cut or repeated to n (2104.08691, 3.2; as PEFT does)."""
    text, name = config.prompt_tuning_init_text, config.tokenizer_name_or_path
    if not isinstance(text, str):
        raise ModelError(f"tune.peft.prompt_tuning_init_text is {text!r}: write a text between quotes")
    trusted = name == backbone.name_or_path and getattr(backbone, "tunesmith_trusted", False)
    ids = list(load_tokenizer(name, trust=name if trusted else None)(text)["input_ids"])
    if not ids:
        raise ModelError("tune.peft.prompt_tuning_init_text has no token: write what the soft prompt begins from")
    return torch.tensor((ids * (num // len(ids) + 1))[:num])
