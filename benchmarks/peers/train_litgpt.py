"""sft by LitGPT: `python train_litgpt.py SPEC.json` prints one JSON line.

Its own `finetune_lora` or `finetune_full` on the spec's model, which is converted beside itself at the first call.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import torch
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.finetune import full, lora
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file
from timing import Times, answer, read_spec

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def converted(model: Path) -> Path:
    """The model as LitGPT stores it."""
    folder = model.with_name(f"{model.name}-litgpt")
    if not (folder / "lit_model.pth").exists():
        folder.mkdir(exist_ok=True)
        given = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config = Config(
            name=model.name, block_size=given["max_position_embeddings"], vocab_size=given["vocab_size"],
            padded_vocab_size=given["vocab_size"], n_layer=given["num_hidden_layers"],
            n_head=given["num_attention_heads"], n_embd=given["hidden_size"],
            n_query_groups=given["num_key_value_heads"], rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=given["intermediate_size"],
            norm_eps=given["rms_norm_eps"],
        )  # fmt: skip
        save_config(config, folder)
        weights: dict[str, torch.Tensor] = {}
        copy_weights_hf_llama(config, {}, weights, load_file(model / "model.safetensors"))
        torch.save(weights, folder / "lit_model.pth")
    for name in COPIED:
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


def rows(spec: dict, folder: Path) -> Path:
    """The rows by the names that LitGPT wants; the first two are its sanity check too."""
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    found = [{"instruction": row["prompt"], "output": row["completion"]} for row in map(json.loads, lines)]
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / "val.json").write_text(json.dumps(found[:2]), encoding="utf-8")
    return folder


def train(spec: dict, output: Path) -> None:
    from litgpt.prompts import Default

    precision = {"float32": "32-true", "bfloat16": spec["settings"].pop("precision", None)}[spec["precision"]]
    shared = {
        "checkpoint_dir": converted(Path(spec["model"])), "out_dir": output, "precision": precision,
        "data": JSON(json_path=rows(spec, output / "data"), mask_prompt=True, prompt_style=Default(), num_workers=0),
        "train": TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=spec["batch"], lr_warmup_steps=1, epochs=1000,
            max_steps=spec["steps"], max_seq_length=2048, micro_batch_size=spec["settings"].get("micro_batch_size", 1),
        ),
        "eval": EvalArgs(interval=1000, max_new_tokens=1, max_iters=1, final_validation=False),
        "optimizer": {
            "class_path": "torch.optim.AdamW", "init_args": {"lr": spec["learning_rate"], "weight_decay": 0.0},
        },
        "log": LogArgs(), "seed": 0,
    }  # fmt: skip
    if spec["method"] == "full":
        full.setup(**shared)
        return
    lora.merge_lora = lambda **_: None  # after training it reads its own command line, which this is not
    every = dict.fromkeys(("query", "key", "value", "projection", "mlp"), True)
    lora.setup(**shared, lora_r=16, lora_alpha=32, lora_dropout=0.0, **{f"lora_{k}": v for k, v in every.items()})


def times(output: Path) -> tuple[Times, list[int]]:
    """Seconds, last loss and tokens of every optimizer step, from LitGPT's own log."""
    seconds, tokens, losses = defaultdict(float), defaultdict(int), {}
    before, step = 0, 1
    for path in output.rglob("metrics.csv"):
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            if not row.get("iter_time"):
                continue
            seconds[step] += float(row["iter_time"])
            tokens[step] += int(float(row["tokens"])) - before
            losses[step], before = float(row["loss"]), int(float(row["tokens"]))
            step = int(float(row["step"])) + 1
    found = Times()
    found.seconds, found.losses = list(seconds.values()), list(losses.values())
    return found, list(tokens.values())


def main() -> None:
    spec = read_spec()
    output = Path(spec["output"])
    train(spec, output)
    answer(*times(output))


if __name__ == "__main__":
    main()
