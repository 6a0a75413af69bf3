"""PromptSet: what a policy answers, as ids with the rows they come from. Prompts are short, so they stay in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.data.chat import marks_of, prompting
from tunesmith.data.encode import tokenizer_hash
from tunesmith.data.kinds import Prompt
from tunesmith.data.naming import place
from tunesmith.data.tokens import Work, together
from tunesmith.errors import DataError

_LISTED = 20


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts by index: the record and its ids. As samples nothing in them is trained on."""

    records: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    fingerprint: str
    tally: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        ids = np.asarray(self.ids[index], np.int32)
        return Sample(ids, np.zeros(len(ids), np.float32), origin=self.origin(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def flat(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """(ids, weights) of the prompts from `start` to before `stop`, one behind the other."""
        ids = np.asarray([i for part in self.ids[start:stop] for i in part], np.int32)
        return ids, np.zeros(len(ids), np.float32)

    def origin(self, index: int) -> str:
        """Where the prompt stands, as `file:line`."""
        return self.records[index].origin

    def renamed(self, names: Mapping[str, str]) -> PromptSet:
        """The same prompts, with the files of their origins called by `names`."""
        return replace(self, records=tuple(replace(r, origin=place(r.origin, names)) for r in self.records))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt `[n]`."""
        return np.asarray([len(ids) for ids in self.ids], np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.ids))

    @property
    def num_targets(self) -> float:
        """Tokens trained on: none of a prompt's."""
        return 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the fields that some row has beside its prompt."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.columns))


def encode_prompts(
    records: Iterable[Any],
    tokenizer: Any,
    *,
    max_tokens: int,
    room: str,
    on_too_long: str,
    fingerprint: str,
    raw: bool = False,
) -> PromptSet:
    """The prompts of `records`, each as it stands before an answer at inference; `raw` as the bare text to go on with.

    A prompt of more than `max_tokens` tokens is a `DataError` that names `file:line` (`room` says where the limit
    comes from), or loses its beginning (`truncate_left`), its end (`truncate_right`) or its place (`drop`).
    """
    kept: list[tuple[Prompt, tuple[int, ...]]] = []
    too_long: list[str] = []
    tally = Counter[str]()
    marks = marks_of(tokenizer)

    def encoding(record: Prompt) -> Work[tuple[Prompt, tuple[int, ...]]]:
        ids = yield from prompting(record.messages, tokenizer, plain=record.plain, raw=raw, marks=marks)
        return record, tuple(ids)

    for record, ids in together(map(encoding, records), tokenizer):
        if not ids:
            raise DataError(f"{record.origin}: no token is left of this prompt")
        if len(ids) > max_tokens:
            if on_too_long == "error":
                too_long.append(f"{record.origin} ({len(ids):,} tokens)")
            tally["dropped_too_long" if on_too_long == "drop" else "truncated"] += 1
            tally["tokens_lost"] += len(ids) - (0 if on_too_long == "drop" else max_tokens)
            ids = ids[-max_tokens:] if on_too_long == "truncate_left" else ids[:max_tokens]
            if on_too_long == "drop":
                continue
        kept.append((record, ids))
    if too_long:
        raise DataError(_refused(too_long, max_tokens, room))
    parts = [fingerprint, tokenizer_hash(tokenizer), max_tokens, on_too_long, raw]
    name = sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return PromptSet(tuple(r for r, _ in kept), tuple(i for _, i in kept), name, dict(tally))


def _refused(too_long: Sequence[str], max_tokens: int, room: str) -> str:
    more = f" and {len(too_long) - _LISTED:,} more" if len(too_long) > _LISTED else ""
    return (
        f"{len(too_long):,} prompts have more than {max_tokens:,} tokens ({room}): {', '.join(too_long[:_LISTED])}"
        f"{more}; shorten them, lower sampling.max_tokens, or choose data.on_too_long: truncate_left, truncate_right "
        "or drop"
    )
