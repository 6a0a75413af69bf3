"""A row of a recognised format -> a typed record; what is wrong with a row is said in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.data.records import Chat, Labelled, Message, Pair, Record, Text
from tunesmith.data.templates import TEMPLATES, Template

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
         "tool": "tool", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "function_response": "tool"}  # fmt: skip


class RowProblem(ValueError):
    """A row that cannot become a record."""


def to_record(
    value: Mapping[str, Any] | str,
    place: str,
    name: str,
    columns: Mapping[str, str],
    *,
    template: Template | None = None,
    multi_label: bool = False,
) -> Record:
    """The record of one row; `RowProblem` says why there is none."""
    if isinstance(value, str):
        return Text(_filled(value, "the text"), place)
    if name == "template":
        assert template is not None
        return _templated({c: _string(value, c) for c in template.columns}, template, place)
    if name == "labelled":
        pair = _string(value, columns["text_pair"]) if "text_pair" in columns else None
        return Labelled(_string(value, columns["text"]), _label(value, columns["label"], multi_label), place, pair)
    return _CONVERT[name](value, columns, place)


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise RowProblem(f"{what} is empty; fill it in or take the row out")
    return text


def _string(row: Mapping[str, Any], column: str, *, empty: bool = False) -> str:
    """A column's text; `empty` allows it to be missing, null or blank."""
    value = row.get(column)
    if value is None:
        if empty:
            return ""
        known = f"; the row has {', '.join(map(repr, row))}" if column not in row else ""
        raise RowProblem(f"{'the column ' + repr(column) + ' is missing' if column not in row else repr(column) + ' is null'}{known}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowProblem(f"{column!r} should be text, found {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowProblem(f"{column!r} is {value}; write text")
    return str(value) if empty else _filled(str(value), repr(column))


def _label(row: Mapping[str, Any], column: str, multi_label: bool) -> str | tuple[str, ...]:
    value = row.get(column)
    if isinstance(value, bool):
        value = str(value).lower()
    if not multi_label:
        if isinstance(value, list):
            raise RowProblem(f"{column!r} holds a list of labels; set data.multi_label: true")
        return _string({column: value} if column in row else {}, column).strip()
    if value is None:
        raise RowProblem(f"the column {column!r} is missing or null; an empty list means no label")
    items = value if isinstance(value, list) else [part for part in str(value).replace(";", ",").split(",")]
    return tuple(dict.fromkeys(str(item).strip() for item in items if str(item).strip()))


def _text(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    return Text(_string(row, columns["text"]), place)


def _templated(values: Mapping[str, str], template: Template, place: str) -> Chat:
    prompt, completion = template.render(values)
    return Chat((Message("user", prompt), Message("assistant", completion)), place, plain=True)


def _alpaca(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    instruction = _string(row, columns["instruction"])
    extra = _string(row, columns["input"], empty=True).strip() if "input" in columns else ""
    values = {"instruction": instruction, "input": extra, "output": _string(row, columns["output"])}
    return _templated(values, TEMPLATES["alpaca_input" if extra else "alpaca"], place)


def _pairs(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    prompt, completion = _string(row, columns["prompt"]), _string(row, columns["completion"])
    return Chat((Message("user", prompt), Message("assistant", completion)), place)


def _messages(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    return Chat(_conversation(row.get(columns["messages"]), "role", "content"), place)


def _sharegpt(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    return Chat(_conversation(row.get(columns["conversations"]), "from", "value"), place)


def _conversation(turns: Any, role_key: str, text_key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise RowProblem("the conversation is empty or not a list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn:
            raise RowProblem(f"turn {number} has no {role_key!r}")
        role = ROLES.get(str(turn[role_key]))
        if role is None:
            raise RowProblem(f"turn {number} has the unknown role {turn[role_key]!r}; take {', '.join(ROLES)}")
        text = turn.get(text_key)
        if not isinstance(text, str):
            raise RowProblem(f"turn {number} ({role}): {text_key!r} should be text, found {type(text).__name__}")
        if role == "assistant" and not text.strip():
            raise RowProblem(f"turn {number}: the assistant's answer is empty")
        trained = turn.get("trained", turn.get("train"))
        messages.append(Message(role, text, trained if isinstance(trained, bool) else None))
    if not any(m.role == "assistant" for m in messages):
        raise RowProblem("no turn of the assistant, so there is nothing to train on")
    return tuple(messages)


def _preference(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    chosen, rejected = (_string(row, columns[k]) for k in ("chosen", "rejected"))
    prompt = (Message("user", _string(row, columns["prompt"])),) if "prompt" in columns else ()
    return Pair(prompt, chosen, rejected, place)


_CONVERT: dict[str, Callable[[Mapping[str, Any], Mapping[str, str], str], Record]] = {
    "text": _text,
    "alpaca": _alpaca,
    "pairs": _pairs,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
}
