"""Records -> samples: which tokens there are, which of them count, and what happens to a row that is too long."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from tunesmith.batch import Sample
from tunesmith.data.answers import Limits, encode_answers
from tunesmith.data.chat import Marks, marks_of, prompt_ids, rendering
from tunesmith.data.kinds import Chat, Labelled, Pair, Ranking, Record, Text
from tunesmith.data.tokens import Asked, Ids, Work, alone, together
from tunesmith.errors import DataError

POLICIES = ("error", "truncate_left", "truncate_right", "split", "drop")


@dataclass(slots=True)
class Encoder:
    """record -> samples for one stage. `tally` counts what was done to rows longer than `max_length` tokens.

    `truncated` and `split` count rows, `tokens_lost` the tokens that truncation cut off; `dropped_too_long`,
    `dropped_no_answer_left`, `dropped_nothing_to_predict` and `dropped_nothing_to_compare` (answers that are all the
    same or all tied) count rows of which no sample is left.

    `mask_prompt`: only answers are trained on. `label_names` are the classes in their order; unknown labels are a
    `DataError`. Under the policy `error` a row that is too long is encoded as it is and counted: who collects the
    samples refuses them all at once, with the lengths that would do.
    """

    tokenizer: Any
    stage: str
    max_length: int
    on_too_long: str = "error"
    mask_prompt: bool = True
    label_names: tuple[str, ...] = ()
    multi_label: bool = False
    tally: Counter[str] = field(default_factory=Counter)
    _marks: Marks = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.on_too_long in POLICIES, self.on_too_long
        self._marks = marks_of(self.tokenizer)
        around = len(self._marks.before) + len(self._marks.after) if self.stage in ("classify", "mlm") else 1
        if self.max_length <= around:
            raise DataError(f"data.max_length is {self.max_length}; a row needs at least {around + 1} tokens here, "
                            f"special tokens included")  # fmt: skip

    def __call__(self, record: Record) -> list[Sample]:
        """The record's samples: usually one, several when split, none when dropped."""
        return alone(self.encoding(record), self.tokenizer)

    def many(self, records: Iterable[Record]) -> Iterator[list[Sample]]:
        """The samples of each record, the same as of a call for each, in less time: texts are encoded together."""
        return together(map(self.encoding, records), self.tokenizer)

    def encoding(self, record: Record) -> Work[list[Sample]]:
        """The record's samples as a work, which can be done together with others."""
        try:
            return (yield from self._encode(record))
        except DataError as error:
            raise DataError(f"{record.origin}: {error}") from None

    def _encode(self, record: Record) -> Work[list[Sample]]:
        if isinstance(record, Chat):
            return self._chat(record)
        if isinstance(record, Labelled) and self.stage == "classify":
            return self._labelled(record)
        if isinstance(record, Pair | Ranking) and self.stage in ("reward", "dpo"):
            limits = Limits(self.max_length, self.on_too_long)
            return encode_answers(record, self.tokenizer, self._marks, limits=limits, tally=self.tally)
        text = record.text if isinstance(record, Text | Labelled) else None
        if text is None:
            raise DataError(f"stage {self.stage} cannot train on a {type(record).__name__} row")
        return self._masked_text(text, record.origin) if self.stage == "mlm" else self._text(text, record.origin)

    @property
    def key(self) -> str:
        """What the samples depend on beside the records: tokenizer and settings, as a hash."""
        parts = [
            tokenizer_hash(self.tokenizer), self.stage, self.max_length, self.on_too_long, self.mask_prompt,
            list(self.label_names), self.multi_label,
        ]  # fmt: skip
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _text(self, text: str, origin: str) -> Work[list[Sample]]:
        """Every token but the first is a target, the end token too."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        (body,) = yield [Asked(text)]
        ids = [*self._marks.bos, *body, *end]
        weights = [0.0] + [1.0] * (len(ids) - 1)
        return self._fit(ids, weights, origin)

    def _masked_text(self, text: str, origin: str) -> Work[list[Sample]]:
        """Weights mark what may be masked; special tokens stand round every part. A part of nothing but special tokens
        (`<unk>` is one) has nothing to mask, and is left out."""
        (body,) = yield [Asked(text)]
        before, after = self._marks.before, self._marks.after
        if not body:
            return self._left_out("dropped_nothing_to_predict")
        room = self.max_length - len(before) - len(after)
        special = set(self.tokenizer.all_special_ids)
        samples = []
        for part in self._cut(body, room):
            if special.issuperset(part):
                self.tally["dropped_nothing_to_predict"] += 1
                continue
            ids = [*before, *part, *after]
            weights = [0.0] * len(before) + [1.0] * len(part) + [0.0] * len(after)
            weights[0] = 0.0
            samples.append(_sample(ids, weights, origin))
        return samples

    def _labelled(self, record: Labelled) -> Work[list[Sample]]:
        """The text, or pair of texts, with the tokenizer's special tokens; cut so that these stay."""
        (ids,) = yield [Asked(record.text, record.text_pair, special=True)]
        if len(ids) > self.max_length and self.on_too_long != "error":
            if self.on_too_long == "drop":
                return self._left_out("dropped_too_long")
            before, after = self._marks.before, self._marks.after
            inner = ids[len(before) : len(ids) - len(after)]
            kept = self._truncated(inner, self.max_length - len(before) - len(after))
            ids = [*before, *kept, *after]
        elif len(ids) > self.max_length:
            self.tally["too_long"] += 1
        if not ids:
            raise DataError("no token is left of this text")
        return [_sample(ids, [0.0] * len(ids), record.origin, self._label(record.label))]

    def _label(self, label: str | tuple[str, ...]) -> int | tuple[float, ...]:
        found = (label,) if isinstance(label, str) else label
        unknown = [name for name in found if name not in self.label_names]
        if unknown:
            raise DataError(
                f"the label {', '.join(map(repr, unknown))} is unknown; known are {', '.join(self.label_names)}"
            )
        if self.multi_label:
            return tuple(1.0 if name in found else 0.0 for name in self.label_names)
        if len(found) != 1:
            raise DataError(f"{len(found)} labels where one is wanted; set data.multi_label: true for several")
        return self.label_names.index(found[0])

    def _chat(self, record: Chat) -> Work[list[Sample]]:
        rendered = yield from rendering(
            record.messages, self.tokenizer, tools=record.tools, plain=record.plain, marks=self._marks
        )
        trained = rendered.trained if self.mask_prompt else [True] * len(rendered.ids)
        weights = [1.0 if on else 0.0 for on in trained]
        weights[0] = 0.0
        if not any(weights):
            raise DataError("no token of this row would be trained on; it needs an assistant's answer")
        return [s for s in self._fit(rendered.ids, weights, record.origin) if self._still_trained(s)]

    def _still_trained(self, sample: Sample) -> bool:
        """Truncation may have cut the whole answer away."""
        kept = bool(sample.weights.any())
        if not kept:
            self.tally["dropped_no_answer_left"] += 1
        return kept

    def _fit(self, ids: list[int], weights: list[float], origin: str) -> list[Sample]:
        if len(ids) <= self.max_length:
            return [_sample(ids, weights, origin)] if len(ids) > 1 else self._left_out("dropped_nothing_to_predict")
        if self.on_too_long == "error":
            self.tally["too_long"] += 1
            return [_sample(ids, weights, origin)]
        if self.on_too_long == "drop":
            return self._left_out("dropped_too_long")
        if self.on_too_long == "split":
            return self._split(ids, weights, origin)
        cut = slice(-self.max_length, None) if self.on_too_long == "truncate_left" else slice(self.max_length)
        self._count_truncated(len(ids) - self.max_length)
        kept = weights[cut]
        kept[0] = 0.0
        return [_sample(ids[cut], kept, origin)]

    def _split(self, ids: list[int], weights: list[float], origin: str) -> list[Sample]:
        """Parts of at most `max_length`; a part begins with the token before it, so that no target is lost."""
        self.tally["split"] += 1
        samples, start = [], 0
        while start < len(ids) - 1:
            part, kept = ids[start : start + self.max_length], weights[start : start + self.max_length]
            kept[0] = 0.0
            samples.append(_sample(part, kept, origin))
            start += self.max_length - 1
        return samples

    def _cut(self, body: Ids, room: int) -> list[Ids]:
        if len(body) <= room:
            return [body]
        if self.on_too_long == "split":
            self.tally["split"] += 1
            return [body[i : i + room] for i in range(0, len(body), room)]
        if self.on_too_long == "drop":
            self._left_out("dropped_too_long")
            return []
        if self.on_too_long == "error":
            self.tally["too_long"] += 1
            return [body]
        return [self._truncated(body, room)]

    def _truncated(self, body: Ids, room: int) -> Ids:
        self._count_truncated(len(body) - room)
        return body[-room:] if self.on_too_long == "truncate_left" else body[:room]

    def _count_truncated(self, lost: int) -> None:
        self.tally["truncated"] += 1
        self.tally["tokens_lost"] += lost

    def _left_out(self, why: str) -> list[Sample]:
        self.tally[why] += 1
        return []


def _sample(
    ids: Sequence[int], weights: Sequence[float], origin: str, label: int | tuple[float, ...] | None = None
) -> Sample:
    return Sample(np.asarray(ids, np.int32), np.asarray(weights, np.float32), label=label, origin=origin)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of everything that decides how text becomes ids: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        rules,
        str(tokenizer.chat_template),
        json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}),
    ]
    return sha256("\0".join(parts).encode()).hexdigest()[:32]


__all__ = ["POLICIES", "Encoder", "prompt_ids", "tokenizer_hash"]
