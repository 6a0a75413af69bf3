"""Pairs and rankings of answers: as text, as messages, as whole dialogues."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tunesmith.data.cells import check_text, number_at, text_at, value_at
from tunesmith.data.kinds import Message, Pair, Ranking
from tunesmith.data.rows import Row, RowError
from tunesmith.data.survey import kind_of_value
from tunesmith.data.turns import asked, check_prompt, messages_of

_TURN = re.compile(r"\n\n(Human|Assistant):")


def preference(row: Row, columns: Mapping[str, str]) -> Pair:
    prompt = asked(row, columns, "prompt") if "prompt" in columns else ()
    chosen, rejected = columns["chosen"], columns["rejected"]
    margin = _margin(row, columns)
    if kind_of_value(row.values.get(chosen)) in ("messages", "turns"):
        better = messages_of(value_at(row, chosen), chosen)
        worse = messages_of(value_at(row, rejected), rejected)
        return replace(_split_pair(prompt, better, worse, row.origin), margin=margin)
    if not prompt:
        raise RowError("there is no prompt", "add a prompt column")
    return replace(pair_of(prompt, text_at(row, chosen), text_at(row, rejected), row.origin), margin=margin)


def _margin(row: Row, columns: Mapping[str, str]) -> float | None:
    """How much better the chosen answer is, if the row has it."""
    value = row.values.get(columns.get("margin", ""))
    if value in (None, ""):
        return None
    number = number_at(value, columns["margin"])
    if number < 0:
        raise RowError(f"{columns['margin']!r} is {number:g}", "a margin is 0 or more; swap chosen and rejected")
    return number


def ranking(row: Row, columns: Mapping[str, str]) -> Ranking:
    prompt = asked(row, columns, "prompt")
    check_prompt(prompt)
    column = columns["completions"]
    texts = value_at(row, column)
    if not isinstance(texts, list | tuple) or len(texts) < 2:
        raise RowError(f"{column!r} is no list of at least two answers", 'write ["...", "..."]')
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"{column!r}: answer {number} is no text or empty", "write it or leave it and its rank out")
        check_text(text, column)
    ranks = _ranks(row, columns, len(texts))
    return Ranking(prompt, tuple(texts), ranks, row.origin)


def _ranks(row: Row, columns: Mapping[str, str], count: int) -> tuple[int, ...]:
    """1 for the best, ties equal: from one rank (or one score, more being better) for each answer, or, as lists of
    their numbers from 0, from the answers in their order."""
    role = "ranks" if "ranks" in columns else "scores"
    column = columns[role]
    value = value_at(row, column)
    advice = (
        f"write one number for each of the {count} answers, {'1 for the best' if role == 'ranks' else 'more is better'}"
    )
    if not isinstance(value, list | tuple):
        raise RowError(f"{column!r} is no list", advice)
    if role == "ranks" and value and all(isinstance(tied, list | tuple) for tied in value):
        return _from_order(value, count, column)
    if len(value) != count:
        raise RowError(f"{column!r} has {len(value)} entries for {count} answers", advice)
    numbers = [number_at(item, column) for item in value]
    if role == "scores":
        return tuple(1 + sum(other > mine for other in numbers) for mine in numbers)
    if any(number < 1 or number != int(number) for number in numbers):
        raise RowError(f"{column!r} holds {min(numbers):g}; ranks are whole numbers from 1", advice)
    return tuple(int(number) for number in numbers)


def _from_order(groups: Sequence[Sequence[object]], count: int, column: str) -> tuple[int, ...]:
    """Ranks from `[[best], [tied, tied], [worst]]`, answers by their number from 0."""
    flat = [index for tied in groups for index in tied]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in flat) or sorted(flat) != list(range(count)):  # type: ignore[type-var]
        raise RowError(f"{column!r} does not name each of the {count} answers once", "write [[2], [0, 1]]: best first")
    ranks = [0] * count
    for rank, tied in enumerate(groups, start=1):
        for index in tied:
            ranks[index] = rank  # type: ignore[call-overload]
    return tuple(ranks)


def pair_of(prompt: tuple[Message, ...], chosen: str, rejected: str, origin: str) -> Pair:
    check_prompt(prompt)
    return Pair(prompt, chosen, rejected, origin)


def _split_pair(
    prompt: tuple[Message, ...], better: tuple[Message, ...], worse: tuple[Message, ...], origin: str
) -> Pair:
    for name, messages in (("chosen", better), ("rejected", worse)):
        if messages[-1].role != "assistant":
            raise RowError(f"{name!r} does not end with the assistant's answer", "cut it after an answer")
    if better[:-1] != worse[:-1]:
        raise RowError("'chosen' and 'rejected' differ before the last answer", "both must answer the same prompt")
    before = better[:-1]
    if prompt and before[: len(prompt)] != prompt:
        before = (*prompt, *before)
    if not before:
        raise RowError("there is no prompt", "put the user's message before the answers")
    return pair_of(before, better[-1].content, worse[-1].content, origin)


def dialogue_pair(row: Row, columns: Mapping[str, str]) -> Pair:
    better = _dialogue(text_at(row, columns["chosen"]), columns["chosen"])
    worse = _dialogue(text_at(row, columns["rejected"]), columns["rejected"])
    return _split_pair((), better, worse, row.origin)


def _dialogue(text: str, column: str) -> tuple[Message, ...]:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...` as messages."""
    head, *turns = _TURN.split(text if text.startswith("\n\n") else f"\n\n{text.lstrip()}")
    if head.strip() or len(turns) < 2:
        raise RowError(f"{column!r} is no dialogue of 'Human:' and 'Assistant:' turns", "add a prompt column")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [Message(roles[who], said.strip()) for who, said in zip(turns[::2], turns[1::2], strict=True)]
    for number, message in enumerate(messages, start=1):
        if not message.content:
            raise RowError(f"{column!r}: turn {number} ({message.role}) is empty", "write it or leave the row out")
    return tuple(messages)
