"""Prompt templates: columns of a row -> (prompt, completion), the same way in training and at inference.

A template is text with `{column}` placeholders; `{{` and `}}` are braces. Values are pasted, never parsed, so
braces in the data are harmless, and a placeholder is a plain name: no attributes, indices or formats.
"""

from __future__ import annotations

import difflib
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.errors import DataError, several


def placeholders(text: str) -> list[str]:
    """Names in the order they stand; DataError if the braces do not match or hold more than a name."""
    return [name for _, name in _pieces(text) if name is not None]


def _pieces(text: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"template {text[:80]!r}: {error}; write {{{{ and }}}} for braces that are text") from None
    pieces: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion or any(c in name for c in ".[]{}")):
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise DataError(f"template placeholder {{{written}}}: only a column's name may stand in braces")
        pieces.append((literal, name))
    return pieces


def as_text(value: object, name: str) -> str:
    """A value as it is pasted: text, whole and finite numbers; a list of texts is joined by ", "."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, list | tuple):
        texts = [item for item in value if isinstance(item, str)]
        if texts and len(texts) == len(value):
            return ", ".join(texts)
    found = "empty (null)" if value is None else f"a {type(value).__name__}"
    raise DataError(f"column {name!r} is {found}; a template takes text, numbers and lists of text")


@dataclass(frozen=True, slots=True)
class Template:
    """`prompt` and `completion`, each with placeholders. A completion may be empty (raw text, prompts).

    `Template("Q: {question}\\nA: ", "{answer}")` on `{"question": "2+2?", "answer": "4"}` gives
    `("Q: 2+2?\\nA: ", "4")`.
    """

    prompt: str
    completion: str = ""

    def __post_init__(self) -> None:
        if not self.columns:
            raise DataError(f"template {(self.prompt + self.completion)[:80]!r} has no {{column}} placeholder")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every placeholder, each once, in order."""
        return tuple(dict.fromkeys(placeholders(self.prompt) + placeholders(self.completion)))

    def render(self, row: Mapping[str, object], *, completion: bool = True) -> tuple[str, str]:
        """(prompt, completion) of a row; DataError naming the known columns where a placeholder has no column.

        With `completion=False`, as at inference, the row needs no answer and the completion is empty.
        """
        self._check(self.columns if completion else tuple(placeholders(self.prompt)), row)
        return _fill(self.prompt, row), _fill(self.completion, row) if completion else ""

    def as_dict(self) -> dict[str, str]:
        """What is saved with the model; `get_template` reads it back."""
        return {"prompt": self.prompt, "completion": self.completion}

    def _check(self, columns: tuple[str, ...], row: Mapping[str, object]) -> None:
        problems = [_unknown(name, row) for name in columns if name not in row]
        if problems:
            raise several(problems, DataError)


def _unknown(name: str, row: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, [str(key) for key in row], n=1)
    hint = f"; did you mean {{{near[0]}}}?" if near else ""
    return f"template placeholder {{{name}}} is no column; columns are: {', '.join(map(str, row)) or 'none'}{hint}"


def _fill(text: str, row: Mapping[str, object]) -> str:
    pasted = (literal + ("" if name is None else as_text(row[name], name)) for literal, name in _pieces(text))
    return "".join(pasted)


_TASK = "Below is an instruction that describes a task"
TEMPLATES: dict[str, Template] = {
    "qa": Template("Please answer the following question.\n\nQ: {question}\n\nA: ", "{answer}"),
    "summarise": Template("Summarise the following text.\n\n{text}\n\nSummary: ", "{summary}"),
    "translate": Template("Translate the following text.\n\n{source}\n\nTranslation: ", "{target}"),
    "classify": Template("Which label fits the following text?\n\n{text}\n\nLabel: ", "{label}"),
    "alpaca": Template(
        f"{_TASK}. Write a response that completes it.\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
        "{output}",
    ),
    "alpaca_input": Template(
        f"{_TASK}, with an input that it applies to. Write a response that completes it.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "{output}",
    ),
}
"""Built-in templates by name."""


def get_template(name_or_text: str | Mapping[str, str] | Template, *, answered: bool = True) -> Template:
    """A built-in template by name, `{prompt, completion}`, or text whose last placeholder begins the completion.

    `"Q: {q} A: {a}"` is the prompt `"Q: {q} A: "` and the completion `"{a}"`; text with a single placeholder, or for
    a stage that learns no answer (`answered=False`), is all prompt. DataError for a name that is not built in.
    """
    if isinstance(name_or_text, Template):
        return name_or_text
    if isinstance(name_or_text, Mapping):
        if not {"prompt"} <= set(name_or_text) <= {"prompt", "completion"}:
            raise DataError(f"a template has the keys prompt and completion, not {', '.join(map(str, name_or_text))}")
        wrong = [key for key, text in name_or_text.items() if not isinstance(text, str)]
        if wrong:
            raise DataError(f"a template's {wrong[0]} is text with {{column}} placeholders")
        return Template(name_or_text["prompt"], name_or_text.get("completion", ""))
    if name_or_text in TEMPLATES:
        return TEMPLATES[name_or_text]
    if "{" not in name_or_text:
        near = difflib.get_close_matches(name_or_text, TEMPLATES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(
            f"no template is named {name_or_text[:80]!r}{hint}; built in are {', '.join(TEMPLATES)}, "
            "and one of your own is text with {column} placeholders"
        )
    return _cut(name_or_text) if answered else Template(name_or_text)


def _cut(text: str) -> Template:
    pieces = _pieces(text)
    named = [i for i, (_, name) in enumerate(pieces) if name is not None]
    if len(named) < 2:
        return Template(text)
    last = named[-1]
    prompt = "".join(_source(*piece) for piece in pieces[:last]) + _source(pieces[last][0], None)
    completion = _source("", pieces[last][1]) + "".join(_source(*piece) for piece in pieces[last + 1 :])
    return Template(prompt, completion)


def _source(literal: str, name: str | None) -> str:
    escaped = literal.replace("{", "{{").replace("}", "}}")
    return escaped if name is None else f"{escaped}{{{name}}}"
