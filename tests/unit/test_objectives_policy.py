"""PPO, GRPO and advantages: the papers' tables, hand examples, plain float64 loops, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.batch import Batch, Outputs, Sample
from tunesmith.data.batches import collate
from tunesmith.objectives.advantages import (
    adapted_kl_coef,
    explained_variance,
    gae,
    group_advantages,
    penalised_rewards,
    whiten,
)
from tunesmith.objectives.grpo import Grpo
from tunesmith.objectives.policy import kl_from_old, kl_to_reference, surrogate
from tunesmith.objectives.ppo import Ppo

COLUMNS = ("old_logprobs", "advantages", "old_values", "returns", "reference_logprobs")


def rollouts(lengths: list[int], *, seed: int = 0, extra: Mapping[str, float] | None = None) -> Batch:
    """Prompts of 2 tokens and completions of `lengths` tokens, with random columns."""
    draw, made = np.random.default_rng(seed), []
    for group, length in enumerate(lengths):
        weights = np.r_[np.zeros(2), np.ones(length)].astype(np.float32)
        columns = {name: draw.normal(size=length + 2).astype(np.float32) for name in COLUMNS}
        columns["old_logprobs"] = -np.abs(columns["old_logprobs"]) - 0.1
        columns["reference_logprobs"] = -np.abs(columns["reference_logprobs"]) - 0.1
        columns |= {name: np.full(length + 2, value, np.float32) for name, value in (extra or {}).items()}
        made.append(Sample(np.full(length + 2, 9, np.int32), weights, columns, group=group))
    return collate(made)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain"), [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8)]
)
def test_the_clipped_surrogate_is_the_papers_table(ratio: float, advantage: float, gain: float) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    gains, rho = surrogate(logprobs, torch.zeros(1).double(), torch.tensor([float(advantage)]).double(), 0.2, 0.2)
    assert (float(gains.detach()), float(rho.detach())) == (pytest.approx(gain), pytest.approx(ratio))
    (slope,) = torch.autograd.grad(gains.sum(), logprobs)
    flat = gain in (1.2, -0.8)
    assert float(slope) == (0.0 if flat else pytest.approx(ratio * advantage))


def test_both_estimates_of_a_kl_are_right_on_average_and_never_negative() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64)
    true = float((p * (p / q).log()).sum())
    assert float((p * kl_to_reference(p.log(), q.log())).sum()) == pytest.approx(true, rel=1e-9)
    assert float((p * kl_from_old(q.log(), p.log())).sum()) == pytest.approx(true, rel=1e-9)
    assert float(kl_to_reference(p.log(), q.log()).min()) >= 0


def test_a_token_twice_as_likely_as_under_the_reference_costs_two_hundredths_of_ln_two() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    policy, reference = torch.tensor([[0.5, 1.0, 0.1]]).log(), torch.tensor([[0.25, 1.0, 0.9]]).log()
    found = penalised_rewards(torch.tensor([3.0]), policy, reference, mask, kl_coef=0.02)
    torch.testing.assert_close(found, torch.tensor([[-0.01386, 3.0, 0.0]]), atol=5e-6, rtol=0)


def test_gae_of_three_steps_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]).double(), torch.tensor([[0.5, 0.6, 0.7]]).double()
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.225, 0.25, 0.3]]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.725, 0.85, 1.0]]).double(), atol=1e-6, rtol=0)


def test_gae_is_the_plain_double_sum_for_rows_of_any_length() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 6, generator=generator).double()
    lengths, gamma, lam = [6, 3, 1, 5], 0.9, 0.8
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).double()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(expected + v[t], abs=1e-12)
        assert advantages[row, length:].abs().sum() == 0 and returns[row, length:].abs().sum() == 0


def test_with_lambda_one_the_return_is_the_discounted_sum() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[9.0, -4.0, 2.0]]).double()
    _, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[1 + 1 + 0.75, 2 + 1.5, 3.0]]).double())


def test_whitened_has_mean_zero_and_variance_one_over_the_mask() -> None:
    values, mask = torch.tensor([[1.0, 5.0, 100.0], [3.0, 7.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    kept = whiten(values.double(), mask)[mask.bool()]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-9)
    assert float(kept.var(correction=0)) == pytest.approx(1, rel=1e-6)
    assert whiten(torch.ones(1, 3), torch.ones(1, 3)).abs().max() == 0


def test_group_advantages_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0, 0, 0, 5, 5]).double(), torch.tensor([4, 4, 4, 4, 7, 7])
    plain = group_advantages(rewards, groups, normalise=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]
    torch.testing.assert_close(group_advantages(rewards, groups), plain / torch.tensor([0.5001] * 4 + [1.0] * 2))
    alone = group_advantages(rewards, groups, baseline="leave_one_out", normalise=False)
    torch.testing.assert_close(alone, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, 0, 0]).double())


def test_leave_one_out_is_the_mean_baseline_times_k_over_k_minus_one() -> None:
    rewards, groups = torch.tensor([0.3, 0.9, -1.0, 2.0, 0.1]).double(), torch.zeros(5)
    alone = group_advantages(rewards, groups, baseline="leave_one_out", normalise=False)
    torch.testing.assert_close(alone, group_advantages(rewards, groups, normalise=False) * 5 / 4)


def test_the_kl_coefficient_follows_its_target_a_tenth_of_a_fifth_at_most() -> None:
    assert adapted_kl_coef(0.1, 60, 6) == pytest.approx(0.102)
    assert adapted_kl_coef(0.1, 0, 6) == pytest.approx(0.098)
    assert adapted_kl_coef(0.1, 6, 6) == 0.1


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_the_mean() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1, 3)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 3), 3.0), returns, mask) == pytest.approx(0.0)
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask))


def answers_to(batch: Batch, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs near the old ones, values and entropies, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, *batch.weights.shape, generator=generator).double()
    return batch.columns["old_logprobs"].double() + 0.3 * noise[0], noise[1], noise[2].abs()


def plain_ppo(batch: Batch, logprobs: Tensor, values: Tensor, entropy: Tensor) -> float:
    """Token by token with Python numbers: clip 0.2, value clip 0.2, coefficients 0.1 and 0.01."""
    total = 0.0
    columns = {name: column[0].tolist() for name, column in batch.columns.items()}
    for t in (batch.weights[0] > 0).nonzero()[:, 0].tolist():
        ratio = math.exp(float(logprobs[0, t]) - columns["old_logprobs"][t])
        advantage, old, target = columns["advantages"][t], columns["old_values"][t], columns["returns"][t]
        gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        value = float(values[0, t])
        near = min(max(value, old - 0.2), old + 0.2)
        cost = 0.5 * max((value - target) ** 2, (near - target) ** 2)
        total += -gain + 0.1 * cost - 0.01 * float(entropy[0, t])
    return total


def test_ppo_is_the_plain_loop() -> None:
    batch = rollouts([4, 1, 7])
    logprobs, values, entropy = answers_to(batch)
    objective = Ppo(entropy_coef=0.01)
    loss = objective.loss(Outputs(logprobs=logprobs, values=values, entropy=entropy), batch)
    assert float(loss.sum) == pytest.approx(plain_ppo(batch, logprobs, values, entropy), rel=1e-6)
    assert objective.count(batch) == 12.0
    turned = Ppo(entropy_coef=-0.01).loss(Outputs(logprobs=logprobs, values=values, entropy=entropy), batch)
    assert abs(float(turned.sum) - float(loss.sum)) > 1e-3, "control: the entropy's sign matters"


def test_at_the_old_policy_the_ratio_is_one_and_nothing_is_clipped() -> None:
    batch = rollouts([4, 3])
    metrics = Ppo().loss(Outputs(logprobs=batch.columns["old_logprobs"]), batch).metrics
    means = {name: float(total) / count for name, (total, count) in metrics.items()}
    assert (means["ratio"], means["approx_kl"], means["clip_fraction"]) == (1.0, 0.0, 0.0)


def test_text_that_weighs_nothing_changes_not_a_bit() -> None:
    plain, mixed = rollouts([4, 3]), rollouts([4, 3], extra={"ptx": 0.0})
    logprobs, values, _ = answers_to(plain)
    outputs = Outputs(logprobs=logprobs, values=values)
    assert torch.equal(Ppo().loss(outputs, plain).sum, Ppo().loss(outputs, mixed).sum)
    assert Ppo().count(plain) == Ppo().count(mixed)


def test_text_adds_its_own_loss_and_is_not_counted() -> None:
    text = rollouts([4], extra={"ptx": 0.25})
    logprobs, values, _ = answers_to(text)
    loss = Ppo().loss(Outputs(logprobs=logprobs, values=values), text)
    kept = logprobs[text.weights > 0]
    assert float(loss.sum) == pytest.approx(-0.25 * float(kept.sum()), rel=1e-9)
    assert Ppo().count(text) == 0.0
    assert float(loss.metrics["ptx_loss"][0]) == pytest.approx(-float(kept.sum()))


def plain_grpo(batch: Batch, logprobs: Tensor, how: str, kl_coef: float) -> float:
    """The mean loss, completion by completion, clips 0.2 and 0.28, 16 tokens at most."""
    columns = {name: column[0].tolist() for name, column in batch.columns.items()}
    sums, lengths = [], []
    for segment in range(batch.num_segments):
        places = ((batch.weights[0] > 0) & (batch.segments[0] == segment)).nonzero()[:, 0].tolist()
        total = 0.0
        for t in places:
            ratio = math.exp(float(logprobs[0, t]) - columns["old_logprobs"][t])
            advantage = columns["advantages"][t]
            gap = columns["reference_logprobs"][t] - float(logprobs[0, t])
            total += -min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            total += kl_coef * (math.exp(gap) - gap - 1)
        sums.append(total)
        lengths.append(len(places))
    if how == "completion":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    divisor = {"token": sum(lengths), "constant": 16 * len(sums), "sum": len(sums)}[how]
    return sum(sums) / divisor


@pytest.mark.parametrize("how", ["completion", "token", "constant", "sum"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_grpo_is_the_plain_loop(how: str, kl_coef: float) -> None:
    batch = rollouts([4, 1, 7])
    logprobs, _, _ = answers_to(batch)
    objective = Grpo(clip_high=0.28, kl_coef=kl_coef, length_normalisation=how, max_tokens=16)  # type: ignore[arg-type]
    mean = float(objective.loss(Outputs(logprobs=logprobs), batch).sum) / objective.count(batch)
    assert mean == pytest.approx(plain_grpo(batch, logprobs, how, kl_coef), rel=1e-6)
    other = Grpo(clip_high=0.2, kl_coef=0.5, length_normalisation=how, max_tokens=16)  # type: ignore[arg-type]
    assert abs(float(other.loss(Outputs(logprobs=logprobs), batch).sum) / other.count(batch) - mean) > 1e-3


def slopes(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    found = torch.zeros_like(at).flatten()
    for i in range(at.numel()):
        nudge = torch.zeros_like(at).flatten()
        nudge[i] = step
        nudge = nudge.reshape(at.shape)
        found[i] = (function(at + nudge) - function(at - nudge)) / (2 * step)
    return found.reshape(at.shape)


@pytest.mark.parametrize("objective", [Ppo(entropy_coef=0.01), Grpo(kl_coef=0.1), Grpo(length_normalisation="token")])
def test_gradients_are_slopes(objective: Ppo | Grpo) -> None:
    batch = rollouts([3, 5])
    logprobs, values, entropy = answers_to(batch)
    stacked = torch.stack([logprobs, values, entropy]).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return objective.loss(Outputs(logprobs=x[0], values=x[1], entropy=x[2]), batch).sum

    (gradient,) = torch.autograd.grad(loss(stacked), stacked)
    expected = slopes(loss, stacked.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert (gradient + expected).abs().max() > 1e-3, "control: the sign matters"
    assert gradient[:, batch.weights == 0].abs().max() == 0
