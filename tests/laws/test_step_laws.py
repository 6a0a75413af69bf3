"""Laws of one step: accumulation does not matter, weight 0 means no gradient, what changes is what was declared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny import tiny_causal

from tunesmith.batch import Loss, Sample
from tunesmith.data.batches import collate
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.fit import train_step
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood

SPEC = FitSpec(seed=1, optim=OptimSpec(1e-2, optimizer="sgd", clip_norm=None))


def samples() -> list[Sample]:
    draw = np.random.default_rng(0)
    made = []
    for length in (4, 9, 3, 12, 6, 2, 15, 7):
        weights = draw.integers(0, 3, length).astype(np.float32)
        weights[0] = 0
        made.append(Sample(draw.integers(7, 300, length).astype(np.int32), weights, origin="rows.jsonl:1"))
    return made


class Parts:
    """A source of one step whose micro-batches are given."""

    num_steps, steps_per_epoch = 1, 1

    def __init__(self, parts):
        self.parts = parts

    def step_batches(self, step):
        return self.parts

    def at_boundary(self, step):
        return True


class MeanOfMeans(Likelihood):
    """The bug that lived for years: every micro-batch divides by its own count."""

    def count(self, batch):
        return 1.0

    def loss(self, outputs, batch):
        return Loss(super().loss(outputs, batch).sum / max(1.0, super().count(batch)))


def after_one_step(split: list[int], objective=None) -> torch.Tensor:
    model = LanguageModel(tiny_causal("llama"))
    rows, parts, start = samples(), [], 0
    for size in split:
        parts.append(collate(rows[start : start + size]))
        start += size
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    stage = Stage("pretrain", model, objective or Likelihood(), Parts(parts))
    train_step(stage, build_optimizer(model, SPEC.optim), SPEC, 1)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("split", [[4, 4], [1] * 8, [1, 5, 2], [7, 1]])
def test_accumulated_equals_one_big_batch(split):
    whole, parts = after_one_step([8]), after_one_step(split)
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_control_mean_of_means_is_seen():
    whole, parts = after_one_step([8], MeanOfMeans()), after_one_step([1, 5, 2], MeanOfMeans())
    assert (whole - parts).abs().max() > 1e-2 * whole.abs().max()


def token_gradient(weights: list[float]) -> torch.Tensor:
    """Gradient of the last token's embedding row: it is only ever a target's context, never a prediction's."""
    model = LanguageModel(tiny_causal("llama", tie_word_embeddings=True))
    sample = Sample(np.asarray([10, 11, 12, 13], np.int32), np.asarray(weights, np.float32))
    batch = collate([sample])
    Likelihood().loss(model(batch), batch).sum.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_weight_of_zero_is_a_gradient_of_zero():
    nothing = collate([Sample(np.asarray([10, 11, 12, 13], np.int32), np.zeros(4, np.float32))])
    model = LanguageModel(tiny_causal("llama"))
    loss = Likelihood().loss(model(nothing), nothing).sum
    assert float(loss.detach()) == 0.0
    one, both = token_gradient([0, 1, 0, 0]), token_gradient([0, 1, 0, 1])
    two = token_gradient([0, 0, 0, 1])
    torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-6)


def test_control_the_weights_do_matter():
    assert (token_gradient([0, 1, 0, 0]) - token_gradient([0, 1, 0, 1])).abs().max() > 1e-3


def test_the_loss_is_the_mean_over_target_tokens():
    rows = samples()
    model = LanguageModel(tiny_causal("llama"))
    stage = Stage("pretrain", model, Likelihood(), Parts([collate(rows[:3]), collate(rows[3:])]))
    expected, count = 0.0, 0.0
    with torch.no_grad():
        for row in rows:
            logits = model.backbone(input_ids=torch.tensor(row.ids[None], dtype=torch.long)).logits[0]
            for i in range(1, len(row)):
                expected -= float(row.weights[i]) * float(logits[i - 1].log_softmax(-1)[row.ids[i]])
                count += float(row.weights[i])
    line, tokens = train_step(stage, build_optimizer(model, SPEC.optim), SPEC, 1)
    assert line["loss"] == pytest.approx(expected / count, rel=1e-5)
    assert line["targets"] == count and tokens == sum(map(len, rows))
