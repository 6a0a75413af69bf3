"""ScoreModel: Batch -> one vector of scores per segment, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch, Outputs
from tunesmith.errors import ModelError
from tunesmith.model.features import FeatureTable
from tunesmith.model.heads import pool, score_head
from tunesmith.model.packing import (
    Layout,
    choose_layout,
    evaluating,
    flat_hidden,
    layout_for,
    own_logits,
    position_offset,
    probe_batch,
    same_logits,
    segment_hidden,
)


class ScoreModel(nn.Module):
    """A transformers sequence classifier over packed segments. A decoder's score is read at the last real token.

    A model with one score (a reward model) has a `shift` that is taken off every score; it also stands in the
    backbone's config, so that it goes with the model when that is exported. A model that is given `features` scores
    the texts in them by its head alone.
    """

    def __init__(self, backbone: Any, *, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone = backbone
        self.compute = compute
        self.features: FeatureTable | None = None
        self.offset = position_offset(backbone)
        self.shift: Tensor | None
        self.register_buffer("shift", _shift_of(backbone))
        self._head = score_head(backbone)
        self.causal = self._head is not None and self._head.pool == "last"
        self.layout, self.why = choose_layout(backbone, None if self._head is None else self._packed_scores)

    def forward(self, batch: Batch) -> Outputs:
        """`Outputs.scores [S, C]` fp32."""
        with self._autocast(batch):
            layout = layout_for(self.backbone, self.layout, batch)
            if self.features is not None:
                scores = self._kept_scores(batch, self.features)
            elif layout is Layout.PACKED:
                scores = self._packed_scores(batch)
            else:
                scores = own_logits(self.backbone, batch, layout)
        scores = scores.float()
        return Outputs(scores=scores if self.shift is None else scores - self.shift)

    def pooled(self, batch: Batch) -> Tensor:
        """What enters the head, one vector a segment `[S, D]` fp32, without dropout and gradients.

        `ModelError` when the head has a structure not known here.
        """
        if self._head is None:
            raise ModelError(_NOT_POOLED.format(kind=type(self.backbone).__name__, why=self.why))
        with evaluating(self.backbone), self._autocast(batch):
            hidden = segment_hidden(self.backbone, batch, self.layout, causal=self.causal, offset=self.offset)
            return pool(hidden, batch.lengths, self._head.pool).float()

    def check_pooled(self) -> None:
        """Prove that the head over `pooled` gives the family's own scores, which a packed row has proven at load.

        `ModelError` when it does not.
        """
        if self.layout is Layout.PACKED:
            return
        batch = probe_batch(self.backbone).to(self.backbone.device)
        with evaluating(self.backbone), self._autocast(batch):
            ours = None if self._head is None else self._head.apply(self.pooled(batch))
            if ours is None or not same_logits(ours, own_logits(self.backbone, batch, Layout.ALONE)):
                raise ModelError(_NOT_POOLED.format(kind=type(self.backbone).__name__, why=self.why))

    def set_shift(self, shift: float) -> None:
        """Take `shift` off every score from now on."""
        assert self.shift is not None, "only a model with one score is shifted"
        self.shift.fill_(shift)
        self.backbone.config.reward_shift = shift

    def _autocast(self, batch: Batch) -> torch.autocast:
        return torch.autocast(batch.input_ids.device.type, self.compute, enabled=self.compute != torch.float32)

    def _kept_scores(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Texts that are not among the features pass through the body as the others once did."""
        assert self._head is not None, "features are of a head that is known"
        found = features.of(batch)
        return self._head.apply(self.pooled(batch) if found is None else found)

    def _packed_scores(self, batch: Batch) -> Tensor:
        assert self._head is not None
        hidden = flat_hidden(self.backbone, batch, causal=self.causal, offset=self.offset)
        return self._head.apply(pool(hidden, batch.lengths, self._head.pool))


_NOT_POOLED = "tune.cache_features keeps what enters the head; in {kind} that is not known ({why}). Leave it out"


def _shift_of(backbone: Any) -> Tensor | None:
    """fp32 `[]`, 0 before calibration; None for a classifier."""
    if backbone.config.num_labels != 1:
        return None
    return torch.tensor(float(getattr(backbone.config, "reward_shift", 0.0)), device=backbone.device)
