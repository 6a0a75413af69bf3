"""LanguageModel: Batch -> log-probs of the targets that count, causal and masked alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.batch import Batch, Outputs
from tunesmith.model.heads import language_head
from tunesmith.model.packing import Layout, choose_layout, flat_hidden, own_logits, position_offset
from tunesmith.ops import chunked_logprobs


class LanguageModel(nn.Module):
    """A transformers language model that answers with per-token log-probs, computed only where `weights > 0`.

    `layout` is how segments reach the backbone and `why` says why it is not packed. No `[T, V]` tensor leaves
    the forward; packed, none exists.
    """

    def __init__(self, backbone: Any, *, causal: bool = True, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone = backbone
        self.causal = causal
        self.compute = compute
        self.offset = position_offset(backbone)
        self._head = language_head(backbone, causal=causal)
        self.layout, self.why = choose_layout(backbone, None if self._head is None else self._packed_logits)

    def forward(self, batch: Batch) -> Outputs:
        """`Outputs.logprobs [B, T]`, nats, 0 where the weight is 0."""
        counted = batch.weights > 0
        device, low = batch.input_ids.device.type, self.compute != torch.float32
        with torch.autocast(device, self.compute, enabled=low):
            if self.layout is Layout.PACKED:
                values = self._packed_logprobs(batch, counted)
            else:
                logits = own_logits(self.backbone, batch, self.layout)[counted[batch.segments >= 0]]
                values = logits.float().log_softmax(-1).gather(1, batch.targets[counted][:, None])[:, 0]
        logprobs = torch.zeros(batch.weights.shape, dtype=torch.float32, device=values.device)
        return Outputs(logprobs=logprobs.masked_scatter(counted, values.float()))

    def _packed_logprobs(self, batch: Batch, counted: Tensor) -> Tensor:
        assert self._head is not None
        hidden = flat_hidden(self.backbone, batch, causal=self.causal, offset=self.offset)[counted[0]]
        return self._target_logprobs(self._head.transform(hidden), batch.targets[counted])

    def _target_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = self._head
        assert head is not None
        decoder = head.decoder
        if type(decoder) is nn.Linear:
            return chunked_logprobs(
                hidden, decoder.weight, decoder.bias, targets, scale=head.scale, softcap=head.softcap
            )
        parts = zip(hidden.split(512), targets.split(512), strict=True)
        return torch.cat([_checkpointed(self._wrapped_head, h, t) for h, t in parts] or [hidden.new_zeros(0)])

    def _wrapped_head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """A head that carries an adapter: computed in parts, and again in the backward."""
        return self._logits(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._head
        assert head is not None
        logits = head.decoder(hidden) * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def _packed_logits(self, batch: Batch) -> Tensor:
        assert self._head is not None
        hidden = flat_hidden(self.backbone, batch, causal=self.causal, offset=self.offset)
        return self._logits(self._head.transform(hidden))


def _checkpointed(function: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return checkpoint(function, hidden, targets, use_reentrant=False)  # type: ignore[no-any-return]
