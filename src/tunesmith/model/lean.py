"""A backbone made ready for training in less time and memory. What it computes stays the same, and that is checked.

Frozen linears are held in the type their products run in, instead of being rounded to it at every product; norms run
in a few passes and answer in that type, so that the linears behind one share one copy of their input; of a gated MLP
gate and up are kept for the backward, and their product is made again; dropout draws 16 bits an element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunesmith.model.lora import LoraLinear, place
from tunesmith.model.quantize import quantized_layers
from tunesmith.ops_attention import keep_mask
from tunesmith.ops_norm import rms_norm

AGREE = 1e-5
"""Largest relative difference between a part and its replacement, fp32."""
_GATED = ("gate_proj", "up_proj", "down_proj")


class FrozenLinear(nn.Linear):
    """A frozen linear whose weight is held in the compute dtype; asked for another type, it is widened."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., k] -> x Wᵀ + bias."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        rows = input.reshape(-1, self.in_features).to(dtype)  # a slice as it stands would be multiplied row by row
        out = F.linear(rows, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return out.view(*input.shape[:-1], self.out_features)


class LeanRMSNorm(nn.Module):
    """A family's RMSNorm with `weight` shared; `offset` is 1 where the family multiplies by 1 + weight (Gemma)."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps, self.offset = eps, offset

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D] in autocast's type where it is on, else in the input's."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            return rms_norm(hidden, self.weight + self.offset if self.offset else self.weight, self.eps, dtype)


class LeanGatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) around the family's own three linears (SwiGLU: Shazeer 2020, arXiv:2002.05202, 2)."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        inner = cast(Tensor, _Gated.apply(gate, up))
        if not torch.is_grad_enabled():
            return self.down_proj(inner)

        def pack(saved: Tensor) -> Tensor | torch.Size:
            same = saved.untyped_storage()._cdata == inner.untyped_storage()._cdata and saved.is_contiguous()
            return saved.shape if same and saved.numel() == inner.numel() and saved.dtype == inner.dtype else saved

        def unpack(saved: Tensor | torch.Size) -> Tensor:
            return saved if isinstance(saved, Tensor) else F.silu(gate.detach()).mul_(up.detach()).view(saved)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.down_proj(inner)


class LeanDropout(nn.Module):
    """`nn.Dropout` whose masks take 16 random bits an element and one byte in memory (docs/log.md)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, hidden: Tensor) -> Tensor:
        """[...] -> [...]; what is kept is divided by 1 - p."""
        if not self.training or not self.p:
            return hidden
        kept = keep_mask(hidden.shape, self.p).to(hidden.device)
        return (hidden * (1 / (1 - self.p))).masked_fill(~kept, 0.0)


class _Gated(torch.autograd.Function):
    """silu(gate) · up; keeps the two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        to_up = F.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), to_up


def make_lean(backbone: nn.Module, compute: torch.dtype) -> None:
    """Prepare a backbone, whose trained parameters are already chosen, for training with products in `compute`.

    Where blocks are computed again in the backward, MLPs stay as they are: what a lean one keeps for it would be kept
    by every block. On the meta device, where nothing can be compared, a part is replaced for its structure alone: for
    planning.
    """
    if compute != torch.float32:
        narrow_frozen(backbone, compute)
        _turn_in_compute_type(backbone)
    elif _is_quantized(backbone):
        _let_go_of_file(backbone)
    again = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    on_device = any(parameter.device.type not in ("cpu", "meta") for parameter in backbone.parameters())
    for name, module in list(backbone.named_modules()):
        lean = None
        if type(module).__name__.endswith("RMSNorm"):
            lean = lean_norm(module)
        elif type(module).__name__.endswith("MLP") and not again:
            lean = _lean_mlp(module)
        elif type(module) is nn.Dropout and module.p and not on_device:
            lean = LeanDropout(module.p)
        if lean is not None:
            place(backbone, name, lean.train(module.training))


def narrow_frozen(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights of frozen linears in `dtype`, in place. Left as they are: weights that others share (a tied
    head), bases that an adapter reads exactly (DoRA's norms), and layers of a class of their own."""
    modules = list(backbone.named_modules())
    uses = Counter(id(parameter) for _, module in modules for parameter in module.parameters(recurse=False))
    narrowed = False
    exact = {id(m.base) for _, m in modules if isinstance(m, LoraLinear) and m.lora_magnitude_vector is not None}
    for name, module in modules:
        if type(module) is not nn.Linear or id(module) in exact:
            continue
        weight = module.weight
        if weight.dtype == torch.float32 and not weight.requires_grad and uses[id(weight)] == 1:
            weight.data = weight.data.to(dtype)
            place(backbone, name, _frozen_like(module))
            narrowed = True
    if narrowed or _is_quantized(backbone):
        _let_go_of_file(backbone)


@contextmanager
def narrowed(backbone: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """For a while, while weights stand still: linears round their fp32 weights to `dtype` once instead of at every
    product, and norms answer in it."""
    before = [] if dtype == torch.float32 else list(backbone.named_modules())
    hooks = [] if dtype == torch.float32 else _turn_in_compute_type(backbone)
    replaced = []
    try:
        for name, module in before:
            if (narrow := _narrow(module, dtype)) is not None:
                replaced.append((name, module))
                place(backbone, name, narrow)
        yield
    finally:
        for name, module in replaced:
            place(backbone, name, module)
        for hook in hooks:
            hook.remove()


def _turn_in_compute_type(backbone: nn.Module) -> list[RemovableHandle]:
    """Rotary embeddings answer in autocast's type, as they do in a model that is held in it: queries and keys stay
    narrow while they are turned, and so does the KV cache."""
    return [
        module.register_forward_hook(_narrow_answer)
        for module in backbone.modules()
        if type(module).__name__.endswith("RotaryEmbedding") and _narrow_answer not in module._forward_hooks.values()
    ]


def _narrow_answer(module: nn.Module, inputs: Any, answer: Any) -> Any:
    if not isinstance(answer, tuple) or not torch.is_autocast_enabled(answer[0].device.type):
        return answer
    return tuple(part.to(torch.get_autocast_dtype(part.device.type)) for part in answer)


@torch.no_grad()
def _narrow(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    if type(module) is nn.Linear and module.weight.dtype == torch.float32:
        narrow = _frozen_like(module)
        narrow.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        return narrow
    named = type(module).__name__
    return lean_norm(module) if named.endswith("RMSNorm") and named != LeanRMSNorm.__name__ else None


def _is_quantized(backbone: nn.Module) -> bool:
    return next(quantized_layers(backbone), None) is not None


def _let_go_of_file(backbone: nn.Module) -> None:
    """Copies of what is left of the base, trained or not: the file it was mapped from is held whole by any part."""
    for parameter in backbone.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _frozen_like(module: nn.Linear) -> FrozenLinear:
    with torch.device("meta"):
        layer = FrozenLinear(module.in_features, module.out_features, bias=module.bias is not None)
    layer.weight, layer.bias = module.weight, module.bias
    return layer.train(module.training)


@torch.no_grad()
def lean_norm(module: Any) -> LeanRMSNorm | None:
    """The replacement, when it gives what the family's own norm gives on rows drawn from a seed; else None."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.is_meta:
        return LeanRMSNorm(weight, eps, 0.0)
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    expected = cast(Tensor, module(rows))
    for offset in (0.0, 1.0):
        lean = LeanRMSNorm(weight, eps, offset)
        if _close(lean(rows), expected):
            return lean
    return None


@torch.no_grad()
def _lean_mlp(module: Any) -> LeanGatedMLP | None:
    """The same for a gated MLP: its three linears under the usual names, SiLU between them, and nothing else."""
    parts = [getattr(module, name, None) for name in _GATED]
    children = {name for name, _ in module.named_children()}
    if not all(isinstance(p, (nn.Linear, LoraLinear)) for p in parts) or children != {*_GATED, "act_fn"}:
        return None
    lean, width = LeanGatedMLP(module), cast(Any, parts[0]).in_features
    device = next(module.parameters()).device
    if device.type == "meta":
        return lean if "SiLU" in type(module.act_fn).__name__ else None
    rows = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device)
    return lean if _close(lean(rows), cast(Tensor, module(rows))) else None


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= AGREE * expected.abs().max().clamp_min(1e-6))
