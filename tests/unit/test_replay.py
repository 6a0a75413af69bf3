"""Replayed rows: their share of the loss is exact, which ones depends on (seed, step, ratio), the ratio is bounded."""

from __future__ import annotations

import pytest
import torch
from tests.laws.test_resume_law import Rows
from tests.tiny import tiny_causal

from tunesmith.data.batches import collate
from tunesmith.data.replay import ReplaySource, Share
from tunesmith.data.source import OfflineSource
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.fit import train_step
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood
from tunesmith.objectives.replay import WithReplay

SPEC = FitSpec(1, OptimSpec(1e-2, optimizer="sgd", clip_norm=None))


def source(least=0.1, most=0.5, micro=64):
    task = OfflineSource(Rows(), seed=5, num_steps=8, batch_examples=6, micro_batch_tokens=micro)
    return ReplaySource(task, Rows(), share=Share(least, most, seed=5), micro_batch_tokens=micro,
                        count=Likelihood().count, make_batch=lambda samples, step: collate(samples))  # fmt: skip


def parts(made, step):
    batches = made.step_batches(step)
    return [b for b in batches if "replay" not in b.columns], [b for b in batches if "replay" in b.columns]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.5, 0.8])
def test_replayed_rows_have_exactly_their_share_of_the_count(ratio):
    objective = WithReplay(Likelihood())
    for step in (1, 2, 5):
        task, replayed = parts(source(ratio, 0.9), step)
        ours, theirs = (sum(map(objective.count, group)) for group in (task, replayed))
        assert theirs / (ours + theirs) == pytest.approx(ratio)


def test_the_loss_of_a_step_is_the_weighted_mean_of_both():
    model, made = LanguageModel(tiny_causal("llama", layers=1)), source(0.25)
    stage = Stage("tiny", model, WithReplay(Likelihood()), made)
    line, _ = train_step(stage, build_optimizer(model, SPEC.optim), SPEC, 1)
    assert line["loss"] == pytest.approx(0.75 * line["task_loss"] + 0.25 * line["replay_loss"])
    assert line["task_loss"] != pytest.approx(line["replay_loss"])


def test_the_gradient_is_that_of_the_weighted_mean():
    model, made = LanguageModel(tiny_causal("llama", layers=1)), source(0.25, micro=40)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def mean(batches):
        sums = [Likelihood().loss(model(batch), batch).sum for batch in batches]
        return torch.stack(sums).sum() / sum(map(Likelihood().count, batches))

    task, replayed = parts(made, 1)
    objective, batches = WithReplay(Likelihood()), [*task, *replayed]
    total = sum(map(objective.count, batches))
    found = gradient(torch.stack([objective.loss(model(b), b).sum for b in batches]).sum() / total)
    wanted = gradient(0.75 * mean(task) + 0.25 * mean(replayed))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, gradient(mean(task)), atol=1e-4), "the control leaves the replayed rows out"


def test_which_rows_depends_on_the_step_and_a_restored_ratio_alone():
    made, other = source(), source()
    for _ in range(3):
        made.adapt(1.0, 0.02, 0.8)
    origins = [b.origins for b in parts(made, 4)[1]]
    assert origins != [b.origins for b in parts(made, 3)[1]]
    other.restore(made.state())
    assert [b.origins for b in parts(other, 4)[1]] == origins
    assert [b.origins for b in parts(source(), 4)[1]] != origins, "another ratio draws other rows"


def test_the_ratio_doubles_near_the_limit_and_halves_far_from_it_within_its_bounds():
    made, seen = source(0.1, 0.3), []
    for worst in (0.017, 0.05, 0.01, 0.007, 0.0, 0.0, float("nan")):
        made.adapt(worst, 0.02, 0.8)
        seen.append(made.ratio)
    assert seen == pytest.approx([0.2, 0.3, 0.3, 0.15, 0.1, 0.1, 0.2])
