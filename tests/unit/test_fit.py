"""The loop's decisions: when it evaluates, stops early, which weights it ends with, what a signal does."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.laws.test_resume_law import OPTIM, Rows
from tests.tiny import tiny_causal

from tunesmith.data.source import OfflineSource
from tunesmith.engine import fit
from tunesmith.engine.checkpoint import load_checkpoint, saved_steps
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.errors import DataError, Interrupted
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood
from tunesmith.stages.job import warmup_note


class Unweighted(Rows):
    """Rows in which nothing is trained on."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return replace(sample, weights=np.zeros(len(sample), np.float32), origin=f"row:{index + 1}")


def run(folder, script, *, show=lambda report: None, steps=20, again=False, **settings):
    """A run whose evaluation gives the numbers of `script`, one every second step -> (steps done, state, said)."""
    model = LanguageModel(tiny_causal("llama", layers=1))
    source = OfflineSource(Rows(), seed=5, num_steps=steps, batch_examples=4)
    state = TrainState(0, model, build_optimizer(model, OPTIM), source, identity={})
    logs = [MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "timings")]
    files, said = fit.Files(*logs, checkpoints=folder / "checkpoints"), []
    values = iter(script)
    stage = Stage("tiny", model, Likelihood(), source, lambda step: {"accuracy": next(values), "loss": 1.0})
    spec = FitSpec(3, OPTIM, eval_every=2, save_every=100, keep=1, **settings)
    resumed = again and fit.resume(state, files, say=said.append)
    fit.fit(stage, state, spec, files, say=said.append, show=show, resumed=resumed)
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


def test_of_equals_the_earliest_is_the_best(tmp_path):
    """Accuracies tie often; what was trained less to reach one has moved less."""
    _, state, _ = run(tmp_path, [0.5, 0.75, 0.75, 0.6, 0.75], select_by="accuracy", steps=10)
    assert state.progress.best_step == 4


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


def test_a_signal_in_the_last_evaluation_ends_the_run_and_going_on_finishes_it(tmp_path):
    def script(number):
        yield 0.5
        os.kill(os.getpid(), number)
        yield 0.4

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted) as stopped:
            run(tmp_path, script(signal.SIGINT), steps=4, select_by="accuracy")
    finally:
        signal.signal(signal.SIGINT, former)
    assert stopped.value.exit_code == 130 and max(saved_steps(tmp_path / "checkpoints")) == 4
    done, state, said = run(tmp_path, [], steps=4, again=True, select_by="accuracy")
    assert (done, state.step, state.progress.best_step) == (4, 4, 2) and "best by accuracy: step 2" in said[-1]


def test_a_step_without_anything_to_learn_is_refused_with_its_rows_before_the_weights_are_touched():
    model = LanguageModel(tiny_causal("llama", layers=1))
    source = OfflineSource(Unweighted(), seed=5, num_steps=1, batch_examples=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stage = Stage("tiny", model, Likelihood(), source, None)
    with pytest.raises(DataError, match=r"step 1: nothing in its rows is trained on \(row:\d+, row:\d+\)"):
        fit.train_step(stage, build_optimizer(model, OPTIM), FitSpec(3, OPTIM, eval_every=2, save_every=9, keep=1), 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_warm_up_as_long_as_the_run_is_pointed_out():
    def note(warmup):
        optim = OptimSpec(learning_rate=1e-3, warmup_steps=warmup)
        return warmup_note(FitSpec(3, optim, eval_every=2, save_every=9, keep=1), 9)

    assert "9 steps of 9: the rate rises to 0.0009 and never reaches train.learning_rate, 0.001" in note(9)
    assert note(8) == ""


def test_every_step_has_one_line_from_step_1_on(tmp_path):
    run(tmp_path, [0.5] * 10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "targets"} <= set(lines[0])
