"""What the trials break: the bare loop around a toy, which is fast, and stages as a user runs them."""

from __future__ import annotations

import json
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tests.reliability.harness import Subject
from tests.tiny import save_tiny, tiny_causal, tiny_masked
from torch import nn

from tunesmith import api
from tunesmith.batch import Batch, Outputs
from tunesmith.engine import checkpoint, fit
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.objectives.classify import Classify

STAGES = ("pretrain", "mlm", "sft", "classify")
ONLINE = ("ppo", "grpo")
_TIMES = ("seconds", "train_seconds", "tokens_per_second", "peak_memory_bytes", "export_bytes")


class Scorer(nn.Module):
    """A classifier of two layers with dropout and batch norm: random numbers and changing buffers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, batch: Batch) -> Outputs:
        hidden = self.drop(self.norm(self.embed(batch.input_ids[0])))
        pooled = torch.zeros(batch.num_segments, 8).index_add(0, batch.segments[0], hidden)
        return Outputs(scores=self.head(pooled))


class Cursor:
    """A stream: what a step gets depends on where the cursor stands, so it has to be restored."""

    def __init__(self, num_steps: int, pause: float) -> None:
        self.num_steps, self.pause, self.position = num_steps, pause, 0
        self.steps_per_epoch = max(1, num_steps // 2)

    def step_batches(self, step: int) -> list[Batch]:
        time.sleep(self.pause)
        self.position += 1
        generator = torch.Generator().manual_seed(self.position)
        ids = torch.randint(0, 32, (1, 8), generator=generator)
        ones, half = torch.ones(1, 8), torch.arange(8)[None] // 4
        labels = torch.randint(0, 3, (2,), generator=generator)
        return [Batch(ids, ids, ones, torch.arange(8)[None] % 4, half, labels=labels, lengths=(4, 4))]

    def at_boundary(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: Any) -> None:
        self.position = state["position"]


def loop(num_steps: int = 24, save_every: int = 3, keep: int = 2, pause: float = 0.002) -> Subject:
    """The engine alone around `Scorer` and `Cursor`."""

    def train(folder: Path) -> None:
        generator = torch.random.get_rng_state()
        torch.manual_seed(7)
        model = Scorer()
        torch.random.set_rng_state(generator)
        optim = OptimSpec(0.05, weight_decay=0.01, schedule="cosine", warmup_steps=2)
        source = Cursor(num_steps, pause)
        state = TrainState(0, model, build_optimizer(model, optim), source, identity={"data": "tiny"})
        names = ("metrics", "evaluations", "timings")
        files = fit.Files(*(MetricsLog(folder / f"{name}.jsonl") for name in names), checkpoints=folder / "checkpoints")
        spec = FitSpec(3, optim, save_every=save_every, keep=keep)
        stage = Stage("tiny", model, Classify(), source)
        resumed = fit.resume(state, files, say=print)
        if not resumed:
            files.metrics.cut(0)
        fit.fit(stage, state, spec, files, say=print, show=lambda report: None, resumed=resumed)

    def fingerprint(folder: Path) -> str:
        newest = checkpoint.latest_checkpoint(folder / "checkpoints", warn=print, repair=False)
        assert newest is not None
        files = (newest / checkpoint.TENSORS, folder / "metrics.jsonl")
        return _digest([newest.name.encode(), *(path.read_bytes() for path in files)])

    return Subject(train, fingerprint, num_steps, save_every)


def staged(name: str, bases: Path, *, epochs: int = 4, save_every: int = 3) -> Subject:
    """A stage through `tunesmith.api`, from recipe to report, on a tiny base that is made in `bases` when missing.

    24 rows in steps of 4, two micro-batches a step, dropout on, evaluated and chosen at the end of every epoch. Stages
    with rollouts make them anew every 4 steps.
    """
    recipe = recipe_of(name, bases, epochs, save_every)

    def train(folder: Path) -> None:
        if (folder / "recipe.yaml").exists():
            api.resume(folder, say=print)
        else:
            api.train(recipe, run=str(folder), say=print)

    return Subject(train, stage_fingerprint, 6 * epochs, save_every, head=0.3, tail=1.0)


def stage_fingerprint(folder: Path) -> str:
    """Weights, optimizer and random states of the last checkpoint, metrics, evaluations, rollouts, final weights and
    result."""
    newest = checkpoint.latest_checkpoint(folder / "checkpoints", warn=print, repair=False)
    assert newest is not None
    finals = sorted((folder / "final").glob(f"step_*/{checkpoint.TENSORS}"))
    result = json.loads((folder / "result.json").read_text())
    kept = {key: value for key, value in result.items() if key not in _TIMES}
    logs = (folder / f"{name}.jsonl" for name in ("metrics", "evaluations", "rollouts"))
    files = (newest / checkpoint.TENSORS, *(path for path in logs if path.exists()), *finals)
    assert (folder / "report.html").is_file() and (folder / "model_card.md").is_file()
    return _digest([newest.name.encode(), json.dumps(kept).encode(), *(path.read_bytes() for path in files)])


def _digest(parts: list[bytes]) -> str:
    return sha256(b"|".join(sha256(part).digest() for part in parts)).hexdigest()


def recipe_of(name: str, bases: Path, epochs: int = 4, save_every: int = 3) -> dict[str, Any]:
    """A recipe of stage `name`; its tiny base and its rows are made in `bases` when missing."""
    decoder = name in ("pretrain", "sft", *ONLINE)
    base = bases / ("decoder" if decoder else "encoder")
    if not base.exists():
        save_tiny(tiny_causal("llama") if decoder else tiny_masked("bert"), base)
    train, held_out = bases / f"{name}.jsonl", bases / f"{name}-eval.jsonl"
    for path, first, count in ((train, 0, 24), (held_out, 100, 6)):
        if not path.exists():
            path.write_text("".join(json.dumps(_row(name, first + i)) + "\n" for i in range(count)))
    tune = {"method": "lora", "rank": 2, "dropout": 0.1} if name in ("sft", "classify") else {"method": "full"}
    if name in ONLINE:
        return _online(name, base, train, held_out, epochs * 6, save_every)
    return {
        "stage": name, "base": str(base), "precision": "float32", "tune": tune,
        "data": {"train": str(train), "eval": str(held_out), "max_length": 64},
        "train": {"epochs": epochs, "batch_examples": 4, "micro_batch_tokens": 96, "learning_rate": 5e-3,
                  "save_every": save_every, "weight_decay": 0.01},
        "evaluate": {"samples": 1},
    }  # fmt: skip


def _online(name: str, base: Path, train: Path, held_out: Path, steps: int, save_every: int) -> dict[str, Any]:
    """Two passes over two minibatches of each round's rollouts: a kill can come before, between and after them."""
    rounds = {"ppo": {"rollouts": 8, "kl_coef": 0.02}, "grpo": {"prompts": 2, "group": 4}}[name]
    return {
        "stage": name, "base": str(base), "precision": "float32", "device": "cpu", "tune": {"method": "full"},
        "data": {"train": str(train), "eval": str(held_out)}, "reward": {"regex": "[a-e]"},
        "sampling": {"max_tokens": 5}, name: {**rounds, "epochs": 2, "minibatches": 2},
        "train": {"steps": steps, "learning_rate": 1e-2, "save_every": save_every, "eval_every": 6},
    }  # fmt: skip


_THINGS = ("cat", "tree", "house", "river", "song", "film", "book", "road", "boat", "lamp", "cup", "hat", "door", "sea")


def _row(name: str, i: int) -> dict[str, Any]:
    thing, other = _THINGS[i % 14], _THINGS[(i * 5 + 3) % 14]
    text = f"{i}: the {thing} was {'good' if i % 2 else 'bad'} and the {other} {i * 7 % 31} was not"
    if name == "classify":
        return {"text": text, "label": "good" if i % 2 else "bad"}
    if name in ONLINE:
        return {"prompt": f"the {thing} {i}"}
    if name == "sft":
        return {"prompt": f"what was {i} {thing}?", "completion": f"the {thing} was {other}"}
    return {"text": text}
