"""LanguageModel: Batch -> log-probs of the targets that count, causal and masked alike; as a policy, entropies too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.batch import Batch, Outputs
from tunesmith.model.critic import ValueHead
from tunesmith.model.heads import language_head
from tunesmith.model.packing import (
    Layout,
    choose_layout,
    flat_hidden,
    layout_for,
    own_logits,
    position_offset,
    segment_hidden,
)
from tunesmith.ops import chunked_logprobs
from tunesmith.ops_policy import chunked_policy, policy_answer


@dataclass(frozen=True, slots=True)
class Policy:
    """How a language model acts: its distribution's temperature, and whether its entropy is learned or measured."""

    temperature: float = 1.0
    learn_entropy: bool = False


class LanguageModel(nn.Module):
    """A transformers language model that answers with per-token log-probs, computed only where `weights > 0`.

    `layout` is how segments reach the backbone and `why` says why it is not packed. No `[T, V]` tensor leaves
    the forward; packed, none exists. With a `policy` the answer holds entropies, and log-probs are those at its
    temperature; with a `critic` (`model/critic.py`) it holds values, so that one loop trains both.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        causal: bool = True,
        compute: torch.dtype = torch.float32,
        policy: Policy | None = None,
        critic: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.causal = causal
        self.compute = compute
        self.policy = policy
        self.critic = critic
        self.offset = position_offset(backbone)
        self._head = language_head(backbone, causal=causal)
        self._rounded: tuple[tuple[int, int], Tensor, Tensor] | None = None
        self.layout, self.why = choose_layout(backbone, None if self._head is None else self._packed_logits)

    @property
    def temperature(self) -> float:
        """What logits are divided by before they are probabilities; 1 unless a policy says otherwise."""
        return 1.0 if self.policy is None else self.policy.temperature

    def forward(self, batch: Batch, *, values: bool = True) -> Outputs:
        """`Outputs.logprobs [B, T]`, nats, 0 where the weight is 0, and a policy's `entropy` likewise; a critic's
        `values` of all tokens unless they are not wanted."""
        counted = batch.weights > 0
        device, low = batch.input_ids.device.type, self.compute != torch.float32
        with torch.autocast(device, self.compute, enabled=low):
            layout = layout_for(self.backbone, self.layout, batch)
            if layout is Layout.PACKED:
                assert self._head is not None
                hidden = flat_hidden(self.backbone, batch, causal=self.causal, offset=self.offset)
                logprobs, entropy = self._answer(self._head.transform(hidden[counted[0]]), batch.targets[counted])
            else:
                hidden, logits = None, own_logits(self.backbone, batch, layout)
                logprobs, entropy = self._of_logits(logits[counted[batch.segments >= 0]], batch.targets[counted])
            return Outputs(
                logprobs=_spread(logprobs, counted),
                entropy=None if entropy is None else _spread(entropy, counted),
                values=self._values(batch, hidden) if values else None,
            )

    def _values(self, batch: Batch, hidden: Tensor | None) -> Tensor | None:
        if isinstance(self.critic, ValueHead):
            if hidden is None:
                hidden = segment_hidden(self.backbone, batch, self.layout, causal=self.causal, offset=self.offset)
            return self.critic(hidden, batch)
        return None if self.critic is None else self.critic(batch)

    def _answer(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probs and, for a policy, entropies `[N]` from `hidden [N, D]`."""
        head = self._head
        assert head is not None
        decoder = head.decoder
        if type(decoder) is not nn.Linear:
            pieces = zip(hidden.split(512), targets.split(512), strict=True)
            parts = [_checkpointed(self._wrapped_head, h, t) for h, t in pieces]
            entropies = [entropy for _, entropy in parts if entropy is not None]
            logprobs = torch.cat([part for part, _ in parts] or [hidden.new_zeros(0)])
            return logprobs, None if self.policy is None else torch.cat(entropies or [logprobs])
        weight, shape = self._narrow(decoder.weight), {"scale": head.scale, "softcap": head.softcap}
        if self.policy is None:
            return chunked_logprobs(hidden, weight, decoder.bias, targets, **shape), None
        return chunked_policy(
            hidden, weight, decoder.bias, targets, **shape,
            temperature=self.policy.temperature, learn_entropy=self.policy.learn_entropy,
        )  # fmt: skip

    def _narrow(self, weight: Tensor) -> Tensor:
        """A head in the type of its products. A frozen one, which embeddings may share, is rounded once and kept."""
        if weight.requires_grad or weight.dtype == self.compute or not torch.is_autocast_enabled(weight.device.type):
            return weight
        held, kept = weight.detach(), self._rounded
        key = (held.untyped_storage()._cdata, weight._version)  # `.data = other` changes the one, writing the other
        if kept is None or kept[0] != key:
            self._rounded = kept = (key, held, held.to(self.compute))
        return kept[2]

    def _of_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.policy is None:
            return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0], None
        return policy_answer(logits, targets, self.policy.temperature, self.policy.learn_entropy)

    def _wrapped_head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """A head that carries an adapter: computed in parts, and again in the backward."""
        return self._of_logits(self._logits(hidden), targets)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._head
        assert head is not None
        logits = head.decoder(hidden) * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def _packed_logits(self, batch: Batch) -> Tensor:
        assert self._head is not None
        hidden = flat_hidden(self.backbone, batch, causal=self.causal, offset=self.offset)
        return self._logits(self._head.transform(hidden))


def _spread(values: Tensor, counted: Tensor) -> Tensor:
    """Values where `counted`, 0 elsewhere, `[B, T]` fp32."""
    rows = torch.zeros(counted.shape, dtype=torch.float32, device=values.device)
    return rows.masked_scatter(counted, values.float())


def _checkpointed(function: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    return checkpoint(function, hidden, targets, use_reentrant=False)  # type: ignore[no-any-return]
