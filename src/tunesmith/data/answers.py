"""Pairs and rankings -> samples: every answer with its prompt, cut alike, kept together, ranked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.batch import Sample
from tunesmith.data.chat import Marks, Rendered, rendering
from tunesmith.data.kinds import Message, Pair, Ranking
from tunesmith.data.tokens import Work, merged


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest sample in tokens, and what is done to a record with a longer one."""

    max_length: int
    on_too_long: str


def encode_answers(
    record: Pair | Ranking, tokenizer: Any, marks: Marks, *, limits: Limits, tally: Counter[str]
) -> Work[list[Sample]]:
    """One sample per answer, of one group; only the answer has weight. `label` is (rank, margin): 1 is the best, and a
    pair's margin, 0 without one, says how much better its better answer is.

    A record is cut as a whole: `truncate_left` takes the same number of tokens from the prompt before every answer,
    so that they still answer the same prompt; `truncate_right` cuts the answers. A record that is not left with two
    answers that differ in rank and in tokens teaches nothing and is dropped and counted.
    """
    texts, ranks, margin = _of(record)
    earlier = tuple(replace(m, trained=False) if m.role == "assistant" else m for m in record.prompt)
    talks = ((*earlier, Message("assistant", text)) for text in texts)
    answers = yield from merged(rendering(talk, tokenizer, plain=record.plain, marks=marks) for talk in talks)
    longest = max(len(answer.ids) for answer in answers)
    start = 0
    if longest > limits.max_length:
        if limits.on_too_long == "error":
            tally["too_long"] += 1
        elif limits.on_too_long == "drop":
            return _dropped(tally, "dropped_too_long")
        else:
            tally["truncated"] += 1
            start = longest - limits.max_length if limits.on_too_long == "truncate_left" else 0
    labels = [(float(rank), margin) for rank in ranks]
    return _samples(answers, labels, record.origin, start, limits, tally)


def _of(record: Pair | Ranking) -> tuple[tuple[str, ...], tuple[int, ...], float]:
    if isinstance(record, Pair):
        return (record.chosen, record.rejected), (1, 2), record.margin or 0.0
    return record.completions, record.ranks, 0.0


def _samples(
    answers: Sequence[Rendered],
    labels: Sequence[tuple[float, float]],
    origin: str,
    start: int,
    limits: Limits,
    tally: Counter[str],
) -> list[Sample]:
    end = None if limits.on_too_long in ("error", "truncate_left") else limits.max_length
    made = []
    for answer, label in zip(answers, labels, strict=True):
        prompt = answer.trained.index(True) if True in answer.trained else len(answer.ids)
        ids = np.asarray(answer.ids[start:end], np.int32)
        weights = np.asarray(answer.trained[start:end], np.float32)
        tally["tokens_lost"] += len(answer.ids) - len(ids)
        if start >= prompt or not weights.any():
            return _dropped(tally, "dropped_no_answer_left")
        weights[0] = 0.0
        made.append(Sample(ids, weights, label=label, group=0, origin=origin))
    if not any(a.label != b.label and not np.array_equal(a.ids, b.ids) for a in made for b in made):
        return _dropped(tally, "dropped_nothing_to_compare")
    return made


def _dropped(tally: Counter[str], why: str) -> list[Sample]:
    tally[why] += 1
    return []
