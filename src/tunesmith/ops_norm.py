"""RMSNorm in a few passes: h = x / rms(x) · w (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """Saves x and 1 / rms(x); the normalised rows are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(precise(x.dtype))
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inverse, weight = ctx.saved_tensors
        normal = x.to(inverse.dtype) * inverse
        grad = grads[0].to(inverse.dtype)
        to_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None, None
        through = grad * weight
        shared = (through * normal).mean(-1, keepdim=True)
        return through.addcmul_(normal, shared, value=-1).mul_(inverse).to(x.dtype), to_weight, None, None


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., D], weight [D] -> x / sqrt(mean(x²) + eps) · weight, reduced in fp32 and given in `dtype` (x's)."""
    return _RMSNorm.apply(x, weight, eps, dtype or x.dtype)  # type: ignore[no-any-return]
