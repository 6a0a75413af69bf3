"""Law: k steps and then n - k after a restart equal n steps, bit for bit. Control: random states are not restored."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_causal

from tunesmith.batch import Sample
from tunesmith.data.source import OfflineSource
from tunesmith.engine import fit
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.model.language import LanguageModel
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.objectives.likelihood import Likelihood

OPTIM = OptimSpec(1e-2, weight_decay=0.01, schedule="cosine", warmup_steps=2)


class Died(Exception):
    pass


class Rows:
    """Twenty samples by index."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.samples = []
        for number, length in enumerate(draw.integers(3, 20, 20)):
            weights = np.ones(length, np.float32)
            weights[0] = 0
            ids = draw.integers(7, 300, length).astype(np.int32)
            self.samples.append(Sample(ids, weights, origin=f"rows.jsonl:{number}"))
        self.lengths = np.asarray([len(sample) for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def train(folder: Path, *, die_after: int = 0) -> str:
    """One process's life: from the newest checkpoint in `folder` to step 8, or to its death."""
    torch.manual_seed(int(die_after))  # a new process has another random state
    backbone = tiny_causal("llama", seed=1, layers=1)
    make_trainable(backbone, TrainableSpec("lora", rank=4, dropout=0.3, targets="all-linear"))
    model = LanguageModel(backbone)
    source = OfflineSource(Rows(), seed=5, num_steps=8, batch_examples=4, micro_batch_tokens=40)
    state = TrainState(0, model, build_optimizer(model, OPTIM), source, identity={"data": "rows"})
    logs = [MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "timings")]
    files = fit.Files(*logs, checkpoints=folder / "checkpoints")

    def show(report: fit.StepReport) -> None:
        if report.step == die_after:
            raise Died

    spec = FitSpec(3, OPTIM, save_every=3, keep=2)
    resumed = fit.resume(state, files, say=lambda text: None)
    stage = Stage("tiny", model, Likelihood(), source)
    fit.fit(stage, state, spec, files, say=lambda text: None, show=show, resumed=resumed)
    return (folder / "metrics.jsonl").read_text() + str([p.sum().item() for p in model.parameters() if p.requires_grad])


def cut(folder: Path, *steps: int) -> str:
    for step in steps:
        with pytest.raises(Died):
            train(folder, die_after=step)
    return train(folder)


@pytest.mark.parametrize("steps", [(1,), (5,), (3, 7)], ids=str)
def test_resumed_equals_undisturbed(steps, tmp_path):
    assert cut(tmp_path / "cut", *steps) == train(tmp_path / "whole")


def test_control_a_random_state_that_is_not_restored_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "step_randomness", lambda seed, step, device: contextlib.nullcontext())
    monkeypatch.setattr(TrainState, "_restore_random", lambda self, tensors: None)
    assert cut(tmp_path / "cut", 5) != train(tmp_path / "whole")


def test_control_an_optimizer_that_is_not_restored_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainState, "_restore_optimizer", lambda self, tensors, meta: None)
    assert cut(tmp_path / "cut", 5) != train(tmp_path / "whole")
