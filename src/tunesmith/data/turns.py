"""Conversations as they stand in a row -> messages, or a `RowError` for what is no conversation."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

from tunesmith.data.cells import check_text, optional_text, text_at
from tunesmith.data.kinds import Message
from tunesmith.data.rows import Row, RowError, shown
from tunesmith.data.survey import kind_of_value

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def asked(row: Row, columns: Mapping[str, str], role: str) -> tuple[Message, ...]:
    """The prompt of a row: its text, an `input` below it if there is one, a system message before it."""
    column = columns[role]
    if kind_of_value(row.values.get(column)) in ("messages", "turns"):
        return messages_of(row.values[column], column)
    prompt = text_at(row, column)
    extra = optional_text(row, columns, "input")
    system = optional_text(row, columns, "system")
    turns = [Message("system", system)] if system else []
    return (*turns, Message("user", prompt if extra is None else f"{prompt}\n\n{extra}"))


def tools_of(row: Row, columns: Mapping[str, str]) -> tuple[Mapping[str, object], ...] | None:
    value = row.values.get(columns.get("tools", ""))
    if value in (None, "", []):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("'tools' is not JSON", "write a list of JSON schemas") from None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("'tools' is no list of objects", "write a list of JSON schemas")
    return tuple(value)


def messages_of(value: object, column: str) -> tuple[Message, ...]:
    """Messages from a list of {role, content} or {from, value}; RowError for anything else."""
    if not isinstance(value, list | tuple) or not value:
        found = "empty" if value in ([], (), None) else f"a {type(value).__name__}"
        advice = 'write [{"role": "user", "content": "..."}, ...]'
        raise RowError(f"{column!r} is {found}, not a list of messages", advice)
    return tuple(_message(item, f"{column}[{number}]") for number, item in enumerate(value))


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} is no object", 'write {"role": "user", "content": "..."}')
    role = _role(item, where)
    calls = _calls(item.get("tool_calls"), where)
    content = _content(item.get("content", item.get("value")), where, empty_allowed=bool(calls) or role == "tool")
    trained = item.get("trained", item.get("weight"))
    if trained not in (None, True, False):
        raise RowError(f"{where}: 'trained' is {shown(str(trained), 30)}", "write true or false")
    name, call_id = item.get("name"), item.get("tool_call_id")
    return Message(
        role, content, None if trained is None else bool(trained), calls,
        str(name) if name is not None else None, str(call_id) if call_id is not None else None,
    )  # fmt: skip


def _role(item: Mapping[str, object], where: str) -> str:
    written = item.get("role", item.get("from"))
    known = SHAREGPT_ROLES if "role" not in item else {role: role for role in ROLES}
    if isinstance(written, str) and written in known:
        return known[written]
    if written is None:
        raise RowError(f"{where} has no role", f"roles are {', '.join(known)}")
    near = difflib.get_close_matches(str(written), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RowError(f"{where}: unknown role {shown(str(written), 30)!r}{hint}", f"roles are {', '.join(known)}")


def _content(value: object, where: str, *, empty_allowed: bool) -> str:
    if isinstance(value, list | tuple):
        value = _joined(value, where)
    if value is None and empty_allowed:
        return ""
    if not isinstance(value, str):
        found = "missing" if value is None else f"a {type(value).__name__}, not text"
        raise RowError(f"{where}: the content is {found}", "write the message's text in double quotes")
    check_text(value, where)
    if not value.strip() and not empty_allowed:
        raise RowError(f"{where}: the content is empty", "write the message or leave the row out")
    return value


def _joined(parts: Sequence[object], where: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            problem = f"{where}: a part of type {shown(str(kind), 30)!r}"
            raise RowError(problem, "only text is read; leave out images and sound")
        texts.append(text)
    return "".join(texts)


def _calls(value: object, where: str) -> tuple[Mapping[str, object], ...]:
    if value in (None, [], ()):
        return ()
    advice = 'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
    if not isinstance(value, list | tuple):
        raise RowError(f"{where}: 'tool_calls' is no list", advice)
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: a tool call without a function name", advice)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise RowError(f"{where}: the arguments of {function['name']!r} are not JSON", advice) from None
        if not isinstance(arguments, Mapping):
            raise RowError(f"{where}: the arguments of {function['name']!r} are no object", advice)
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append({**made, "id": call["id"]} if "id" in call else made)
    return tuple(calls)


def check_turns(messages: Sequence[Message], *, answered: bool = True) -> None:
    """RowError unless turns alternate, begin with the user (after a system message) and end as they should."""
    talk = [m for m in messages if m.role not in ("system", "developer")]
    lead = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    if len(talk) != len(messages) - lead:
        advice = "move it to the start or merge it into the user's turn"
        raise RowError("a system message that is not the first", advice)
    if not talk or talk[0].role != "user":
        found = talk[0].role if talk else "nothing"
        raise RowError(f"the conversation begins with {found}, not with the user", "begin with a user message")
    for before, after in pairwise(talk):
        if before.role == after.role and after.role in ("user", "assistant"):
            raise RowError(f"two {after.role} messages in a row", "join them, or put back the message between them")
        if after.role == "tool" and not (before.tool_calls or before.role == "tool"):
            raise RowError("a tool result that no tool call asked for", "put the assistant's tool_calls before it")
    if answered and not any(m.role == "assistant" for m in talk):
        raise RowError("no assistant message: there is nothing to learn", "add the answer or leave the row out")


def check_trained(messages: Sequence[Message]) -> None:
    flags = [m.trained for m in messages if m.role == "assistant"]
    if all(flag is False for flag in flags):
        raise RowError("every assistant message is marked as not trained", "mark one as trained or leave the row out")
    others = [m for m in messages if m.role != "assistant" and m.trained]
    if others:
        raise RowError(f"a {others[0].role} message is marked as trained", "only assistant messages can be trained on")


def check_prompt(prompt: Sequence[Message]) -> None:
    check_turns(prompt, answered=False)
    if prompt[-1].role == "assistant":
        raise RowError("the prompt ends with the assistant", "end it with the user's turn")
