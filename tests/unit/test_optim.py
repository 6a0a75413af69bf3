"""Schedules at named points, groups, clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.engine.optim import OptimSpec, build_optimizer, clip, gradient_norm, rate_at, set_rate


@pytest.mark.parametrize(
    ("done", "rate"), [(0, 1e-3), (500, 8e-4), (1000, 6e-4), (1500, 4e-4), (2000, 2e-4), (2500, 0.0)]
)
def test_the_worked_examples_linear_schedule(done, rate):
    assert rate_at(OptimSpec(1e-3), done, 2500) == pytest.approx(rate)


def test_warmup_rises_and_cosine_falls():
    spec = OptimSpec(1.0, schedule="cosine", warmup_steps=4)
    rates = [rate_at(spec, k, 24) for k in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.5) and rates[24] == pytest.approx(0.0)
    assert rate_at(OptimSpec(1.0, schedule="constant"), 20, 24) == 1.0


def test_norms_and_biases_are_not_decayed_and_lora_b_is_faster():
    model = nn.ModuleDict({"lora_A": nn.Linear(2, 2, bias=False), "lora_B": nn.Linear(2, 2, bias=True)})
    optimizer = build_optimizer(model, OptimSpec(1e-2, weight_decay=0.1, b_rate_ratio=16.0))
    set_rate(optimizer, 1e-2)
    seen = {(g["weight_decay"], round(g["lr"], 6)) for g in optimizer.param_groups}
    assert seen == {(0.1, 0.01), (0.1, 0.16), (0.0, 0.16)}


def test_clipping_is_exact_and_leaves_small_gradients_alone():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = gradient_norm([parameter])
    assert float(norm) == pytest.approx(5.0)
    clip([parameter], norm, 10.0)
    assert parameter.grad.tolist() == [3.0, 4.0]
    clip([parameter], norm, 1.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, abs=1e-5)
