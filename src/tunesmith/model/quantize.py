"""Frozen linears in 4 or 8 bits, in plain torch, on any device: packed numbers at rest, a matrix for each product.

4 bits is NormalFloat with double quantisation (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, 3): in blocks of 64
weights, each is the nearest of 16 levels times the block's scale, and that scale is itself 8 bits, in groups of 256
blocks. 8 bits is absmax (1/127 of the scale) over the same blocks. The paper's second 8 bits are a float; here they
are a logarithmic code, at most 2.2 % above the block's largest weight whatever stands beside it: nothing is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError

Kind = Literal["8bit", "4bit"]
BITS: dict[str, int] = {"8bit": 8, "4bit": 4}
BLOCK = 64
"""Weights that share a scale."""
GROUP = 256
"""Scales that share a largest one, in fp32."""
OCTAVES = 8
"""A block's scale lies at most this many powers of two below the largest of its group; smaller ones are raised."""
STORED = ("codes", "scale_codes", "scale_tops")
"""What a quantised matrix is at rest."""
CHUNK_BLOCKS = 1 << 17
"""Blocks that are unpacked at one time: 8 million weights."""


def nf4_levels() -> list[float]:
    """The 16 values of NormalFloat4: quantiles of the normal distribution over [-1, 1], exact 0 and ends included.

    Eight on the positive side, seven on the negative, 0 between (2305.14314, eq. 4 and appendix E).
    """
    end = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))  # appendix E: the mean of the two sides' outermost quantiles
    up = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64))
    down = torch.special.ndtri(torch.linspace(0.5, end, 8, dtype=torch.float64))
    levels = torch.cat([-down.flip(0)[:-1], up])
    return (levels / levels.max()).tolist()


def scale_bits(block: int = BLOCK, group: int | None = GROUP) -> float:
    """Bits a weight that scales take: 32 / 64 = 0.5, doubly quantised 8 / 64 + 32 / (64 · 256) = 0.127 (3)."""
    return 32 / block if group is None else 8 / block + 32 / (block * group)


def stored_bytes(num_weights: int, kind: Kind) -> int:
    """Bytes of a matrix at rest; exact, padding of the last block and group included."""
    blocks = math.ceil(num_weights / BLOCK)
    return blocks * BLOCK * BITS[kind] // 8 + blocks + 4 * math.ceil(blocks / GROUP)


_LEVELS = nf4_levels()
_STEPS = [0.0, *(2.0 ** ((code - 255) * OCTAVES / 254) for code in range(1, 256))]
"""What each code of a scale means, in parts of its group's largest."""


def _pairs() -> Tensor:
    """The two levels of every byte `[256]`, as one 8-byte number each, so that one look-up gives both."""
    levels = torch.tensor(_LEVELS, dtype=torch.float32)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.int64)[:, 0].contiguous()


def encode_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """`[blocks]` fp32, not negative -> (codes `[blocks]` uint8, tops `[groups]` fp32); rounded up."""
    groups = nn.functional.pad(scales, (0, -len(scales) % GROUP)).view(-1, GROUP)
    tops = groups.amax(1)
    share = groups / torch.where(tops > 0, tops, 1.0)[:, None]
    codes = (share.log2() * 254 / OCTAVES + 255 - 1e-4).ceil().clamp(1, 255)
    return torch.where(share > 0, codes, 0).to(torch.uint8).flatten()[: len(scales)].contiguous(), tops


def decode_scales(codes: Tensor, tops: Tensor, steps: Tensor) -> Tensor:
    """The scales again, `[blocks]` fp32."""
    return steps.index_select(0, codes.int()) * tops.repeat_interleave(GROUP)[: len(codes)]


def encode(shares: Tensor, kind: Kind) -> Tensor:
    """Weights in parts of their block's scale, `[blocks, 64]` in [-1, 1] -> codes: uint8 `[blocks, 32]` or int8."""
    if kind == "8bit":
        return (shares * 127).round().clamp(-127, 127).to(torch.int8)
    levels = torch.tensor(_LEVELS, dtype=torch.float32, device=shares.device)
    nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return (nearest[:, 0::2] << 4) | nearest[:, 1::2]


def decode(codes: Tensor, pairs: Tensor) -> Tensor:
    """What the codes mean, `[blocks, 64]` fp32."""
    if codes.dtype == torch.int8:
        return codes.float().div_(127)
    return pairs.index_select(0, codes.flatten().int()).view(torch.float32).view(len(codes), BLOCK)


class _Product(torch.autograd.Function):
    """x [..., k] -> x Wᵀ + bias. Nothing is kept for the backward: the matrix is unpacked once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.input_dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), layer.matrix(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(grads[0].device.type, enabled=False):
            grad = grads[0] @ ctx.layer.matrix(grads[0].dtype)
        return grad.to(ctx.input_dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen linear `[d, k]` in `kind`'s bits. `transposed` says that it was a transformers `Conv1D`.

    Products run in the compute dtype (autocast's, else the input's) with the unpacked matrix rounded to it, so that the
    layer equals, bit for bit, the plain linear that `opened` gives.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_tops: Tensor
    pairs: Tensor
    steps: Tensor

    def __init__(self, matrix: Tensor, bias: nn.Parameter | None, kind: Kind, *, transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.kind: Kind = kind
        self.transposed = transposed
        self.bias = bias
        found = _meta_parts(matrix, kind) if matrix.is_meta else _parts(matrix, kind)
        for name, tensor in zip(STORED, found, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("pairs", _pairs().to(matrix.device), persistent=False)
        self.register_buffer("steps", torch.tensor(_STEPS, device=matrix.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The unpacked matrix as the layer it was made of stored it, fp32; made anew at every reading."""
        return self.matrix().t() if self.transposed else self.matrix()

    @property
    def num_bytes(self) -> int:
        """Bytes at rest, bias not counted."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale_codes, self.scale_tops))

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The unpacked matrix `[d, k]`."""
        scales = decode_scales(self.scale_codes, self.scale_tops, self.steps)[:, None]
        parts = [
            decode(codes, self.pairs).mul_(part).to(dtype)
            for codes, part in zip(self.codes.split(CHUNK_BLOCKS), scales.split(CHUNK_BLOCKS), strict=True)
        ]
        whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1)
        return whole[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., d]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            return cast(Tensor, _Product.apply(x, self, dtype))

    def opened(self) -> nn.Module:
        """The same layer with its matrix unpacked for good, fp32: `nn.Linear`, or `Conv1D` where it was one."""
        d, k = self.out_features, self.in_features
        with torch.device("meta"):
            plain: Any = Conv1D(d, k) if self.transposed else nn.Linear(k, d, bias=self.bias is not None)
        plain.weight = nn.Parameter(self.weight.contiguous(), requires_grad=False)
        plain.bias = self.bias
        return cast(nn.Module, plain.train(self.training))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kind}"


def _parts(matrix: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale codes, scale tops) of a matrix; a few million weights at a time."""
    flat = matrix.detach().reshape(-1)
    chunks = [_blocks(part) for part in flat.split(CHUNK_BLOCKS * BLOCK)]
    scale_codes, tops = encode_scales(torch.cat([part.abs().amax(1) for part in chunks]))
    scales = decode_scales(scale_codes, tops, torch.tensor(_STEPS, device=flat.device))
    scales = torch.where(scales > 0, scales, 1.0)[:, None]
    found = [encode(c / s, kind) for c, s in zip(chunks, scales.split(CHUNK_BLOCKS), strict=True)]
    return torch.cat(found), scale_codes, tops


def _blocks(flat: Tensor) -> Tensor:
    """`[blocks, 64]` fp32, the last one filled with zeros."""
    return nn.functional.pad(flat.float(), (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _meta_parts(matrix: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Their shapes alone."""
    blocks = math.ceil(matrix.numel() / BLOCK)
    packed = (blocks, BLOCK // 2, torch.uint8) if kind == "4bit" else (blocks, BLOCK, torch.int8)
    return (
        torch.empty(packed[:2], dtype=packed[2], device="meta"),
        torch.empty(blocks, dtype=torch.uint8, device="meta"),
        torch.empty(math.ceil(blocks / GROUP), device="meta"),
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """What was quantised: layers, their weights, and the bytes these now take."""

    kind: Kind
    layers: int
    weights: int
    num_bytes: int

    def describe(self) -> str:
        """One line."""
        share = 8 * self.num_bytes / max(self.weights, 1)
        return (f"base: {self.weights:,} weights of {self.layers} linear layers in {self.kind}, "
                f"{self.num_bytes:,} bytes ({share:.3f} bits a weight)")  # fmt: skip


def quantize_linears(model: Any, names: Iterable[str], kind: Kind) -> Packed:
    """Replace each named `nn.Linear` or `Conv1D` by a `QuantizedLinear`, in place, one after the other.

    What stays (norms, embeddings, head, biases) is held in fp32 (QLoRA's practice). Raises ModelError for a weight that
    is NaN or infinite.
    """
    layers = weights = num_bytes = 0
    for name in names:
        layer = model.get_submodule(name)
        turned = isinstance(layer, Conv1D)
        matrix = layer.weight.t() if turned else layer.weight
        if not matrix.is_meta and not bool(torch.isfinite(matrix).all()):
            raise ModelError(f"{name} holds NaN or infinity, which cannot be quantised: the base is damaged")
        bias = cast("nn.Parameter | None", layer.bias)
        packed = QuantizedLinear(matrix, bias, kind, transposed=turned).train(layer.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
        layers, weights, num_bytes = layers + 1, weights + matrix.numel(), num_bytes + packed.num_bytes
    _widen(model)
    return Packed(kind, layers, weights, num_bytes)


def _widen(model: nn.Module) -> None:
    """Every 16-bit parameter and buffer as fp32; tied ones stay tied."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                module._buffers[name] = buffer.float()
    if getattr(model, "config", None) is not None:
        cast(Any, model).config.dtype = torch.float32


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every quantised layer by its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def quantized_as(model: nn.Module) -> Kind | None:
    """In which bits the base stands; None for a plain one."""
    return next((layer.kind for _, layer in quantized_layers(model)), None)


def num_parameters(model: nn.Module) -> int:
    """Parameters, each once; a quantised matrix counts with its weights."""
    packed = sum(layer.out_features * layer.in_features for _, layer in quantized_layers(model))
    return packed + sum(p.numel() for p in model.parameters())
