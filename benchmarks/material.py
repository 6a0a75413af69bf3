"""What every contestant is given: random-weight models of real shapes and synthetic rows, made from a seed.

Speed does not depend on what the words mean, so nothing is downloaded: a tokenizer of one word a token, rows whose
lengths follow short instruction data, and weights drawn once and shared by all contestants through one folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama by its measures."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    positions: int = 2048


SHAPES = {
    "135M": Shape(576, 30, 9, 3, 1536, 49152),
    "15M": Shape(288, 6, 6, 6, 768, 32000),
    "0.5B": Shape(896, 24, 14, 2, 4864, 151936, 8192),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151936, 8192),
}


def model_folder(root: Path, name: str) -> Path:
    """The model and its tokenizer under `root`, made at the first call."""
    folder = root / name
    if not (folder / "model.safetensors").exists():
        _write_model(folder, SHAPES[name])
    return folder


def _write_model(folder: Path, shape: Shape) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _write_tokenizer(folder, shape)


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(shape.vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=shape.positions, **names)
    fast.save_pretrained(folder)


def rows_file(root: Path, kind: str, num_rows: int, vocabulary: int, *, seed: int = 0) -> Path:
    """`num_rows` synthetic rows of `kind` (pairs, long, preferences, prompts) as JSONL, made at the first call."""
    path = root / f"{kind}-{num_rows}-{vocabulary}.jsonl"
    if not path.exists():
        draw = np.random.default_rng([seed, num_rows])
        lines = [json.dumps(_ROWS[kind](draw, vocabulary)) for _ in range(num_rows)]
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.rename(path)
    return path


def _words(draw: np.random.Generator, low: int, high: int, vocabulary: int) -> str:
    count = int(draw.integers(low, high))
    return " ".join(f"w{i}" for i in draw.integers(0, vocabulary - len(SPECIAL), count))


def _pair(draw: np.random.Generator, vocabulary: int) -> dict[str, str]:
    return {"prompt": _words(draw, 12, 60, vocabulary), "completion": " " + _words(draw, 8, 90, vocabulary)}


def _long(draw: np.random.Generator, vocabulary: int) -> dict[str, str]:
    return {"prompt": _words(draw, 200, 400, vocabulary), "completion": " " + _words(draw, 1500, 1640, vocabulary)}


def _preference(draw: np.random.Generator, vocabulary: int) -> dict[str, str]:
    return {
        "prompt": _words(draw, 12, 60, vocabulary),
        "chosen": " " + _words(draw, 8, 90, vocabulary),
        "rejected": " " + _words(draw, 8, 90, vocabulary),
    }


def _prompt(draw: np.random.Generator, vocabulary: int) -> dict[str, str]:
    return {"prompt": _words(draw, 12, 40, vocabulary)}


_ROWS = {"pairs": _pair, "long": _long, "preferences": _preference, "prompts": _prompt}
