"""What a step of a model holds and computes, from its real modules, without a weight in memory.

The model is built on the meta device and its tensors are then dressed as the target's (torch's fake tensors): the very
step of training runs - forward, loss, backward, update, autocast and the packed attention included - and every tensor
is counted from where it is made to where it ends. Nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tunesmith.model import attention, soft_prompt
from tunesmith.model.heads import language_head, pool, score_head
from tunesmith.model.lean import make_lean
from tunesmith.model.load import load_empty
from tunesmith.model.packing import flat_hidden, position_offset
from tunesmith.model.quantize import num_parameters
from tunesmith.model.trainable import TrainableSpec, head_modules, make_trainable
from tunesmith.ops import chunked_logprobs
from tunesmith.plan.heap import heap_peak
from tunesmith.plan.live import LiveBytes

STEPS = 2
"""Steps that are traced: the second has the optimizer's memory, and a heap that has been used."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Of one micro-batch: bytes, and floating-point operations of matrix products.

    `parameters` and `trainable` count each parameter once; `weight_bytes` are those of the weights at rest, as training
    holds them. `kept_bytes` are kept of the forward for the backward, `head_bytes` come on top while the loss is made,
    and `step_bytes` are the most that a step holds at one time, gradients included, beside weights and optimizer.
    `heap_bytes` is what glibc holds on top of that because of holes between tensors.
    """

    parameters: int
    trainable: int
    kept_bytes: int
    head_bytes: int
    step_bytes: int
    heap_bytes: int
    forward_flops: int
    backward_flops: int
    weight_bytes: int


def step_shape(
    base: str, kind: str, spec: TrainableSpec, lengths: Sequence[int], num_targets: int, *, bf16: bool,
    classes: int = 2, adam: bool = True,
) -> StepShape:  # fmt: skip
    """The shape of a step over segments of `lengths` tokens. Raises what loading the config raises."""
    model = load_empty(base, kind, classes=classes)  # type: ignore[arg-type]
    model.set_attn_implementation(attention.NAME)
    make_trainable(model, spec)
    model.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = num_parameters(model)
    num_tokens = sum(lengths) + soft_prompt.num_virtual(model) * len(lengths)
    forward, backward = _flops(model, num_tokens, num_targets, _head(model, kind))
    make_lean(model, torch.bfloat16 if bf16 else torch.float32)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _dress(model, mode)
    own = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in own}
    with mode, LiveBytes(own) as live:
        memory: list[Tensor] = []
        kept = head = 0
        for _ in range(STEPS):
            kept, head = _forward_backward(model, kind, lengths, num_targets, bf16=bf16, live=live)
            memory = memory or [torch.zeros_like(p) for p in _trained(model) for _ in range(2 if adam else 0)]
            _update(model, memory)
        step = live.peak - sum(tensor.untyped_storage().nbytes() for tensor in memory)
    heap = heap_peak(live.events) - live.peak
    return StepShape(total, trainable, kept, head, step, heap, forward, backward, sum(weights.values()))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _forward_backward(
    model: Any, kind: str, lengths: Sequence[int], num_targets: int, *, bf16: bool, live: LiveBytes
) -> tuple[int, int]:
    """(bytes kept for the backward, bytes on top of them while the loss is made); gradients stand in the model."""
    model.zero_grad(set_to_none=True)
    before = live.now
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = flat_hidden(model, _batch(lengths), causal=kind == "causal", offset=position_offset(model))
        kept, so_far, live.peak = live.now, live.peak, live.now
        loss = _loss(model, kind, hidden, lengths, num_targets)
    head, live.peak = live.peak - kept, max(live.peak, so_far)
    loss.backward()
    return kept - before, head


def _loss(model: Any, kind: str, hidden: Tensor, lengths: Sequence[int], num_targets: int) -> Tensor:
    """A loss over `hidden [T, D]` as training makes it; of a head whose structure is not known, over `hidden`."""
    if kind == "classifier":
        scores = score_head(model)
        how = "last" if scores is not None and scores.pool == "last" else "first"  # a mean takes as many bytes
        return hidden.sum() if scores is None else scores.apply(pool(hidden, lengths, how)).float().sum()
    head = language_head(model, causal=kind == "causal")
    if head is None:
        return hidden.sum()
    rows = min(num_targets, hidden.shape[0])
    hidden = head.transform(hidden[torch.arange(rows)])
    targets = torch.zeros(rows, dtype=torch.long)
    if type(head.decoder) is not nn.Linear:
        return head.decoder(hidden).float().log_softmax(-1).gather(1, targets[:, None]).sum()
    shape = {"scale": head.scale, "softcap": head.softcap}
    return chunked_logprobs(hidden, head.decoder.weight, head.decoder.bias, targets, **shape).sum()


@torch.no_grad()
def _update(model: nn.Module, memory: Sequence[Tensor]) -> None:
    """What an update makes on its way: AdamW's denominator for one parameter at a time, and the look for NaN."""
    for moment in memory[1::2]:
        (moment.sqrt() / 1.0).add_(1e-8)
    for parameter in _trained(model):
        torch.isfinite(parameter).all()


def _head(model: Any, kind: str) -> tuple[int, int, bool] | None:
    decoder = None if kind == "classifier" else model.get_output_embeddings()
    if decoder is None:
        return None
    rows, width = decoder.weight.shape
    return int(rows), int(width), bool(decoder.weight.requires_grad)


def _flops(model: nn.Module, num_tokens: int, num_targets: int, head: tuple[int, int, bool] | None) -> tuple[int, int]:
    """2 operations a weight and token forward; as many again for the input's gradient, and for a trained weight's.

    Through a body of which nothing learns no gradient passes.
    """
    forward = backward = 0
    heads = tuple(f"{name}." for name in head_modules(model))
    deep = any(p.requires_grad and not name.startswith(heads) for name, p in model.named_parameters())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        if name.rpartition(".")[2] == "base":  # the frozen matrix inside an adapted layer is seen through the layer
            continue
        is_head = head is not None and tuple(weight.shape) == head[:2] and name.endswith(("lm_head", "embed_out"))
        work = 2 * weight.numel() * (num_targets if is_head else num_tokens)
        forward += work
        backward += work * (weight.requires_grad + (deep or weight.requires_grad))
    return forward, backward


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
