"""NaN and infinity in any place at any moment end the run before the optimizer step; nothing spoiled is ever saved."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reliability.subjects import recipe_of

from tunesmith.batch import Loss
from tunesmith.engine import fit
from tunesmith.engine.checkpoint import TENSORS, latest_checkpoint, load_checkpoint
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.errors import NonFiniteError
from tunesmith.recipe import load_recipe
from tunesmith.stages import sft
from tunesmith.stages.job import fit_spec
from tunesmith.stages.prepare import prepare

PLACES = ("loss", "gradient", "weight", "activation", "optimizer state")
VALUES = (math.nan, math.inf, -math.inf)
MOMENTS = {"first step": (1, 1), "mid-accumulation": (8, 2), "last step": (12, 1)}
"""Name -> (step, micro-batch) at which the value is planted."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """An sft job of 12 steps with two micro-batches a step, and the weights it begins with."""
    folder = tmp_path_factory.mktemp("nonfinite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        resolved = load_recipe(recipe_of("sft", folder, epochs=2))
        made, _ = prepare(resolved.recipe, resolved.folder, say=lambda text: None)
    return made, {name: value.clone() for name, value in made.backbone.state_dict().items()}


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory):
    """The last checkpoint's bytes of the run that nothing is planted in."""
    return run(job, tmp_path_factory.mktemp("unbroken"))


def run(job: Any, folder: Path) -> bytes:
    """Train from the start or the newest checkpoint in `folder`; the bytes of the last one."""
    made, initial = job
    made.backbone.load_state_dict(initial)
    stage = dataclasses.replace(sft.build(made).stage, evaluate=None)
    spec = dataclasses.replace(fit_spec(made.recipe, stage.source.num_steps, "cpu"), select_by=None)
    state = TrainState(0, stage.model, build_optimizer(stage.model, spec.optim), stage.source)
    logs = [MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "timings")]
    files = fit.Files(*logs, checkpoints=folder / "checkpoints")
    try:
        resumed = fit.resume(state, files, say=lambda text: None)
        fit.fit(stage, state, spec, files, say=lambda text: None, show=lambda report: None, resumed=resumed)
    finally:
        for log in logs:
            log.close()
    return (newest(folder) / TENSORS).read_bytes()


def newest(folder: Path) -> Path:
    found = latest_checkpoint(folder / "checkpoints", warn=pytest.fail, repair=False)
    assert found is not None
    return found


class Spoiled:
    """An objective whose loss is `value` in one micro-batch."""

    def __init__(self, real: Any, value: float, due: Callable[[], bool]) -> None:
        self.count, self._real, self._value, self._due = real.count, real, value, due

    def loss(self, outputs: Any, batch: Any) -> Loss:
        loss = self._real.loss(outputs, batch)
        return dataclasses.replace(loss, sum=loss.sum * self._value) if self._due() else loss


def spoil(tensor: torch.Tensor, value: float) -> torch.Tensor:
    with torch.no_grad():
        tensor.view(-1)[0] = value
    return tensor


def planted(place: str, value: float, step: int, micro: int) -> Callable[..., Any]:
    """`fit.train_step` with `value` put into `place` at `step`, in its micro-batch number `micro`."""
    real = fit.train_step

    def train_step(stage: Any, optimizer: Any, spec: Any, at: int) -> Any:
        if at != step:
            return real(stage, optimizer, spec, at)
        assert len(stage.source.step_batches(at)) >= micro
        forwards: list[int] = []
        handles: list[Any] = []
        due = lambda: len(forwards) == micro  # noqa: E731
        trained = optimizer.param_groups[0]["params"][0]

        def before(*_: Any) -> None:
            forwards.append(1)
            if due() and place == "weight":
                spoil(trained.data, value)
            if due() and place == "optimizer state":
                spoil(optimizer.state[trained]["exp_avg"], value)
            if due() and place == "gradient":
                handles.append(trained.register_hook(lambda gradient: spoil(gradient.clone(), value)))

        def after(module: Any, inputs: Any, output: Any) -> Any:
            return spoil(output.clone(), value) if due() and place == "activation" else output

        handles.append(stage.model.register_forward_pre_hook(before))
        handles.append(stage.model.backbone.model.layers[0].mlp.register_forward_hook(after))
        if place == "loss":
            stage = dataclasses.replace(stage, objective=Spoiled(stage.objective, value, due))
        try:
            return real(stage, optimizer, spec, at)
        finally:
            for handle in handles:
                handle.remove()

    return train_step


CASES = [
    pytest.param(place, value, moment, marks=pytest.mark.evidence if value == -math.inf else ())
    for place, value, moment in product(PLACES, VALUES, MOMENTS)
    if (place, moment) != ("optimizer state", "first step")  # there is none yet
]


@pytest.mark.parametrize(("place", "value", "moment"), CASES)
def test_what_is_not_finite_stops_the_run_before_the_step(place, value, moment, job, unbroken, tmp_path, monkeypatch):
    step, micro = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "train_step", planted(place, value, step, micro))
        with pytest.raises(NonFiniteError, match=rf"^step {step}: .* NaN or infinite, found before") as caught:
            run(job, tmp_path)
    assert caught.value.exit_code not in (0, 2)
    assert re.search(r"sft\.jsonl:\d+", str(caught.value)), "the rows of the step are named"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == step - 1, "the spoiled step has no line"
    tensors, meta = load_checkpoint(newest(tmp_path))
    assert meta["step"] < step and all(bool(t.isfinite().all()) for t in tensors.values())
    assert run(job, tmp_path) == unbroken, "without the fault it goes on as if nothing had been"


def test_the_matrix_sees_a_loop_that_does_not_look(job, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "train_step", planted("gradient", math.nan, 8, 1))
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
    run(job, tmp_path)
    tensors, _ = load_checkpoint(newest(tmp_path))
    assert any(bool(t.isnan().any()) for t in tensors.values() if t.is_floating_point())
