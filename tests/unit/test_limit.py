"""A limit on a metric: what the loop keeps, where it goes back to, when it ends; resumed, it decides alike."""

from __future__ import annotations

import json

import pytest
import torch
from tests.laws.test_resume_law import OPTIM, Died, Rows
from tests.tiny import tiny_causal

from tunesmith.data.source import OfflineSource
from tunesmith.engine import fit
from tunesmith.engine.checkpoint import load_checkpoint, saved_steps
from tunesmith.engine.contracts import FitSpec, Progress, Stage
from tunesmith.engine.limit import Limit, slowed
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood

NORM = "backbone.model.norm.weight"


def limit(on_exceed: str, **settings) -> Limit:
    return Limit("forgetting", 0.02, on_exceed, **settings)


def run(folder, forgotten, *, accuracy=None, die_after=0, **settings):
    """Twelve steps, an evaluation every second one: `forgotten` and `accuracy` are what they give -> (state, said)."""
    torch.manual_seed(die_after)
    model = LanguageModel(tiny_causal("llama", layers=1))
    source = OfflineSource(Rows(), seed=5, num_steps=12, batch_examples=4)
    state = TrainState(0, model, build_optimizer(model, OPTIM), source, identity={})
    logs = [MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "timings")]
    files, said = fit.Files(*logs, checkpoints=folder / "checkpoints"), []

    def evaluate(step):
        at = step // 2 - 1
        return {"forgetting": forgotten[at], "accuracy": (accuracy or [0.5] * 6)[at]}

    def show(report):
        if report.step == die_after:
            raise Died

    spec = FitSpec(3, OPTIM, eval_every=2, save_every=1, keep=1, **settings)
    resumed = fit.resume(state, files, say=said.append)
    fit.fit(Stage("tiny", model, Likelihood(), source, evaluate), state, spec, files, say=said.append, show=show,
            resumed=resumed)  # fmt: skip
    return state, said


def weights_at(folder, step):
    return load_checkpoint(folder / f"checkpoints/step_{step:06d}")[0][f"model.{NORM}"]


def weights_of(state):
    return dict(state.model.named_parameters())[NORM].detach()


def rates(folder):
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_best_is_chosen_among_those_within_the_limit(tmp_path):
    forgotten, accuracy = [0.01, 0.015, 0.03, 0.05, 0.06, 0.07], [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    state, _ = run(tmp_path, forgotten, accuracy=accuracy, select_by="accuracy", limit=limit("go_on"))
    assert state.progress.best_step == 4, "step 12 is better and over the limit"
    assert torch.equal(weights_of(state), weights_at(tmp_path, 4))
    control, _ = run(tmp_path / "control", forgotten, accuracy=accuracy, select_by="accuracy")
    assert control.progress.best_step == 12


def test_without_a_metric_to_choose_by_the_last_within_the_limit_is_kept(tmp_path):
    state, said = run(tmp_path, [0.01, 0.02, 0.03, 0.01, 0.03, 0.03], limit=limit("go_on"))
    assert state.progress.best_step == 8 and "last step that keeps within" in said[-1]
    assert torch.equal(weights_of(state), weights_at(tmp_path, 8))


def test_the_run_stops_as_soon_as_the_limit_is_passed(tmp_path):
    state, said = run(tmp_path, [0.01, 0.03, 0.0, 0.0, 0.0, 0.0], limit=limit("stop"))
    assert (state.step, state.progress.best_step) == (4, 2)
    assert any("training ends" in line for line in said)
    assert torch.equal(weights_of(state), weights_at(tmp_path, 2))
    again, _ = run(tmp_path, [0.01, 0.03, 0.0, 0.0, 0.0, 0.0], limit=limit("stop"))
    assert again.step == 4, "resumed after its end, it does not train on"


def test_nothing_within_the_limit_keeps_the_start_and_says_so_loudly(tmp_path):
    torch.manual_seed(0)
    start = LanguageModel(tiny_causal("llama", layers=1))
    state, said = run(tmp_path, [0.03] * 6, select_by="accuracy", limit=limit("go_on"))
    assert torch.equal(weights_of(state), dict(start.named_parameters())[NORM])
    assert state.progress.best_step == 0 and said[-1].startswith("NO CHECKPOINT KEEPS forgetting within 0.02")
    assert 0 in saved_steps(tmp_path / "checkpoints"), "the start is never pruned while nothing else is within"


def test_going_back_takes_weights_and_optimizer_of_the_last_step_within_and_lowers_the_rate(tmp_path):
    state, said = run(tmp_path, [0.01, 0.03, 0.01, 0.01, 0.01, 0.01], limit=limit("go_back", lower_rate=0.5))
    assert any("back to the weights of step 2, going on at 0.5" in line for line in said)
    plain, _ = run(tmp_path / "plain", [0.01] * 6, limit=limit("go_back"))
    lowered, full = rates(tmp_path), rates(tmp_path / "plain")
    assert lowered[:4] == full[:4] and lowered[4:] == [rate / 2 for rate in full[4:]]
    assert not torch.equal(weights_of(state), weights_of(plain))
    assert state.progress.extra["went_back"] == 1 and state.step == 12


def test_the_checkpoint_after_going_back_holds_the_weights_gone_back_to(tmp_path):
    with pytest.raises(Died):
        run(tmp_path, [0.01, 0.03, 0.01, 0.01, 0.01, 0.01], die_after=5, limit=limit("go_back"))
    assert torch.equal(weights_at(tmp_path, 4), weights_at(tmp_path, 2))
    optimizer = [load_checkpoint(tmp_path / f"checkpoints/step_{n:06d}")[0] for n in (2, 4)]
    moments = [name for name in optimizer[0] if name.startswith("optimizer.")]
    assert moments and all(torch.equal(optimizer[0][name], optimizer[1][name]) for name in moments)


@pytest.mark.parametrize("on_exceed", ["go_back", "go_on", "stop"])
@pytest.mark.parametrize("step", [1, 4, 5, 7, 10])
def test_a_resumed_run_decides_like_an_undisturbed_one(on_exceed, step, tmp_path):
    forgotten = [0.017, 0.03, 0.018, 0.05, 0.019, 0.01]
    settings = {"select_by": "accuracy", "limit": limit(on_exceed, lower_rate=0.5)}
    whole, _ = run(tmp_path / "whole", forgotten, accuracy=[0.1, 0.9, 0.3, 0.2, 0.5, 0.4], **settings)
    if whole.step >= step:
        with pytest.raises(Died):
            run(tmp_path / "cut", forgotten, accuracy=[0.1, 0.9, 0.3, 0.2, 0.5, 0.4], die_after=step, **settings)
    resumed, _ = run(tmp_path / "cut", forgotten, accuracy=[0.1, 0.9, 0.3, 0.2, 0.5, 0.4], **settings)
    for name in ("metrics", "evaluations"):
        assert (tmp_path / f"whole/{name}.jsonl").read_bytes() == (tmp_path / f"cut/{name}.jsonl").read_bytes()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert whole.progress.extra == resumed.progress.extra


@pytest.mark.parametrize(
    ("values", "rate"),
    [([0.0, 0.01], 1.0), ([0.017], 0.5), ([0.017, 0.0165], 0.5), ([0.017, 0.018], 0.25), ([float("nan")], 0.5)],
)
def test_the_rate_falls_when_forgetting_rises_near_the_limit(values, rate):
    progress, bound = Progress(), limit("go_on", lower_rate=0.5)
    for step, value in enumerate(values, 1):
        bound.judge(value, step, progress)
    spec = FitSpec(3, OPTIM, limit=bound)
    assert slowed(spec, progress).optim.learning_rate == OPTIM.learning_rate * rate
