"""Recipes and runs of the stages with rollouts, small enough for a second or two: `from tests.unit.rl import train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny import save_tiny, tiny_causal

from tunesmith import api

PROMPTS = ("the cat sat", "a mat", "two plus two", "good", "text", "0 1 2 3")
HELD_OUT = ("user", "system", "a cat", "was a mat", "plus")


class Killed(BaseException):
    """Stands for kill -9: nothing of the run's own code sees it coming."""


def recipe(tmp_path: Path, stage: str, **sections: Any) -> dict[str, Any]:
    """A full run of `stage` on a tiny random Llama, rewarded for completions that hold one of five letters."""
    base = tmp_path / "base"
    if not base.exists():
        save_tiny(tiny_causal("llama"), base)
        for name, prompts in (("train", PROMPTS), ("eval", HELD_OUT)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    found: dict[str, Any] = {
        "stage": stage,
        "base": str(base),
        "device": "cpu",
        "precision": "float32",
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "reward": {"regex": "[a-e]"},
        "sampling": {"max_tokens": 5},
        "tune": {"method": "full"},
        "train": {"steps": 6, "learning_rate": 1e-2, "schedule": "constant", "eval_every": 100},
        stage: SMALL[stage],
    }
    for name, values in sections.items():
        found[name] = {**found.get(name, {}), **values} if isinstance(values, dict) else values
    return found


SMALL: dict[str, dict[str, Any]] = {
    "grpo": {"prompts": 2, "group": 4, "epochs": 2, "minibatches": 2},
    "ppo": {"rollouts": 8, "epochs": 2, "minibatches": 2, "critic_learning_rate": 1e-2, "kl_coef": 0.02},
}


def train(tmp_path: Path, settings: dict[str, Any], name: str = "run", *, die_at: int | None = None) -> Path:
    """The run's folder; with `die_at` the process dies in that step, after its update and before it is saved."""
    run = tmp_path / name

    def show(report: Any) -> None:
        if report.step == die_at:
            raise Killed

    if die_at is None:
        api.train(settings, run=str(run))
    else:
        with pytest.raises(Killed):
            api.train(settings, run=str(run), show=show)
    return run


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor of the final weights and of the newest checkpoint, optimizer included, as bytes."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    final = sorted((run / "final").glob("step_*"))[-1]
    tensors = {f"{f.name}/{k}": t for f in (newest, final) for k, t in load_file(f / "tensors.safetensors").items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())
