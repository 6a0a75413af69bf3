"""Actor: what the policy, its start and its critic say of rollouts, per completion token, without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tunesmith.batch import Batch, Outputs
from tunesmith.errors import ModelError
from tunesmith.model import adapters
from tunesmith.model.language import LanguageModel
from tunesmith.model.lean import LeanDropout


@dataclass(frozen=True, slots=True)
class Tokens:
    """Numbers per completion token, `[N, T]`, a completion's from the left; `mask` is 1 where there is a token.

    `logprobs` are the trainer's at the round's weights, `sampled` the sampler's of the same tokens, `reference` those
    of the policy's start and `values` the critic's, where there are such.
    """

    mask: Tensor
    logprobs: Tensor
    sampled: Tensor
    entropy: Tensor
    reference: Tensor | None = None
    values: Tensor | None = None


class Actor:
    """A policy and its start.

    The start (the reference of every KL) is the policy's own backbone with its trainable parameters put back to what
    they were when this object was made: one backbone whatever trains, the adapter off where an adapter is new, a
    frozen copy where everything trains, and exactly the policy itself before the first step. A new soft prompt is not
    the identity, as a new adapter is: with `base` the start is the backbone with whatever was added switched off.
    """

    def __init__(
        self, model: LanguageModel, *, device: str = "cpu", start: nn.Module | None = None, base: bool = False
    ) -> None:
        """`start` is the untrained backbone where `model` has been trained already."""
        self.model, self.device, self._base = model, device, base
        self._start = _trainable(model) if start is None else _trainable(start.to(device), "backbone.")

    @torch.no_grad()
    def answer(self, batch: Batch) -> Outputs:
        """Log-probs, entropies and values, exactly as the training forward gives them for the same batch."""
        self.model.train()
        return self.model(batch.to(self.device))

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """Log-probs `[B, T]` of the policy's start."""
        self.model.train()
        moved = batch.to(self.device)
        if self._base:
            with adapters.disabled(self.model.backbone):
                return self.model(moved, values=False).logprobs
        outputs = functional_call(self.model, self._start, (moved,), {"values": False})
        return outputs.logprobs

    def check(self, batch: Batch, logprobs: Tensor) -> float:
        """The largest |ratio - 1| of a training forward on `batch` to its old `logprobs`; 0 on a sound machine.

        Raises `ModelError` where the policy does not answer the same twice, so that its ratios would be noise.
        """
        self.model.train()
        with torch.enable_grad():
            again = self.model(batch.to(self.device)).logprobs
        error = float((torch.exp(again.detach() - logprobs) - 1).abs().max())
        limit = 0.0 if self.device == "cpu" else 1e-4
        if not error <= limit:
            raise ModelError(
                f"the policy answers differently the second time (ratios off by {error:.1e} before any step), so that "
                "what it learns would be noise. Is there dropout, or code of the model's own that draws at random?"
            )
        return error


def _trainable(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Copies of what trains of the policy, by name; a critic is not part of it."""
    return {
        prefix + name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not name.startswith("critic.")
    }


def without_dropout(model: nn.Module) -> list[str]:
    """Set every dropout rate in `model` to 0; returns the modules that had one.

    A ratio of probabilities of the same weights must be 1, which two draws of a mask would spoil.
    """
    changed = []
    for name, module in model.named_modules():
        for key in _rates(module):
            setattr(module, key, 0.0)
            changed.append(name)
    return changed


def _rates(module: nn.Module) -> list[str]:
    keys = [key for key, value in vars(module).items() if type(value) is float and value > 0 and "dropout" in key]
    return keys + (["p"] if isinstance(module, (nn.Dropout, LeanDropout)) and module.p > 0 else [])


def take_tokens(rows: Tensor, batch: Batch, indices: Sequence[int], *, counts: Sequence[int], values: Tensor) -> None:
    """Write the completion tokens of `values [1, T]` of a flat `batch` into `rows [N, T]`, segment s into row
    `indices[s]`; its completion has `counts[s]` tokens, the last before the segment's end.

    A segment of prompt 5 6 and completion 7 8 holds the numbers about 7 and 8 at the positions of 6 and 7.
    """
    start = 0
    for index, count, length in zip(indices, counts, batch.lengths, strict=True):
        stop = start + length - 1
        rows[index, :count] = values[0, stop - count : stop].to(rows)
        start += length


def padded(values: Iterable[Sequence[float]], width: int) -> Tensor:
    """Rows of unequal length as `[N, width]` fp32, 0 behind their end."""
    rows = [list(row) + [0.0] * (width - len(row)) for row in values]
    return torch.tensor(rows, dtype=torch.float32)
