"""LoRA beside a frozen linear: one autograd function, and the family around it (rank-stabilised, DoRA, PiSSA).

h(x) = W0 x + s B A x, with A [R, k] Gaussian, B [d, R] zero, s = alpha / R (Hu et al. 2021, arXiv:2106.09685), or
alpha / sqrt(R) rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732). The frozen linear is asked for two things
only, `x W0^T` and `g W0`, so that a quantised base is another frozen linear and not another LoRA.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, several
from tunesmith.model.quantize import QuantizedLinear
from tunesmith.ops_attention import drawn_seed, keep_mask


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What every injected layer shares. `init` is `default` or `pissa`; `dropout` acts on the adapter's input."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init: str = "default"
    rank_stabilized: bool = False
    dora: bool = False
    seed: int = 0

    @property
    def scaling(self) -> float:
        """s in W0 + s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def weight_matrix(base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The frozen matrix as `[d, k]` (out, in), whichever way the layer stores it; a quantised one is unpacked, fp32."""
    if isinstance(base, QuantizedLinear):
        return base.matrix(dtype or torch.float32)
    weight = cast(Tensor, base.weight)
    matrix = weight.t() if isinstance(base, Conv1D) else weight
    return matrix if dtype is None else matrix.to(dtype)


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """(d, k) of the frozen matrix."""
    if isinstance(base, QuantizedLinear):
        return base.out_features, base.in_features
    d, k = weight_matrix(base).shape
    return d, k


def is_turned(base: nn.Module) -> bool:
    """True where the layer stores, or stored before it was quantised, its matrix as `[k, d]`."""
    return base.transposed if isinstance(base, QuantizedLinear) else isinstance(base, Conv1D)


class _LoraFunction(torch.autograd.Function):
    """x [N, k], A [R, k], B [d, R] -> x W0^T + bias + s (drop(x) A^T) B^T. Saves x and drop(x) A^T, no mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: LoraLinear, dtype: torch.dtype) -> Tensor:
        rate = layer.dropout if layer.training else 0.0
        seed = drawn_seed() if rate else None
        low = x.to(dtype)
        dropped = low if seed is None else low * _mask(low, rate, seed)
        inner = dropped @ a.to(dtype).t()
        out = layer.frozen_forward(low)
        out.addmm_(inner, b.to(dtype).t(), alpha=layer.scaling)
        ctx.save_for_backward(low, inner, a, b)
        ctx.layer, ctx.rate, ctx.seed, ctx.input_dtype = layer, rate, seed, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inner, a, b = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        grad = grads[0].to(x.dtype)
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_b:
                grad_b = (inner.t() @ grad).t().to(b.dtype).mul_(layer.scaling)
            through = (grad @ b.to(x.dtype)).mul_(layer.scaling) if needs_a or needs_x else None
            mask = None if ctx.seed is None else _mask(x, ctx.rate, ctx.seed)
            if needs_a and through is not None:
                grad_a = (through.t() @ (x if mask is None else x * mask)).to(a.dtype)
            if needs_x and through is not None:
                grad_x = layer.frozen_backward(grad)
                if mask is None:
                    grad_x.addmm_(through, a.to(x.dtype))
                else:
                    grad_x.add_((through @ a.to(x.dtype)).mul_(mask))
                grad_x = grad_x.to(ctx.input_dtype)
        return grad_x, grad_a, grad_b, None, None


def _mask(like: Tensor, rate: float, seed: int) -> Tensor:
    """The dropout mask of `seed`, already divided by 1 - rate: made again in the backward instead of kept."""
    kept = keep_mask(like.shape, rate, torch.Generator(like.device).manual_seed(seed))
    return kept.to(like.dtype).div_(1.0 - rate)


class LoraLinear(nn.Module):
    """A frozen `nn.Linear`, transformers `Conv1D` or `QuantizedLinear` with an adapter beside it; A and B in fp32.

    DoRA (Liu et al. 2024, arXiv:2402.09353) multiplies the sum by magnitude / norm, the norm held constant in the
    backward. PiSSA (Meng et al. 2024, arXiv:2404.02948) starts A and B at the leading singular vectors; its residual
    W0 - s B0 A0 is kept as the frozen pair (A0, B0), so that the base stays untouched bit for bit.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(self, base: nn.Module, spec: LoraSpec, *, name: str = "") -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = matrix_shape(base)
        self.rank, self.scaling, self.dropout = spec.rank, spec.scaling, spec.dropout
        self.rank_stabilized = spec.rank_stabilized
        self.enabled, self.merged = True, False
        device = base.codes.device if isinstance(base, QuantizedLinear) else weight_matrix(base).device
        self.lora_A = nn.Parameter(torch.zeros(spec.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, spec.rank, device=device))
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        if device.type != "meta":
            self._initialise(spec, name)
        self.lora_magnitude_vector = nn.Parameter(self._norms().detach().clone()) if spec.dora else None
        self.train(base.training)

    def _initialise(self, spec: LoraSpec, name: str) -> None:
        if spec.init == "pissa":
            self._start_at_singular_vectors()
            return
        digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        start = torch.randn(self.lora_A.shape, generator=generator) / math.sqrt(3 * self.in_features)
        self.lora_A.data.copy_(start)

    def _start_at_singular_vectors(self) -> None:
        u, sizes, vh = torch.linalg.svd(weight_matrix(self.base).detach().float(), full_matrices=False)
        root = (sizes[: self.rank] / self.scaling).sqrt()
        self.lora_A.data.copy_(root[:, None] * vh[: self.rank])
        self.lora_B.data.copy_(u[:, : self.rank] * root)
        self.initial_A, self.initial_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    @property
    def weight(self) -> Tensor:
        """The frozen layer's own weight, for code that reads it (ties, dtype)."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's own bias."""
        return cast("Tensor | None", self.base.bias)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole update: with PiSSA the start is taken off, which makes the rank 2R."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.initial_A]), torch.cat([self.lora_B, -self.initial_B], dim=1)

    def frozen_forward(self, x: Tensor) -> Tensor:
        """x [N, k] -> x W0^T + bias, a fresh tensor."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(self.base, Conv1D) and bias is not None:
                return torch.addmm(bias, x, self.base.weight.to(x.dtype))
            return nn.functional.linear(x, weight_matrix(self.base, x.dtype), bias)

    def frozen_backward(self, grad: Tensor) -> Tensor:
        """g [N, d] -> g W0."""
        return grad @ weight_matrix(self.base, grad.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., d] in the compute dtype: autocast's, else the input's."""
        if self.merged or not self.enabled:
            return self.base(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            rows = cast(Tensor, _LoraFunction.apply(x.reshape(-1, x.shape[-1]), *self.pair(), self, dtype))
            out = rows.view(*x.shape[:-1], self.out_features)  # here, so that a family may write into it (Longformer)
            if self.lora_magnitude_vector is None:
                return out
            stretch = (self.lora_magnitude_vector / self._norms().detach() - 1.0).to(dtype)
            return out + stretch * (out if self.bias is None else out - self.bias.to(dtype))

    def _norms(self) -> Tensor:
        """Length of each row of W0 + s B A, `[d]`, without making the matrix."""
        weight, (a, b) = weight_matrix(self.base).float(), self.pair()
        square = (weight * weight).sum(1) + 2 * self.scaling * ((weight @ a.t()) * b).sum(1)
        return (square + self.scaling**2 * ((b @ (a @ a.t())) * b).sum(1)).clamp_min(1e-30).sqrt()

    def merged_matrix(self) -> Tensor:
        """W0 + s B A (stretched by DoRA) as `[d, k]` in fp32, or float64 for a float64 base."""
        with torch.no_grad():
            weight = weight_matrix(self.base)
            weight = weight if weight.dtype == torch.float64 else weight.float()
            a, b = (part.to(weight.dtype) for part in self.pair())
            total = weight + self.scaling * (b @ a)
            if self.lora_magnitude_vector is None:
                return total
            return total * (self.lora_magnitude_vector / self._norms())[:, None].to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank={self.rank}, scaling={self.scaling:g}"


def is_linear(module: nn.Module) -> bool:
    """True for what an adapter can stand beside. Not torch's own attention output, which reads its weight directly,
    nor a linear by name that answers with more than a product, as a router of experts does (Llama 4)."""
    if isinstance(module, (Conv1D, QuantizedLinear)):
        return True
    odd = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(module, nn.Linear) and not odd and _multiplies(module)


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own gives x W^T + bias, or, without values, something of that shape."""
    if type(module).forward is nn.Linear.forward:
        return True
    weight = module.weight
    rows = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    expected, found = nn.functional.linear(rows, weight, module.bias), module(rows)
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and (weight.is_meta or torch.allclose(found, expected, rtol=1e-2, atol=1e-3))


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted layer by the name of the layer it stands beside."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def count(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Trained parameters of rank-`rank` adapters beside matrices `d x k`: the sum of d r + r k."""
    return sum(rank * (d + k) for d, k in shapes)


def inject(model: nn.Module, names: Iterable[str], spec: LoraSpec) -> dict[str, LoraLinear]:
    """Put an adapter beside each named linear, in place. Raises ModelError naming layers that rank does not fit."""
    names = list(names)
    found = {name: model.get_submodule(name) for name in names}
    problems = []
    for name, module in found.items():
        if not is_linear(module):
            problems.append(f"{name} is a {type(module).__name__}, not a linear layer")
            continue
        d, k = matrix_shape(module)
        if not 1 <= spec.rank <= min(d, k):
            problems.append(f"rank {spec.rank} does not fit {name}, a {d} x {k} matrix: choose 1 to {min(d, k)}")
    if spec.init not in ("default", "pissa"):
        problems.append(f"init {spec.init!r} is not known: choose default or pissa")
    if problems:
        raise several(problems, ModelError)
    return {name: place(model, name, LoraLinear(module, spec, name=name)) for name, module in found.items()}


def place(model: nn.Module, name: str, module: Any) -> Any:
    """Put `module` where `name` stands in `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return module


def nonfinite(model: nn.Module) -> list[str]:
    """Names of adapter tensors that hold NaN or infinity."""
    found = []
    for name, layer in lora_layers(model).items():
        tensors = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "magnitude": layer.lora_magnitude_vector}
        found += [f"{name}.{part}" for part, t in tensors.items() if t is not None and not t.isfinite().all()]
    return found


def merge(model: nn.Module) -> None:
    """Add each update into its frozen weight, in place. Raises ModelError, with nothing changed, on NaN or infinity.

    A quantised weight is unpacked for good: the sum would not be the same in its bits.
    """
    bad = nonfinite(model)
    if bad:
        raise ModelError(
            f"the adapter holds NaN or infinity in {', '.join(bad[:5])}: not merged, the base is unchanged"
        )
    for layer in lora_layers(model).values():
        if not layer.merged:
            if isinstance(layer.base, QuantizedLinear):
                layer.base = layer.base.opened()
            _shift(layer, layer.merged_matrix() - weight_matrix(layer.base).float())
            layer.merged = True


def unmerge(model: nn.Module) -> None:
    """Take the updates off again; W0 comes back to rounding (1e-6 in fp32)."""
    for layer in lora_layers(model).values():
        if not layer.merged:
            continue
        if layer.lora_magnitude_vector is not None:
            raise ModelError("a merged DoRA adapter cannot be taken off again: load the base anew")
        a, b = layer.pair()
        _shift(layer, -layer.scaling * (b @ a).detach())
        layer.merged = False


def _shift(layer: LoraLinear, delta: Tensor) -> None:
    matrix = weight_matrix(layer.base)
    with torch.no_grad():
        matrix.copy_((matrix.float() + delta).to(matrix.dtype))


def remove(model: nn.Module) -> None:
    """Take every adapter away: the frozen layers stand in their own places again."""
    for name, layer in lora_layers(model).items():
        place(model, name, layer.base)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The frozen layers alone for a while. `adapters.disabled` also puts back modules that were trained fully."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.enabled = was
