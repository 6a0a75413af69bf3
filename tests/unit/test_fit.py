"""The loop's decisions: when it evaluates, stops early, which weights it ends with, what a signal does."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from tests.laws.test_resume_law import OPTIM, Rows
from tests.tiny import tiny_causal

from tunesmith.data.source import OfflineSource
from tunesmith.engine import fit
from tunesmith.engine.checkpoint import load_checkpoint, saved_steps
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.errors import Interrupted
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood


def run(folder, script, *, show=lambda report: None, steps=20, **settings):
    """A run whose evaluation gives the numbers of `script`, one every second step -> (steps done, state, said)."""
    model = LanguageModel(tiny_causal("llama", layers=1))
    source = OfflineSource(Rows(), seed=5, num_steps=steps, batch_examples=4)
    state = TrainState(0, model, build_optimizer(model, OPTIM), source, identity={})
    logs = [MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "timings")]
    files, said = fit.Files(*logs, checkpoints=folder / "checkpoints"), []
    values = iter(script)
    stage = Stage("tiny", model, Likelihood(), source, lambda step: {"accuracy": next(values), "loss": 1.0})
    spec = FitSpec(3, OPTIM, eval_every=2, save_every=100, keep=1, **settings)
    fit.fit(stage, state, spec, files, say=said.append, show=show)
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    return done, state, said


def test_it_stops_when_a_scripted_metric_has_not_improved_for_two_evaluations(tmp_path):
    done, state, said = run(tmp_path, [0.5, 0.7, 0.6, 0.65, 0.9], select_by="accuracy", patience=2)
    assert done == 8 and state.progress.best_step == 4
    assert any("early stopping" in line for line in said)


def test_an_improvement_starts_the_patience_anew(tmp_path):
    done, state, _ = run(tmp_path, [0.5, 0.4, 0.6, 0.5, 0.7, 0.1, 0.1, 0.9], select_by="accuracy", patience=2)
    assert done == 14 and state.progress.best_step == 10


def test_it_ends_with_the_best_weights_and_never_prunes_them(tmp_path):
    _, state, said = run(tmp_path, [0.5, 0.9, *[0.1] * 8], select_by="accuracy")
    assert 4 in saved_steps(tmp_path / "checkpoints")
    best, _ = load_checkpoint(tmp_path / "checkpoints/step_000004")
    last, _ = load_checkpoint(tmp_path / "checkpoints/step_000020")
    name = "backbone.model.norm.weight"
    weight = dict(state.model.named_parameters())[name]
    assert torch.equal(weight, best[f"model.{name}"]) and not torch.equal(weight, last[f"model.{name}"])
    assert any("best by accuracy: step 4 (0.9000)" in line for line in said)


def test_without_a_choice_it_ends_with_the_last_weights(tmp_path):
    _, state, _ = run(tmp_path, [0.5, 0.9, *[0.1] * 8])
    last, _ = load_checkpoint(tmp_path / "checkpoints/step_000020")
    name = "backbone.model.norm.weight"
    assert torch.equal(dict(state.model.named_parameters())[name], last[f"model.{name}"])


def test_nan_is_never_the_best_and_is_logged_as_text(tmp_path):
    _, state, _ = run(tmp_path, [math.nan, 0.2, math.nan, *[0.1] * 7], select_by="accuracy")
    assert state.progress.best_step == 4
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines[0]["metrics"] == {"accuracy": "NaN", "loss": 1.0}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, code, tmp_path):
    def show(report):
        if report.step == 3:
            os.kill(os.getpid(), number)

    former = signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(Interrupted) as stopped:
            run(tmp_path, [0.5] * 10, show=show)
    finally:
        signal.signal(number, former)
    assert stopped.value.exit_code == code and "--resume" in str(stopped.value)
    assert max(saved_steps(tmp_path / "checkpoints")) == 3


def test_every_step_has_one_line_from_step_1_on(tmp_path):
    run(tmp_path, [0.5] * 10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "targets"} <= set(lines[0])
