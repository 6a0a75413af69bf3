"""What every contestant is given: random-weight models of real shapes and synthetic rows, made from a seed.

Speed does not depend on what the words mean, so nothing is downloaded: a tokenizer of one word a token, rows whose
lengths follow short instruction data, and weights drawn once and shared by all contestants through one folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MADE = "2"
"""Goes up when what a model's folder holds changes: folders of an earlier call are written again."""
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
_ENCODER = Shape(384, 6, 12, 12, 1536, 30522, 512)


def model_folder(root: Path, name: str, *, scores: bool = False) -> Path:
    """The model and its tokenizer under `root` (with a head of one score, if asked for), made at the first call.

    Decoded text read again gives the same tokens: what is sampled reaches a reward model as it was.
    """
    folder = root / (f"{name}-score" if scores else name)
    made = root / f"{folder.name}.made"
    if not made.exists() or made.read_text(encoding="utf-8") != _MADE:
        _write_model(folder, SHAPES[name], scores)
        made.write_text(_MADE, encoding="utf-8")
    return folder


def encoder_folder(root: Path) -> Path:
    """A BERT of the shape of all-MiniLM-L6-v2 with random weights and two classes, made at the first call."""
    folder = root / "encoder-22M"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, pad_token_id=0)
        BertForSequenceClassification(config).save_pretrained(folder)
        _write_tokenizer(folder, _ENCODER)
    return folder


def classify_rows(root: Path) -> Path:
    """1,000 labelled rows with the lengths of film reviews: 60 to 700 words, of which 512 are read."""
    return rows_file(root, "labelled", 1000, _ENCODER.vocabulary)


def shape_of(model: Path) -> Shape | None:
    """The shape of a folder of `model_folder`; None for another's."""
    return SHAPES.get(model.name.removesuffix("-score"))


def reward_run(root: Path, name: str) -> Path:
    """A finished run of stage reward of the shape, and so a reward model that both sides can open; made once."""
    import yaml

    from tunesmith.stages import from_run

    folder = root / f"{name}-reward"
    if not (folder / "final").exists():
        recipe = {
            "stage": "reward", "base": str(model_folder(root, name, scores=True)), "precision": "float32",
            "data": {"train": str(rows_file(root, "preferences", 8, SHAPES[name].vocabulary))},
            "tune": {"method": "full"}, "reward_model": {"calibrate": False},
            "train": {"steps": 1, "batch_examples": 4, "learning_rate": 1e-5},
        }  # fmt: skip
        path = root / f"{name}-reward.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "tunesmith", "train", str(path), "--run", str(folder), "--json"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    from_run.model_folder(folder)
    return folder


def reward_model(run: Path) -> Path:
    """The plain model folder of a `reward_run`."""
    from tunesmith.stages import from_run

    return from_run.model_folder(run)


def _write_model(folder: Path, shape: Shape, scores: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

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
        **({"id2label": {0: "reward"}, "label2id": {"reward": 0}} if scores else {}),  # tunesmith keeps this head
    )
    (LlamaForSequenceClassification if scores else LlamaForCausalLM)(config).save_pretrained(folder)
    _write_tokenizer(folder, shape)


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(shape.vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
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


def _labelled(draw: np.random.Generator, vocabulary: int) -> dict[str, str | int]:
    return {"text": _words(draw, 60, 700, vocabulary), "label": int(draw.integers(0, 2))}


_ROWS = {"pairs": _pair, "long": _long, "preferences": _preference, "prompts": _prompt, "labelled": _labelled}
