"""What a step of a model holds and computes, from its real modules, without a weight in memory.

The model is built on the meta device and its tensors are then dressed as the target's (torch's fake tensors): the very
forward of training runs, autocast and the packed attention included, and every tensor that it keeps for the backward
is counted once. Nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tunesmith.model import attention
from tunesmith.model.load import load_empty
from tunesmith.model.packing import flat_hidden, position_offset
from tunesmith.model.quantize import num_parameters, quantized_layers
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.ops_attention import blocks_of


@dataclass(frozen=True, slots=True)
class StepShape:
    """Of one micro-batch: bytes kept for the backward, and floating-point operations of matrix products.

    `parameters` and `trainable` count each parameter once; `head` is `(V, D)` of a language head and whether it
    trains, None for a classifier; `widest` is the widest activation of a token, in numbers. `weight_bytes` are those of
    the weights at rest, and `unpacked` the numbers of the largest quantised matrix (0: none is).
    """

    parameters: int
    trainable: int
    kept_bytes: int
    forward_flops: int
    backward_flops: int
    head: tuple[int, int, bool] | None
    widest: int
    weight_bytes: int
    unpacked: int = 0


def step_shape(
    base: str, kind: str, spec: TrainableSpec, lengths: Sequence[int], num_targets: int, *, bf16: bool, classes: int = 2
) -> StepShape:
    """The shape of a forward and backward over segments of `lengths` tokens. Raises what loading the config raises."""
    model = load_empty(base, kind, classes=classes)  # type: ignore[arg-type]
    model.set_attn_implementation(attention.NAME)
    make_trainable(model, spec)
    model.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = [layer for _, layer in quantized_layers(model)]
    weight_bytes = 4 * sum(p.numel() for p in model.parameters()) + sum(layer.num_bytes for layer in packed)
    unpacked = max((layer.out_features * layer.in_features for layer in packed), default=0)
    total = num_parameters(model)
    head = _head(model, kind)
    forward, backward = _flops(model, sum(lengths), num_targets, head)
    kept, widest = _kept(model, lengths, causal=kind == "causal", bf16=bf16)
    return StepShape(total, trainable, kept, forward, backward, head, widest, weight_bytes, unpacked)


def _head(model: Any, kind: str) -> tuple[int, int, bool] | None:
    decoder = None if kind == "classifier" else model.get_output_embeddings()
    if decoder is None:
        return None
    rows, width = decoder.weight.shape
    return int(rows), int(width), bool(decoder.weight.requires_grad)


def _flops(model: nn.Module, num_tokens: int, num_targets: int, head: tuple[int, int, bool] | None) -> tuple[int, int]:
    """2 operations a weight and token forward; as many again for the input's gradient, and for a trained weight's."""
    forward = backward = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        if name.rpartition(".")[2] == "base":  # the frozen matrix inside an adapted layer is seen through the layer
            continue
        is_head = head is not None and tuple(weight.shape) == head[:2] and name.endswith(("lm_head", "embed_out"))
        work = 2 * weight.numel() * (num_targets if is_head else num_tokens)
        forward += work
        backward += work * (2 if weight.requires_grad else 1)
    return forward, backward


def _kept(model: nn.Module, lengths: Sequence[int], *, causal: bool, bf16: bool) -> tuple[int, int]:
    """(bytes kept for the backward, widest activation of a token) of a packed forward through the backbone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _dress(model, mode)
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}
    widest = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal widest
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
            widest = max(widest, tensor.shape[-1] if tensor.dim() == 3 else 0)
        return tensor

    blocks_of(tuple(lengths))  # made of real numbers and kept: fake ones would have none
    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        batch = _batch(lengths)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            flat_hidden(model, batch, causal=causal, offset=position_offset(model))
    return sum(storage.nbytes() for storage in kept.values()), widest


def _dress(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every meta tensor of the model as a fake one of the CPU; what was shared stays shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[id(tensor)]


@dataclass(frozen=True, slots=True)
class _Row:
    """As much of a `Batch` as the backbone reads."""

    input_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]


def _batch(lengths: Sequence[int]) -> Any:
    zeros = torch.zeros(1, sum(lengths), dtype=torch.long)
    return _Row(zeros, zeros, tuple(lengths))
