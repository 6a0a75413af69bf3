"""Figures of encoded samples from their arrays alone: lengths, what is trained on, ends, unknown tokens, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 20_000_000
"""Tokens looked at, from the first sample on: about a second. Lengths are those of every sample."""
_BLOCK_TOKENS = 2_000_000
KEPT_WHOLE = (95, 99, 100)
"""Shares of the rows, in per cent, for which the limit that keeps them whole is told."""


class Flat(Protocol):
    """Samples one behind the other; a `SampleStore` and a `PromptSet` give them."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def flat(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]: ...


@dataclass(slots=True)
class Scan:
    """Counts over the first `samples` of `of` samples.

    `tokens` are all, `plain` those that are no special token, `unknown` the tokenizer's unknown one. `trained` are
    targets with a weight, `answers` samples that have one, `ended` those of them whose last one is an end token.
    `doubled` samples begin with two begin tokens. `lengths` are all samples' own, in tokens.
    """

    of: int
    samples: int = 0
    tokens: int = 0
    plain: int = 0
    unknown: int = 0
    trained: int = 0
    answers: int = 0
    ended: int = 0
    doubled: int = 0
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def quantiles(self) -> dict[str, int]:
        """Tokens of a sample: the shortest, 5, 50, 95 and 99 % of them, the longest."""
        names = {"shortest": 0.0, "5 %": 0.05, "50 %": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}
        found = np.quantile(self.lengths, list(names.values()), method="inverted_cdf")
        return {name: int(value) for name, value in zip(names, found, strict=True)}

    def limits(self) -> list[dict[str, float]]:
        """What a limit of so many tokens costs: `share` of the rows stay whole, `tokens_cut` of all tokens are cut."""
        ordered = np.sort(self.lengths)
        total = max(1, int(ordered.sum()))
        rows = []
        for share in KEPT_WHOLE:
            limit = int(ordered[max(0, int(np.ceil(share / 100 * len(ordered))) - 1)])
            cut = int(np.maximum(ordered - limit, 0).sum())
            rows.append({"share": share / 100, "max_length": limit, "tokens_cut": cut / total})
        return rows


def scan(store: Flat, tokenizer: Any, ends: Sequence[int]) -> Scan:
    """The figures of `store`; `ends` are the tokens at which sampling stops."""
    lengths = np.asarray(store.lengths)
    found = Scan(len(lengths), lengths=lengths)
    special = np.unique(np.asarray([*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder], np.int64))
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    totals = np.cumsum(lengths)
    start = 0
    while start < len(lengths) and found.tokens < MAX_TOKENS:
        begun = int(totals[start] - lengths[start])
        stop = max(start + 1, int(np.searchsorted(totals, begun + _BLOCK_TOKENS, side="right")))
        ids, weights = store.flat(start, stop)
        starts = np.concatenate([[0], np.cumsum(lengths[start:stop])[:-1]])
        _ends(found, ids, weights, starts, ends)
        found.samples += stop - start
        found.tokens += len(ids)
        found.unknown += 0 if unknown is None else int((ids == unknown).sum())
        found.plain += int((~_isin(ids, special)).sum())
        found.doubled += 0 if bos is None else _doubled(ids, starts, lengths[start:stop], int(bos))
        start = stop
    return found


def _isin(ids: NDArray[Any], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which ids are among `wanted`, through a table: faster than sorting for few wanted ids."""
    table = np.zeros(int(max(ids.max(initial=0), wanted.max(initial=0))) + 1, bool)
    table[wanted] = True
    return table[ids]


def _ends(
    found: Scan, ids: NDArray[Any], weights: NDArray[Any], starts: NDArray[np.int64], ends: Sequence[int]
) -> None:
    """Count trained tokens, and the samples whose last one is an end token."""
    trained = weights > 0
    found.trained += int(trained.sum())
    if not trained.any():
        return
    last = np.maximum.reduceat(np.where(trained, np.arange(len(ids)), -1), starts)
    last = last[last >= 0]
    found.answers += len(last)
    found.ended += int(np.isin(ids[last], np.asarray(ends, np.int64)).sum())


def _doubled(ids: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], bos: int) -> int:
    longer = starts[lengths > 1]
    return int(((ids[longer] == bos) & (ids[longer + 1] == bos)).sum())


def end_ids(tokenizer: Any, turn_end: int | None) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's own and the chat template's."""
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, turn_end) if i is not None))
