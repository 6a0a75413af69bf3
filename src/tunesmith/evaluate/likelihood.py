"""How well a model predicts held-out text: nats, tokens and bytes of every row, and the metrics made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tunesmith.batch import Batch, Sample
from tunesmith.evaluate.intervals import Array, Estimate, Statistic, bootstrap, ratio
from tunesmith.model.packing import evaluating
from tunesmith.ops import segment_sums

Collate = Callable[[Sequence[Sample]], Batch]


class Samples(Protocol):
    """What evaluation asks of a store."""

    @property
    def lengths(self) -> Any:
        """Tokens of every sample, `[n]`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True, slots=True)
class LikelihoodResult:
    """`nats tokens bytes [n]`, a row each: cost of the targets, their weight, and the UTF-8 bytes they stand for.

    `bytes` are 0 when no table of bytes was given, and then there is no `bits_per_byte`.
    """

    nats: Array
    tokens: Array
    bytes: Array
    origins: tuple[str, ...] = ()

    def statistics(self) -> dict[str, Statistic]:
        """`loss` (nats per target), `perplexity` = e^loss, `bits_per_byte` = nats / ln 2 / bytes."""
        cost = np.stack([self.nats, self.tokens], 1)
        found = {
            "loss": Statistic("loss", cost, ratio),
            "perplexity": Statistic("perplexity", cost, _perplexity),
        }
        if self.bytes.sum() > 0:
            per_byte = np.stack([self.nats / math.log(2), self.bytes], 1)
            found["bits_per_byte"] = Statistic("bits_per_byte", per_byte, ratio)
        return found

    def metrics(self, *, seed: int = 0) -> dict[str, Estimate]:
        """Every metric with its 95 % interval over rows."""
        return {name: bootstrap(statistic, seed=seed) for name, statistic in self.statistics().items()}

    def worst(self, num: int = 10) -> list[tuple[str, float]]:
        """The rows that cost most per target: (origin, nats per target)."""
        mean = self.nats / np.maximum(self.tokens, 1e-12)
        order = np.argsort(-mean, kind="stable")[:num]
        return [(self.origins[i] if self.origins else str(i), float(mean[i])) for i in order]


def _perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def evaluate_likelihood(
    model: nn.Module,
    store: Samples,
    *,
    collate: Collate,
    max_tokens: int = 8192,
    device: torch.device | str = "cpu",
    token_bytes: Array | None = None,
) -> LikelihoodResult:
    """Score every sample of `store` under `model` (`LanguageModel`), gradients and dropout off.

    `token_bytes [V]`, from `bytes_of_tokens`, says how many bytes a token stands for; a batch holds at most
    `max_tokens` (a longer sample goes alone). Batches depend on the lengths alone, so before and after see the same.
    """
    nats, tokens, size = (np.zeros(len(store)) for _ in range(3))
    origins = [""] * len(store)
    with evaluating(model):
        for indices in token_batches(store.lengths, max_tokens):
            batch = collate([store[i] for i in indices])
            moved = batch.to(device)
            logprobs = model(moved).logprobs.double()
            weights = batch.weights.double()
            cost = segment_sums(-(moved.weights * logprobs), moved.segments, batch.num_segments)
            nats[indices] = cost.cpu().numpy()
            tokens[indices] = segment_sums(weights, batch.segments, batch.num_segments).numpy()
            if token_bytes is not None:
                counted = torch.from_numpy(token_bytes)[batch.targets] * (batch.weights > 0)
                size[indices] = segment_sums(counted, batch.segments, batch.num_segments).numpy()
            for i, origin in zip(indices, batch.origins, strict=False):
                origins[i] = origin
    return LikelihoodResult(nats, tokens, size, tuple(origins))


def token_batches(lengths: Any, max_tokens: int) -> list[list[int]]:
    """All indices, longest first, in groups whose lengths add up to at most `max_tokens`."""
    sizes = np.asarray(lengths)
    groups: list[list[int]] = []
    filled = max_tokens + 1
    for i in np.argsort(-sizes, kind="stable").tolist():
        if filled + sizes[i] > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += int(sizes[i])
    return groups


def bytes_of_tokens(tokenizer: Any, vocabulary: int | None = None) -> Array:
    """UTF-8 bytes that each token stands for, `[V]`; special tokens stand for none.

    Byte-level vocabularies spell one character a byte; others spell text, with ▁ for a space, <0x0A> for a byte
    and ## for a word piece that goes on. There, a character the vocabulary lacks counts no bytes, and the space that
    some tokenizers put before a text counts one.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    byte_level = _is_byte_level(tokenizer)
    table = np.zeros(max(vocabulary or 0, len(names)))
    for i, name in enumerate(names):
        if name is not None and i not in special:
            table[i] = len(name) if byte_level and i not in tokenizer.added_tokens_decoder else _spelled_bytes(name)
    return table


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = "" if backend is None else f"{backend.decoder!r} {backend.pre_tokenizer!r}"
    return "ByteLevel" in parts


def _spelled_bytes(name: str) -> int:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return 1
    return len(name.removeprefix("##").replace("▁", " ").encode("utf-8", "surrogatepass"))
