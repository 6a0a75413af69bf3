"""sft by LLaMA-Factory: `python train_llamafactory.py SPEC.json` prints one JSON line."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# It imports torchaudio for its audio models, whose published wheel wants the CUDA build of torch; text needs none.
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp  # noqa: E402
from timing import answer, read_spec  # noqa: E402
from train import Clock, common, step_tokens  # noqa: E402
from transformers import Trainer  # noqa: E402


def arguments(spec: dict) -> dict:
    """The run as its YAML would say it; the template `fewshot` adds white space (no token here) and the end token."""
    folder = Path(spec["output"]) / "data"
    folder.mkdir(parents=True)
    columns = {"prompt": "prompt", "response": "completion"}
    info = {"bench": {"file_name": str(spec["data"]), "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    lora = {"finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all"}
    return {
        "stage": "sft", "do_train": True, "model_name_or_path": spec["model"], "template": "fewshot",
        "dataset": "bench", "dataset_dir": str(folder), "cutoff_len": 2048, "overwrite_cache": True,
        **(lora if spec["method"] == "lora" else {"finetuning_type": "full"}),
        **common(spec),
    }  # fmt: skip


def main() -> None:
    spec, clock = read_spec(), Clock()
    counts: list[int] = []
    prepare = Trainer._prepare_inputs

    def counting(self, inputs):
        counts.append(int(inputs["attention_mask"].sum()))
        return prepare(self, inputs)

    Trainer._prepare_inputs = counting
    run_exp(arguments(spec), callbacks=[clock])
    answer(clock, step_tokens(counts, len(clock.seconds)))


if __name__ == "__main__":
    main()
