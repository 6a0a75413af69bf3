"""How far the memory plan is from the truth: plan and run, method by method, on three architectures.

    python evidence/plan_error.py

Every run is its own process; its peak is what the operating system saw. Models have random weights and real shapes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
METHODS = {"full": {"method": "full"}, "last_layers": {"method": "last_layers", "layers": 1},
           "lora": {"method": "lora", "rank": 16}}  # fmt: skip
LENGTHS, BATCHES = (64, 256), (4, 16)
SHAPES = {
    "llama": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
              "intermediate_size": 1408, "vocab_size": 32000,
              "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 32000, "n_positions": 1024},
    "bert": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048,
             "vocab_size": 30522, "max_position_embeddings": 1024},
}  # fmt: skip


def make_base(family: str, folder: Path) -> Path:
    """A model of the family's shape with a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    config = AutoConfig.for_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SHAPES[family])
    factory = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    factory.from_config(config).save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(SHAPES[family]["vocab_size"] - 4))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def write_rows(family: str, length: int, num: int, path: Path) -> Path:
    """Rows of exactly `length` words, every one its own."""
    rows = []
    for i in range(num):
        text = " ".join(f"w{(i * 7919 + k * 31) % 29000}" for k in range(length - 1))
        rows.append({"text": text, "label": str(i % 2)} if family == "bert" else {"text": text})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def recipe_of(family: str, method: str, batch: int, base: Path, data: Path) -> dict:
    """Three steps of the method on the data."""
    stage = "classify" if family == "bert" else "pretrain"
    return {"stage": stage, "base": str(base), "data": {"train": str(data), "max_length": 1024}, "threads": 1,
            "tune": METHODS[method], "train": {"steps": 3, "batch_examples": batch}}  # fmt: skip


def measured(recipe: dict, folder: Path) -> tuple[int, int]:
    """(planned, real) peak bytes, each by its own process."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    answers = []
    for command in (["plan", str(path)], ["train", str(path), "--run", str(folder / "run")]):
        done = subprocess.run([sys.executable, "-m", "tunesmith", *command, "--json"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        answers.append(json.loads(done.stdout))
    return answers[0]["memory"]["peak"], answers[1]["peak_memory_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one length and one batch size")
    quick = parser.parse_known_args()[0].quick  # the options of other parts are passed to this one too
    lengths, batches = (LENGTHS[-1:], BATCHES[-1:]) if quick else (LENGTHS, BATCHES)
    lines, errors = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for family in SHAPES:
            base = make_base(family, Path(scratch) / family)
            for method, length, batch in itertools.product(METHODS, lengths, batches):
                folder = Path(scratch) / f"{family}-{method}-{length}-{batch}"
                folder.mkdir()
                data = write_rows(family, length, 4 * batch, folder / "rows.jsonl")
                planned, real = measured(recipe_of(family, method, batch, base, data), folder)
                errors.append(planned / real - 1)
                sizes = f"{planned / 1e6:,.0f} | {real / 1e6:,.0f} | {errors[-1]:+.1%}"
                row = f"| {family} | {method} | {length} | {batch} | {sizes} |"
                print(row, flush=True)
                lines.append(row)
    text = "\n".join([
        "# The memory plan against real runs", "",
        f"`python evidence/plan_error.py` on {datetime.date.today()}; peak resident memory of the process, MB.", "",
        "| model | method | tokens a row | rows a step | planned | real | plan is |", "|---|---|--:|--:|--:|--:|--:|",
        *lines, "", f"Largest error {max(errors, key=abs):+.1%}, lowest {min(errors):+.1%}, {len(errors)} runs.", "",
    ])  # fmt: skip
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "plan_error.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
