"""A row -> a record, or a `RowError` that says what is wrong with it and what to do."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from tunesmith.data.detect import Layout, kind_of_value
from tunesmith.data.kinds import Chat, Labelled, Message, Pair, Prompt, Record, Text
from tunesmith.data.rows import Row, RowError, shown
from tunesmith.data.templates import Template, placeholders
from tunesmith.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_TURN = re.compile(r"\n\n(Human|Assistant):")


def converter(layout: Layout, stage: str, template: Template | None) -> Callable[[Row], Record]:
    """The function that types a row of this layout."""
    columns = layout.columns
    if template is not None:
        return lambda row: _templated(row, columns, stage, template)
    make = _MAKERS[layout.format]
    return lambda row: make(row, columns)


def text_at(row: Row, column: str, *, what: str = "") -> str:
    """The text in a column; RowError if it is missing, no text, empty, or holds what no text may hold."""
    value = _value(row, column)
    what = what or column
    if value is None:
        raise RowError(f"{what!r} is null", "write the text or leave the row out")
    if not isinstance(value, str):
        kind = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
        raise RowError(f"{what!r} is {kind} ({shown(str(value), 30)}), not text", "write it in double quotes")
    check_text(value, what)
    if not value.strip():
        raise RowError(f"{what!r} is empty", "write the text or leave the row out")
    return value


def _value(row: Row, column: str) -> object:
    if column in row.values:
        return row.values[column]
    names = [str(name) for name in row.values]
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"; did you mean {shown(near[0], 40)!r}?" if near else ""
    found = shown(", ".join(names), 60) or "nothing"
    raise RowError(f"there is no {column!r}{hint}", f"add it (the row has: {found})")


def check_text(value: str, what: str) -> None:
    """RowError for a NUL or half a surrogate pair: no tokenizer takes them."""
    if "\x00" in value:
        raise RowError(f"{what!r} holds a NUL character at {value.index(chr(0))}", "remove \\u0000 from it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        char = f"\\u{ord(value[error.start]):04x}"
        problem = f"{what!r} holds {char}, half a surrogate pair"
        raise RowError(problem, "write the whole character or remove it") from None


def _optional(row: Row, columns: Mapping[str, str], role: str) -> str | None:
    column = columns.get(role)
    value = row.values.get(column) if column else None
    if column is None or value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_at(row, column)


def _text(row: Row, columns: Mapping[str, str]) -> Text:
    return Text(text_at(row, columns["text"]), row.origin)


def _asked(row: Row, columns: Mapping[str, str], role: str) -> tuple[Message, ...]:
    """The prompt of a row: its text, an `input` below it if there is one, a system message before it."""
    column = columns[role]
    if kind_of_value(row.values.get(column)) in ("messages", "turns"):
        return messages_of(row.values[column], column)
    prompt = text_at(row, column)
    extra = _optional(row, columns, "input")
    system = _optional(row, columns, "system")
    turns = [Message("system", system)] if system else []
    return (*turns, Message("user", prompt if extra is None else f"{prompt}\n\n{extra}"))


def _answered(prompt_role: str, answer_role: str) -> Callable[[Row, Mapping[str, str]], Chat]:
    def make(row: Row, columns: Mapping[str, str]) -> Chat:
        prompt = _asked(row, columns, prompt_role)
        column = columns[answer_role]
        if kind_of_value(row.values.get(column)) == "messages":
            messages = (*prompt, *messages_of(row.values[column], column))
            check_turns(messages)
            return Chat(messages, origin=row.origin)
        return Chat((*prompt, Message("assistant", text_at(row, column))), origin=row.origin)

    return make


def _chat(row: Row, columns: Mapping[str, str]) -> Chat:
    messages = messages_of(_value(row, columns["messages"]), columns["messages"])
    check_turns(messages)
    _check_trained(messages)
    return Chat(messages, _tools(row, columns), origin=row.origin)


def _tools(row: Row, columns: Mapping[str, str]) -> tuple[Mapping[str, object], ...] | None:
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


def _sharegpt(row: Row, columns: Mapping[str, str]) -> Chat:
    messages = messages_of(_value(row, columns["conversations"]), columns["conversations"])
    system = _optional(row, columns, "system")
    if system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    check_turns(messages)
    _check_trained(messages)
    return Chat(messages, origin=row.origin)


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


def _check_trained(messages: Sequence[Message]) -> None:
    flags = [m.trained for m in messages if m.role == "assistant"]
    if all(flag is False for flag in flags):
        raise RowError("every assistant message is marked as not trained", "mark one as trained or leave the row out")
    others = [m for m in messages if m.role != "assistant" and m.trained]
    if others:
        raise RowError(f"a {others[0].role} message is marked as trained", "only assistant messages can be trained on")


def label_of(row: Row, column: str) -> str | tuple[str, ...]:
    """The class name; whole numbers become their digits, a list becomes several names."""
    value = _value(row, column)
    if isinstance(value, list | tuple):
        names = tuple(_label(item, column) for item in value)
        if len(set(names)) != len(names):
            raise RowError(f"{column!r} names a label twice", "name each label once")
        return names
    return _label(value, column)


def _label(value: object, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return str(int(value))
    if isinstance(value, str):
        check_text(value, column)
        if value.strip():
            return value.strip()
        raise RowError(f"{column!r} is empty", "write the label or leave the row out")
    found = "null" if value is None else f"a {type(value).__name__} ({shown(str(value), 30)})"
    raise RowError(f"{column!r} is {found}, not a label", "labels are names or whole numbers")


def _labelled(row: Row, columns: Mapping[str, str]) -> Labelled:
    pair = text_at(row, columns["text_pair"]) if "text_pair" in columns else None
    return Labelled(text_at(row, columns["text"]), label_of(row, columns["label"]), pair, row.origin)


def _preference(row: Row, columns: Mapping[str, str]) -> Pair:
    prompt = _asked(row, columns, "prompt") if "prompt" in columns else ()
    chosen, rejected = columns["chosen"], columns["rejected"]
    if kind_of_value(row.values.get(chosen)) in ("messages", "turns"):
        better = messages_of(_value(row, chosen), chosen)
        worse = messages_of(_value(row, rejected), rejected)
        return _split_pair(prompt, better, worse, row.origin)
    if not prompt:
        raise RowError("there is no prompt", "add a prompt column")
    return _pair(prompt, text_at(row, chosen), text_at(row, rejected), row.origin)


def _pair(prompt: tuple[Message, ...], chosen: str, rejected: str, origin: str) -> Pair:
    check_turns(prompt, answered=False)
    if prompt[-1].role == "assistant":
        raise RowError("the prompt ends with the assistant", "end it with the user's turn")
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
    return _pair(before, better[-1].content, worse[-1].content, origin)


def _dialogue_pair(row: Row, columns: Mapping[str, str]) -> Pair:
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


def _prompt(row: Row, columns: Mapping[str, str]) -> Prompt:
    messages = _asked(row, columns, "prompt")
    answer = _optional(row, columns, "answer")
    if messages[-1].role == "assistant":
        answer = answer or messages[-1].content
        messages = messages[:-1]
    check_turns(messages, answered=False)
    return Prompt(messages, answer, _others(row, columns), row.origin)


def _others(row: Row, columns: Mapping[str, str]) -> dict[str, object]:
    return {name: value for name, value in row.values.items() if name != columns.get("prompt")}


_MAKERS: dict[str, Callable[[Row, Mapping[str, str]], Record]] = {
    "text": _text,
    "messages": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _answered("instruction", "output"),
    "prompt_completion": _answered("prompt", "completion"),
    "question_answer": _answered("question", "answer"),
    "labelled": _labelled,
    "preference": _preference,
    "dialogue_pairs": _dialogue_pair,
    "prompts": _prompt,
}


def _templated(row: Row, columns: Mapping[str, str], stage: str, template: Template) -> Record:
    values = {**row.values, **{role: _value(row, columns.get(role, role)) for role in template.columns}}
    for role in template.columns:
        value = values[role]
        if value is None or role in placeholders(template.completion):
            values[role] = value if isinstance(value, int | float | list) else text_at(row, columns.get(role, role))
        elif isinstance(value, str):
            check_text(value, role)
    pasted = [values[role] for role in template.columns]
    if all(isinstance(value, str) and not value.strip() for value in pasted):
        raise RowError(f"{', '.join(template.columns)}: nothing but empty text", "write the text or leave the row out")
    try:
        prompt, completion = template.render(values)
    except DataError as error:
        raise RowError(str(error), "mend the row or the template") from None
    if stage in ("pretrain", "mlm"):
        return Text(prompt + completion, row.origin)
    if stage == "classify":
        return Labelled(prompt + completion, label_of(row, columns["label"]), None, row.origin)
    asked = (Message("user", prompt),)
    if stage in ("reward", "dpo"):
        return _pair(asked, text_at(row, columns["chosen"]), text_at(row, columns["rejected"]), row.origin)
    if stage in ("ppo", "grpo"):
        return Prompt(asked, completion or _optional(row, columns, "answer"), _others(row, columns), row.origin)
    return Chat((*asked, Message("assistant", completion)), plain=True, origin=row.origin)
