"""A tiny base, a data file for each stage and a chain over them, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny, tiny_causal

WORDS = ("cat", "mat", "sat", "good", "two", "plus", "four", "user", "text", "system", "answer", "was")


def words(number: int, count: int) -> str:
    """`count` words that depend on `number` alone."""
    return " ".join(WORDS[(number * 7 + i * i + number // 12) % len(WORDS)] for i in range(count)) + f" {number}"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_files(folder: Path) -> Path:
    """`tiny`, and for each of texts, pairs, labels, preferences and prompts a file to train and one to hold out."""
    save_tiny(tiny_causal("llama"), folder / "tiny")
    for ending, numbers in (("", range(24)), ("-eval", range(100, 108))):
        rows: dict[str, list[dict[str, Any]]] = {
            "texts": [{"text": words(i, 9)} for i in numbers],
            "pairs": [{"prompt": words(i, 5), "completion": words(i + 1, 3)} for i in numbers],
            "labels": [{"text": f"{words(i, 5)} {'good' if i % 2 else 'mat'}", "label": "ny"[i % 2]} for i in numbers],
            "preferences": [
                {"prompt": words(i, 5), "chosen": f"good {words(i, 2)}", "rejected": f"mat {words(i, 2)}"}
                for i in numbers
            ],
            "prompts": [{"prompt": words(i, 5)} for i in numbers],
        }
        for name, lines in rows.items():
            write_rows(folder / f"{name}{ending}.jsonl", lines)
    return folder


def stage(kind: str, file: str, **more: Any) -> dict[str, Any]:
    """An entry of `stages`."""
    return {"stage": kind, "data": {"train": f"{file}.jsonl", "eval": f"{file}-eval.jsonl"}, **more}


def chain(*stages: dict[str, Any], **shared: Any) -> dict[str, Any]:
    """A chain of a few steps a stage; pretrain in full, sft and classify by LoRA unless other stages are given."""
    usual = (
        stage("pretrain", "texts", tune={"method": "full"}),
        stage("sft", "pairs"),
        stage("classify", "labels"),
    )
    return {
        "base": "tiny",
        "run": "chain",
        "precision": "float32",
        "tune": {"method": "lora", "rank": 2},
        "train": {"steps": 3, "batch_examples": 8, "learning_rate": 5e-3},
        "evaluate": {"samples": 1},
        **shared,
        "stages": [json.loads(json.dumps(entry)) for entry in stages or usual],
    }
