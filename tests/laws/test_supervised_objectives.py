"""Law: the objectives equal torch on the same numbers, their gradients finite differences. Control: a flipped sign."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.laws.test_packing_law import make_samples

from tunesmith.batch import Batch, Outputs
from tunesmith.data.batches import collate
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.likelihood import Likelihood


def labelled_batch(labels: torch.Tensor) -> Batch:
    return replace(collate(make_samples(label=True)), labels=labels)


def test_likelihood_is_torch_s_cross_entropy():
    batch = collate(make_samples())
    logits = torch.randn(*batch.targets.shape, 320, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logprobs = logits.log_softmax(-1).gather(2, batch.targets[..., None])[..., 0] * (batch.weights > 0)
    ours = Likelihood().loss(Outputs(logprobs=logprobs), batch).sum / Likelihood().count(batch)
    counted = batch.weights > 0
    theirs = F.cross_entropy(logits[counted], batch.targets[counted])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("multi_label", [False, True])
def test_classify_is_torch_s_cross_entropy(multi_label):
    scores = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]) if multi_label else torch.tensor([2, 0, 1, 1])
    objective, batch = Classify(multi_label), labelled_batch(labels)
    ours = objective.loss(Outputs(scores=scores), batch).sum / objective.count(batch)
    double = labels.double() if multi_label else labels
    theirs = F.binary_cross_entropy_with_logits(scores, double) if multi_label else F.cross_entropy(scores, double)
    torch.testing.assert_close(ours, theirs)


def slopes(loss, values: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Central differences, one coordinate at a time."""
    found = torch.zeros_like(values)
    for index in range(values.numel()):
        shift = torch.zeros_like(values).flatten()
        shift[index] = step
        shift = shift.view_as(values)
        found.view(-1)[index] = (loss(values + shift) - loss(values - shift)) / (2 * step)
    return found


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_gradient_is_the_slope(multi_label):
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]) if multi_label else torch.tensor([2, 0, 1, 1])
    batch = labelled_batch(labels)
    scores = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return Classify(multi_label).loss(Outputs(scores=values), batch).sum

    loss(scores).backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, slopes(loss, scores.detach()), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(scores.grad, -slopes(loss, scores.detach())), "control: a flipped sign is seen"


def test_the_gradient_of_the_likelihood_is_minus_the_weight():
    batch = collate(make_samples())
    logprobs = torch.randn(batch.weights.shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    Likelihood().loss(Outputs(logprobs=logprobs), batch).sum.backward()
    assert torch.equal(logprobs.grad, -batch.weights)
