"""ScoreModel: Batch -> one vector of scores per segment, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch, Outputs
from tunesmith.model.heads import pool, score_head
from tunesmith.model.packing import Layout, choose_layout, flat_hidden, layout_for, own_logits, position_offset


class ScoreModel(nn.Module):
    """A transformers sequence classifier over packed segments. A decoder's score is read at the last real token.

    A model with one score (a reward model) has a `shift` that is taken off every score; it also stands in the
    backbone's config, so that it goes with the model when that is exported.
    """

    def __init__(self, backbone: Any, *, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone = backbone
        self.compute = compute
        self.offset = position_offset(backbone)
        self.shift: Tensor | None
        self.register_buffer("shift", _shift_of(backbone))
        self._head = score_head(backbone)
        self.causal = self._head is not None and self._head.pool == "last"
        self.layout, self.why = choose_layout(backbone, None if self._head is None else self._packed_scores)

    def forward(self, batch: Batch) -> Outputs:
        """`Outputs.scores [S, C]` fp32."""
        low = self.compute != torch.float32
        with torch.autocast(batch.input_ids.device.type, self.compute, enabled=low):
            layout = layout_for(self.backbone, self.layout, batch)
            packed = layout is Layout.PACKED
            scores = self._packed_scores(batch) if packed else own_logits(self.backbone, batch, layout)
        scores = scores.float()
        return Outputs(scores=scores if self.shift is None else scores - self.shift)

    def set_shift(self, shift: float) -> None:
        """Take `shift` off every score from now on."""
        assert self.shift is not None, "only a model with one score is shifted"
        self.shift.fill_(shift)
        self.backbone.config.reward_shift = shift

    def _packed_scores(self, batch: Batch) -> Tensor:
        assert self._head is not None
        hidden = flat_hidden(self.backbone, batch, causal=self.causal, offset=self.offset)
        return self._head.apply(pool(hidden, batch.lengths, self._head.pool))


def _shift_of(backbone: Any) -> Tensor | None:
    """fp32 `[]`, 0 before calibration; None for a classifier."""
    if backbone.config.num_labels != 1:
        return None
    return torch.tensor(float(getattr(backbone.config, "reward_shift", 0.0)), device=backbone.device)
