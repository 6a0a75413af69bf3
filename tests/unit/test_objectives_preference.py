"""Reward and preference losses: literal numbers, plain float64 formulas, gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.batch import Batch, Outputs, Sample
from tunesmith.data.batches import collate
from tunesmith.objectives.dpo import LossName, Preference
from tunesmith.objectives.pairs import pairs_of
from tunesmith.objectives.reward import BradleyTerry

ALL: tuple[LossName, ...] = ("sigmoid", "ipo", "hinge", "orpo", "simpo")


def answers(ranks: list[int], groups: list[int], lengths: list[int] | None = None) -> Batch:
    """One segment per answer, of 2 tokens or as given; every token but the first counts."""
    draw, made = np.random.default_rng(0), []
    for rank, group, length in zip(ranks, groups, lengths or [2] * len(ranks), strict=True):
        weights = np.ones(length, np.float32)
        weights[0] = 0
        column = -draw.random(length).astype(np.float32) * 2 - 0.1
        made.append(
            Sample(np.full(length, 7, np.int32), weights, {"reference_logprobs": column}, label=rank, group=group)
        )
    return collate(made)


def ranked(scores: list[float], ranks: list[int], groups: list[int], **settings: float) -> float:
    outputs = Outputs(scores=torch.tensor(scores, dtype=torch.float64)[:, None])
    batch, objective = answers(ranks, groups), BradleyTerry(**settings)
    return float(objective.loss(outputs, batch).sum) / objective.count(batch)


@pytest.mark.parametrize(("gap", "cost"), [(-0.4, 0.9130), (0.0, 0.6931), (0.4, 0.5130), (1.0, 0.3133)])
def test_a_gap_costs_what_the_table_says(gap: float, cost: float) -> None:
    assert ranked([gap, 0.0], [1, 2], [0, 0]) == pytest.approx(cost, abs=5e-5)


def test_control_the_other_way_round_costs_something_else() -> None:
    assert ranked([1.0, 0.0], [2, 1], [0, 0]) == pytest.approx(1.3133, abs=5e-5)


def test_a_ranking_of_four_is_the_mean_of_its_six_pairs() -> None:
    scores = [0.3, -0.2, 1.1, 0.5]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    expected = sum(math.log1p(math.exp(scores[b] - scores[a])) for a, b in pairs) / 6
    assert ranked(scores, [1, 2, 3, 4], [0] * 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num", "num_pairs"), [(2, 1), (4, 6), (9, 36)])
def test_k_answers_give_k_choose_2_pairs(num: int, num_pairs: int) -> None:
    assert len(pairs_of(answers(list(range(num)), [0] * num)).better) == num_pairs


def test_ties_are_dropped_and_a_group_of_ties_does_not_count() -> None:
    batch = answers([1, 1, 2, 1, 1], [0, 0, 0, 1, 1])
    found = pairs_of(batch)
    assert (found.better.tolist(), found.worse.tolist(), found.share.tolist()) == ([0, 1], [2, 2], [0.5, 0.5])
    assert BradleyTerry().count(batch) == 1.0


def test_every_prompt_weighs_the_same_whatever_its_number_of_answers() -> None:
    both = ranked([0.1, 0.4, 1.0, -0.5, 0.2], [1, 2, 1, 2, 3], [0, 0, 1, 1, 1])
    first, second = ranked([0.1, 0.4], [1, 2], [0, 0]), ranked([1.0, -0.5, 0.2], [1, 2, 3], [0] * 3)
    assert both == pytest.approx((first + second) / 2, rel=1e-12)


def test_a_group_cut_in_two_would_cost_something_else() -> None:
    whole = ranked([0.3, -0.2, 1.1, 0.5], [1, 2, 3, 4], [0] * 4)
    cut = (ranked([0.3, -0.2], [1, 2], [0, 0]) + ranked([1.1, 0.5], [3, 4], [0, 0])) / 2
    assert abs(whole - cut) > 1e-2


def test_margin_and_centring_are_added_as_the_papers_say() -> None:
    expected = math.log1p(math.exp(0.5 - 0.7)) + 0.01 * (1.2 + 0.5) ** 2
    assert ranked([1.2, 0.5], [1, 2], [0, 0], margin=0.5, center_coef=0.01) == pytest.approx(expected, rel=1e-12)


def test_a_rows_own_margin_is_added() -> None:
    plain = answers([1, 2, 1, 2], [0, 0, 1, 1])
    labels = torch.tensor([[1.0, 0.3], [2.0, 0.3], [1.0, 0.0], [2.0, 0.0]])
    scores = Outputs(scores=torch.tensor([[1.0], [0.2], [0.5], [0.1]], dtype=torch.float64))
    found = float(BradleyTerry(margin=0.1).loss(scores, replace(plain, labels=labels)).sum)
    expected = math.log1p(math.exp(0.4 - 0.8)) + math.log1p(math.exp(0.1 - 0.4))
    assert found == pytest.approx(expected, rel=1e-6)
    assert float(BradleyTerry(margin=0.1).loss(scores, plain).sum) < found, "control: without it the loss is lower"


def test_accuracy_counts_a_tie_in_score_as_half() -> None:
    outputs = Outputs(scores=torch.tensor([[1.0], [1.0], [2.0], [0.0]]))
    right, count = BradleyTerry().loss(outputs, answers([1, 2, 1, 2], [0, 0, 1, 1])).metrics["accuracy"]
    assert (float(right), count) == (1.5, 2.0)


def sigmoid_cost(x: float) -> float:
    return math.log1p(math.exp(-x))


def by_hand(name: str, policy: Tensor, batch: Batch, beta: float, gamma: float) -> float:
    """The formula of each paper for one pair, written out with scalars in float64."""
    mask = batch.weights > 0
    total, reference, length = [], [], []
    for segment in (0, 1):
        here = mask & (batch.segments == segment)
        total.append(float(policy[here].sum()))
        reference.append(float(batch.columns["reference_logprobs"].double()[here].sum()))
        length.append(int(here.sum()))
    h = (total[0] - reference[0]) - (total[1] - reference[1])
    mean = [t / n for t, n in zip(total, length, strict=True)]
    odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in mean]
    return {
        "sigmoid": sigmoid_cost(beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * h),
        "orpo": -mean[0] + beta * sigmoid_cost(odds[0] - odds[1]),
        "simpo": sigmoid_cost(beta * (mean[0] - mean[1]) - gamma),
    }[name]


def logprobs_for(batch: Batch, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(batch.weights.shape, generator=generator, dtype=torch.float64) * 2 - 0.05


@pytest.mark.parametrize("name", ALL)
def test_each_loss_is_its_papers_formula(name: LossName) -> None:
    batch = answers([1, 2], [0, 0], [4, 7])
    policy = logprobs_for(batch)
    loss = Preference(name, beta=0.3, gamma=0.4).loss(Outputs(logprobs=policy), batch).sum
    assert float(loss) == pytest.approx(by_hand(name, policy, batch, 0.3, 0.4), rel=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_control_chosen_and_rejected_exchanged_is_another_loss(name: LossName) -> None:
    batch, turned = answers([1, 2], [0, 0], [4, 7]), answers([2, 1], [0, 0], [4, 7])
    policy = logprobs_for(batch)
    objective = Preference(name, beta=0.3, gamma=0.4)
    first, second = (float(objective.loss(Outputs(logprobs=policy), b).sum) for b in (batch, turned))
    assert abs(first - second) > 1e-3


def test_a_policy_equal_to_its_reference_costs_log_two() -> None:
    batch = answers([1, 2], [0, 0], [4, 7])
    same = Outputs(logprobs=batch.columns["reference_logprobs"].double())
    loss = Preference("sigmoid").loss(same, batch)
    assert float(loss.sum) == pytest.approx(math.log(2), rel=1e-9)
    assert float(loss.metrics["accuracy"][0]) == 0.5 and float(loss.metrics["margin"][0]) == 0.0


def test_label_smoothing_is_a_share_of_turned_pairs() -> None:
    batch, turned = answers([1, 2], [0, 0], [4, 7]), answers([2, 1], [0, 0], [4, 7])
    outputs = Outputs(logprobs=logprobs_for(batch))
    plain, other = (float(Preference().loss(outputs, b).sum) for b in (batch, turned))
    smooth = float(Preference(label_smoothing=0.1).loss(outputs, batch).sum)
    assert smooth == pytest.approx(0.9 * plain + 0.1 * other, rel=1e-9)


def test_length_normalised_counts_a_token_not_a_completion() -> None:
    batch = answers([1, 2], [0, 0], [4, 7])
    policy, reference = logprobs_for(batch), batch.columns["reference_logprobs"].double()
    gaps = [float((policy - reference)[(batch.weights > 0) & (batch.segments == s)].mean()) for s in (0, 1)]
    loss = Preference(length_normalized=True, beta=0.5).loss(Outputs(logprobs=policy), batch).sum
    assert float(loss) == pytest.approx(sigmoid_cost(0.5 * (gaps[0] - gaps[1])), rel=1e-6)


def test_the_sft_term_is_the_chosen_completions_loss_per_token() -> None:
    batch = answers([1, 2], [0, 0], [4, 7])
    policy = logprobs_for(batch)
    chosen = -float(policy[(batch.weights > 0) & (batch.segments == 0)].mean())
    plain, more = (float(Preference(sft_coef=c).loss(Outputs(logprobs=policy), batch).sum) for c in (0.0, 0.3))
    assert more - plain == pytest.approx(0.3 * chosen, rel=1e-9)


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient by central differences, one coordinate at a time."""
    slopes = torch.zeros_like(at)
    for i in range(at.numel()):
        nudge = torch.zeros_like(at).flatten()
        nudge[i] = step
        nudge = nudge.reshape(at.shape)
        slopes.view(-1)[i] = (function(at + nudge) - function(at - nudge)) / (2 * step)
    return slopes


@pytest.mark.parametrize("settings", [{"loss_name": name} for name in ALL] + [
    {"loss_name": "sigmoid", "label_smoothing": 0.2, "sft_coef": 0.5, "length_normalized": True}
])  # fmt: skip
def test_the_gradient_of_every_loss_is_its_slope(settings: dict[str, object]) -> None:
    batch = answers([1, 2, 3, 1, 2], [0, 0, 0, 1, 1], [3, 5, 2, 4, 4])
    objective = Preference(**{"beta": 0.7, "gamma": 0.2, **settings})  # type: ignore[arg-type]

    def loss(x: Tensor) -> Tensor:
        return objective.loss(Outputs(logprobs=x), batch).sum

    at = logprobs_for(batch).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    torch.testing.assert_close(gradient, finite_difference(loss, at.detach()), rtol=1e-5, atol=1e-7)
    assert gradient[batch.weights == 0].abs().max() == 0
    assert (gradient + finite_difference(loss, at.detach())).abs().max() > 1e-3, "control: the sign matters"


def test_the_gradient_of_bradley_terry_is_its_slope() -> None:
    batch = answers([1, 2, 3, 1, 1], [0, 0, 0, 1, 1])
    objective = BradleyTerry(margin=0.3, center_coef=0.05)

    def loss(x: Tensor) -> Tensor:
        return objective.loss(Outputs(scores=x[:, None]), batch).sum

    at = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    torch.testing.assert_close(gradient, finite_difference(loss, at.detach()), rtol=1e-5, atol=1e-7)
    assert gradient[3:].abs().max() == 0, "a tie teaches nothing"


def test_orpo_stays_finite_for_sure_and_for_unlikely_answers() -> None:
    batch = answers([1, 2], [0, 0], [3, 3])
    for value in (-1e-9, -80.0):
        at = torch.full(batch.weights.shape, value, dtype=torch.float32, requires_grad=True)
        loss = Preference("orpo").loss(Outputs(logprobs=at), batch).sum
        (gradient,) = torch.autograd.grad(loss, at)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
