"""A row -> a record, or a `RowError` that says what is wrong with it and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from tunesmith.data.cells import check_text, optional_text, text_at, value_at
from tunesmith.data.corrections import corrected
from tunesmith.data.detect import Layout
from tunesmith.data.kinds import Chat, Labelled, Message, Prompt, Record, Text
from tunesmith.data.preferences import dialogue_pair, pair_of, preference, ranking
from tunesmith.data.rows import Row, RowError, shown
from tunesmith.data.survey import kind_of_value
from tunesmith.data.templates import Template, placeholders
from tunesmith.data.turns import asked, check_trained, check_turns, messages_of, tools_of
from tunesmith.errors import DataError

COMPLETED = ("sft", "pretrain", "mlm")
"""Stages that use a template's completion; the others are given its prompt alone."""
ANSWERS = ("label", "completion", "answer", "output")
"""Roles of a format that hold what is learned."""


def converter(layout: Layout, stage: str, template: Template | None) -> Callable[[Row], Record]:
    """The function that types a row of this layout."""
    columns = layout.columns
    answer = answer_column(columns, template)
    if template is not None:
        return lambda row: _templated(corrected(row, answer), columns, stage, template)
    make = _MAKERS[layout.format]
    return lambda row: make(corrected(row, answer), columns)


def answer_column(columns: Mapping[str, str], template: Template | None) -> str | None:
    """The column that holds what is learned of a row, where it is one."""
    learned = () if template is None else placeholders(template.completion)
    roles = [*learned, *ANSWERS]
    return next((columns.get(role, role) for role in roles if role in columns or role in learned), None)


def _text(row: Row, columns: Mapping[str, str]) -> Text:
    return Text(text_at(row, columns["text"]), row.origin)


def _answered(prompt_role: str, answer_role: str) -> Callable[[Row, Mapping[str, str]], Chat]:
    def make(row: Row, columns: Mapping[str, str]) -> Chat:
        prompt = asked(row, columns, prompt_role)
        column = columns[answer_role]
        if kind_of_value(row.values.get(column)) == "messages":
            messages = (*prompt, *messages_of(row.values[column], column))
            check_turns(messages)
            return Chat(messages, origin=row.origin)
        return Chat((*prompt, Message("assistant", text_at(row, column))), origin=row.origin)

    return make


def _chat(row: Row, columns: Mapping[str, str]) -> Chat:
    messages = messages_of(value_at(row, columns["messages"]), columns["messages"])
    check_turns(messages)
    check_trained(messages)
    return Chat(messages, tools_of(row, columns), origin=row.origin)


def instances_of(row: Row, layout: Layout) -> list[Row]:
    """A row of the format `instances` as one row for each of its instances, with their fields beside the row's own."""
    column = layout.columns.get("instances") if layout.format == "instances" else None
    held = row.values.get(column) if column else None
    if column is None or not isinstance(held, list | tuple) or not held:
        return [row]
    return [
        Row({**row.values, column: (item,)}, f"{row.origin}[{number}]" if len(held) > 1 else row.origin, row.raw)
        for number, item in enumerate(held, start=1)
    ]


def _instance(row: Row, columns: Mapping[str, str]) -> Chat:
    column = columns["instances"]
    held = value_at(row, column)
    item = held[0] if isinstance(held, list | tuple) and held else None
    if not isinstance(item, Mapping):
        raise RowError(f"{column!r} holds no instance", 'write [{"input": "...", "output": "..."}]')
    inner = Row({**row.values, **item}, row.origin, row.raw)
    return _answered("instruction", "output")(inner, {**columns, "input": "input", "output": "output"})


def _sharegpt(row: Row, columns: Mapping[str, str]) -> Chat:
    messages = messages_of(value_at(row, columns["conversations"]), columns["conversations"])
    system = optional_text(row, columns, "system")
    if system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    check_turns(messages)
    check_trained(messages)
    return Chat(messages, origin=row.origin)


def label_of(row: Row, column: str) -> str | tuple[str, ...]:
    """The class name; whole numbers become their digits, a list becomes several names."""
    value = value_at(row, column)
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


def _prompt(row: Row, columns: Mapping[str, str]) -> Prompt:
    messages = asked(row, columns, "prompt")
    answer = optional_text(row, columns, "answer")
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
    "instances": _instance,
    "prompt_completion": _answered("prompt", "completion"),
    "question_answer": _answered("question", "answer"),
    "labelled": _labelled,
    "ranking": ranking,
    "scored": ranking,
    "preference": preference,
    "dialogue_pairs": dialogue_pair,
    "prompts": _prompt,
}


def _templated(row: Row, columns: Mapping[str, str], stage: str, template: Template) -> Record:
    whole = stage in COMPLETED
    roles = template.columns if whole else tuple(dict.fromkeys(placeholders(template.prompt)))
    values = {**row.values, **{role: value_at(row, columns.get(role, role)) for role in roles}}
    for role in roles:
        value = values[role]
        if value is None or (whole and role in placeholders(template.completion)):
            values[role] = value if isinstance(value, int | float | list) else text_at(row, columns.get(role, role))
        elif isinstance(value, str):
            check_text(value, role)
    pasted = [values[role] for role in roles]
    if all(isinstance(value, str) and not value.strip() for value in pasted):
        raise RowError(f"{', '.join(roles)}: nothing but empty text", "write the text or leave the row out")
    try:
        prompt, completion = template.render(values, completion=whole)
    except DataError as error:
        raise RowError(str(error), "mend the row or the template") from None
    return _filled(row, columns, stage, prompt, completion)


def _filled(row: Row, columns: Mapping[str, str], stage: str, prompt: str, completion: str) -> Record:
    if stage in ("pretrain", "mlm"):
        return Text(prompt + completion, row.origin)
    if stage == "classify":
        return Labelled(prompt, label_of(row, columns["label"]), None, row.origin)
    asked = (Message("user", prompt),)
    if stage in ("reward", "dpo"):
        pair = pair_of(asked, text_at(row, columns["chosen"]), text_at(row, columns["rejected"]), row.origin)
        return replace(pair, plain=True)
    if stage in ("ppo", "grpo"):
        return Prompt(asked, optional_text(row, columns, "answer"), _others(row, columns), row.origin, plain=True)
    return Chat((*asked, Message("assistant", completion)), plain=True, origin=row.origin)
