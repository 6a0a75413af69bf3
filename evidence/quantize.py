"""LoRA beside a base in 32, 8 and 4 bits: held-out loss before and after, peak memory, seconds a step."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, Place, place, rows_of, step_seconds, table, train, write

from tunesmith.embedded import BASE

KINDS = ("none", "8bit", "4bit")
STEPS, REVIEWS, HELD_OUT = 40, 300, 100


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--shape":
        print(json.dumps(_large(sys.argv[2])))
        return
    where, _ = place("quantize")
    where.runs.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(where)
    bases = {BASE: BASE, "models/tinystories-656K": str(where.asset("models/tinystories-656K"))}
    rows = [_tuned(where, recipe, name, base, kind) for name, base in bases.items() for kind in KINDS]
    large = [_row(kind, _in_its_own_process(where, kind)) for kind in KINDS]
    write("quantize", "LoRA beside a quantised base", QUALITY, table(HEAD, rows), MEMORY, table(LARGE, large), NOTES)


HEAD = ("base", "bits", "loss before", "loss after", "difference", "bytes of the linears", "seconds a step")
LARGE = ("bits", "base in memory", "peak, model and one step over the process without it", "seconds a step", "packing")
QUALITY = (
    f"Continued pre-training on {REVIEWS} IMDB reviews (rank 16, all linear layers, {STEPS} steps of 2,048 tokens, "
    f"rate 1e-3), loss in nats a token on {HELD_OUT} others; the same rows, order and seed in all rows of a base."
)
MEMORY = (
    "A Llama of the shape of a 135M model (width 576, 30 layers, vocabulary 49,152, tied head), random weights made in "
    "memory as bfloat16, LoRA rank 16, steps of 256 tokens in fp32; each in a process of its own. `base in memory` is "
    "the weights at rest: 4 bits for the linears of the blocks, fp32 for embeddings, norms and head."
)
NOTES = (
    "On a CPU unpacking costs time and buys memory. Seconds are of a machine that did other work besides: compare them "
    "within a table only. Small bases are no estimate of what 4 bits cost a large one."
)


def _recipe(where: Place) -> Path:
    reviews = where.asset("data/imdb") / "imdb_test.jsonl.gz"
    with gzip.open(reviews, "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"].replace("<br />", "\n") for _ in range(REVIEWS + HELD_OUT)]
    for name, part in (("train", texts[:REVIEWS]), ("eval", texts[REVIEWS:])):
        path = where.runs / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    recipe = {
        "stage": "pretrain",
        "base": BASE,
        "precision": "float32",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 256, "on_too_long": "split"},
        "tune": {"method": "lora", "rank": 16},
        "train": {"steps": STEPS, "batch_tokens": 2048, "learning_rate": 1e-3, "eval_every": STEPS},
        "evaluate": {"samples": 0},
    }
    path = where.runs / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def _tuned(where: Place, recipe: Path, name: str, base: str, kind: str) -> tuple[Any, ...]:
    folder = where.runs / f"{Path(name).name}-{kind}"
    result = train(folder, recipe, f"base={base}", f"tune.quantize={kind}")
    before, after = (result[when]["loss"]["value"] for when in ("before", "after"))
    plain = json.loads((where.runs / f"{Path(name).name}-none" / "result.json").read_text())["after"]["loss"]["value"]
    return (name, _bits(kind), f"{before:.4f}", f"{after:.4f}", f"{after - plain:+.4f}", _packed_bytes(base, kind),
            f"{step_seconds(folder):.2f}")  # fmt: skip


def _bits(kind: str) -> str:
    return {"none": "32", "8bit": "8", "4bit": "4"}[kind]


def _packed_bytes(base: str, kind: str) -> str:
    from tunesmith.model import lora
    from tunesmith.model.load import load_empty
    from tunesmith.model.quantize import quantized_layers
    from tunesmith.model.trainable import TrainableSpec, make_trainable

    model = load_empty(base, "causal")
    make_trainable(model, TrainableSpec("lora", quantize=kind))
    packed = sum(layer.num_bytes for _, layer in quantized_layers(model))
    plain = sum(4 * layer.out_features * layer.in_features for layer in lora.lora_layers(model).values())
    return f"{packed or plain:,}"


def _in_its_own_process(where: Place, kind: str) -> dict[str, Any]:
    kept = where.runs / f"shape-{kind}.json"
    if not kept.is_file():
        command = [sys.executable, str(ROOT / "evidence/quantize.py"), "--shape", kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        kept.write_text(done.stdout.splitlines()[-1])
    return rows_of(kept)[0]


def _row(kind: str, found: dict[str, Any]) -> tuple[Any, ...]:
    return (_bits(kind), f"{found['weights'] / 1e6:.0f} MB", f"{found['peak'] / 1e6:.0f} MB", f"{found['seconds']:.2f}",
            f"{found['packing']:.1f} s")  # fmt: skip


def _large(kind: str) -> dict[str, Any]:
    """Weights at rest, the peak above the process before the model, seconds a step."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.batch import Sample
    from tunesmith.data.batches import collate
    from tunesmith.model.language import LanguageModel
    from tunesmith.model.trainable import TrainableSpec, make_trainable
    from tunesmith.plan.hardware import peak_memory_bytes

    before = peak_memory_bytes()
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    backbone: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    started = time.perf_counter()
    if kind == "none":
        backbone.float()
    make_trainable(backbone, TrainableSpec("lora", rank=16, alpha=32.0, quantize=kind))
    packing = time.perf_counter() - started
    tensors = {t.data_ptr(): t for t in [*backbone.parameters(), *backbone.buffers()]}
    weights = sum(t.numel() * t.element_size() for t in tensors.values() if not t.requires_grad)
    model = LanguageModel(backbone).train()
    ids = torch.randint(0, 49152, (256,), generator=torch.Generator().manual_seed(0)).int().numpy()
    learned = np.ones(len(ids), np.float32)
    learned[0] = 0.0
    batch = collate([Sample(ids, learned)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        (-model(batch).logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = peak_memory_bytes() - before
    return {"weights": weights, "peak": peak, "seconds": min(seconds), "packing": packing}


if __name__ == "__main__":
    main()
