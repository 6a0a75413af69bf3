"""Parameter groups, AdamW or SGD, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class OptimSpec:
    """What the optimizer needs to know. `b_rate_ratio` multiplies the rate of LoRA's B (LoRA+, 2402.12354)."""

    learning_rate: float
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    b_rate_ratio: float = 1.0
    schedule: str = "linear"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    rate_ratios: tuple[tuple[str, float], ...] = ()
    """(beginning of a parameter's name, multiple of the rate): a critic beside its policy, for one."""


def rate_at(spec: OptimSpec, steps_done: int, num_steps: int) -> float:
    """Learning rate after `steps_done` of `num_steps`: warm-up from 0, then constant, linear or cosine to 0."""
    if steps_done < spec.warmup_steps:
        return spec.learning_rate * (steps_done + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return spec.learning_rate
    span = max(1, num_steps - spec.warmup_steps)
    done = min(1.0, (steps_done - spec.warmup_steps) / span)
    share = 1.0 - done if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return spec.learning_rate * share


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], spec: OptimSpec) -> list[dict[str, object]]:
    """Groups by (decayed or not, multiple of the rate). Biases and norms, all one-dimensional, are not decayed."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            ratio = spec.b_rate_ratio if "lora_B" in name else 1.0
            ratio *= math.prod(r for start, r in spec.rate_ratios if name.startswith(start))
            groups.setdefault((parameter.dim() > 1, ratio), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": spec.weight_decay if decayed else 0.0, "rate_ratio": ratio}
        for (decayed, ratio), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """AdamW (1711.05101) or SGD over what trains; fp32 state."""
    groups = parameter_groups(model.named_parameters(), spec)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.learning_rate)
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.epsilon)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: the schedule's times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, one number, NaN or infinite if any gradient is."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())


def moments_finite(optimizer: torch.optim.Optimizer) -> bool:
    """False when the optimizer remembers NaN or infinity, which its next step would put into the weights."""
    kept = [t for entry in optimizer.state.values() for key, t in entry.items() if key != "step"]
    # A sum is finite only if every term is, and reads memory once: a tenth of what `isfinite` or a maximum norm costs.
    sums = [t.sum(dtype=torch.float32) for t in kept if isinstance(t, Tensor)]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale all gradients so that their norm is at most `limit`."""
    if limit is not None and float(norm) > limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
