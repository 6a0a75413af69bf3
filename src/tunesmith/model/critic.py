"""Critics: Batch -> the value of every state, from a backbone of their own or from the policy's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.errors import ModelError
from tunesmith.model.heads import score_head
from tunesmith.model.packing import choose_layout, flat_hidden, position_offset, segment_hidden


class Critic(nn.Module):
    """A causal sequence classifier with one score, read at every token instead of the last.

    The value at position t is that of the state in which the token after t is chosen: it sees t and what stands
    before it. InstructGPT starts it from the reward model (2203.02155, C.4).
    """

    def __init__(self, backbone: Any, *, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        head = score_head(backbone)
        if head is None or head.pool != "last":
            raise ModelError(
                f"{type(backbone).__name__} reads its score from a whole text, so it cannot value a state halfway; "
                "take a causal reward model for the critic, or ppo.critic: base"
            )
        self.backbone = backbone
        self.compute = compute
        self.offset = position_offset(backbone)
        self._score = head.apply
        self.layout, _ = choose_layout(backbone, self._packed_scores)

    def forward(self, batch: Batch) -> Tensor:
        """Values `[B, T]` fp32, 0 on padding."""
        with torch.autocast(batch.input_ids.device.type, self.compute, enabled=self.compute != torch.float32):
            hidden = segment_hidden(self.backbone, batch, self.layout, causal=True, offset=self.offset)
            values = self._score(hidden)[:, 0]
        return _placed(values, batch)

    def _packed_scores(self, batch: Batch) -> Tensor:
        ends = torch.tensor(batch.lengths, device=batch.input_ids.device).cumsum(0) - 1
        return self._score(flat_hidden(self.backbone, batch, causal=True, offset=self.offset)[ends])


class ValueHead(nn.Module):
    """A linear head on the policy's own last hidden states; it starts at 0, so that every first value is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Values `[B, T]` fp32 from `hidden [tokens, D]`."""
        return _placed(self.linear(hidden.to(self.linear.weight.dtype))[:, 0], batch)


def _placed(values: Tensor, batch: Batch) -> Tensor:
    real = batch.segments >= 0
    return torch.zeros(real.shape, dtype=torch.float32, device=values.device).masked_scatter(real, values.float())
