"""Prompt templates: columns -> prompt and completion. The same template serves training and inference."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError


@dataclass(frozen=True, slots=True)
class Template:
    """`prompt` and `completion` with `{column}` placeholders.

    `Template("Q: {question}\\nA: ", "{answer}")` on `{"question": "2+2?", "answer": "4"}` gives
    `("Q: 2+2?\\nA: ", "4")`. Doubled braces stand for themselves.
    """

    prompt: str
    completion: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The placeholders, in order, each once."""
        names = [name for part in (self.prompt, self.completion) for _, name, _, _ in string.Formatter().parse(part) if name]
        return tuple(dict.fromkeys(names))

    def render(self, row: Mapping[str, Any], *, completion: bool = True) -> tuple[str, str]:
        """`(prompt, completion)`; `DataError` for a placeholder that the row does not have."""
        wanted = self.columns if completion else Template(self.prompt, "").columns
        missing = [name for name in wanted if name not in row]
        if missing:
            raise DataError(
                f"the template wants {{{'}, {'.join(missing)}}}, and the row has the columns {', '.join(row) or 'none'}"
            )
        values = {name: str(row[name]) for name in wanted}
        return self.prompt.format_map(values), self.completion.format_map(values) if completion else ""


TEMPLATES = {
    "qa": Template("Please answer the following question.\n\nQ: {question}\n\nA: ", "{answer}"),
    "summarise": Template("Summarise the following text.\n\n{text}\n\nSummary: ", "{summary}"),
    "translate": Template("Translate the following text.\n\n{source}\n\nTranslation: ", "{target}"),
    "classify": Template("Which label fits the following text?\n\n{text}\n\nLabel: ", "{label}"),
    "alpaca": Template(
        "Below is an instruction that describes a task. Write a response that completes it.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "{output}",
    ),
    "alpaca_input": Template(
        "Below is an instruction that describes a task, with an input that it applies to. "
        "Write a response that completes it.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "{output}",
    ),
}
"""Built-in templates by name."""

MARK = "{completion}"


def get_template(text: str) -> Template:
    """A built-in template by its name, or the text of one.

    In a text the last placeholder starts the completion: `"Q: {question} A: {answer}"` trains on the answer. Raises
    `DataError` for an unknown name, broken braces, or fewer than two placeholders.
    """
    if text in TEMPLATES:
        return TEMPLATES[text]
    if "{" not in text:
        raise DataError(f"there is no template `{text}`; built in are {', '.join(TEMPLATES)}; or write one with {{columns}}")
    try:
        fields = [f for f in string.Formatter().parse(text) if f[1] is not None]
        plain = all(name and name.replace("_", "").replace(" ", "").replace("-", "").isalnum() for _, name, _, _ in fields)
        bare = all(not spec and conversion is None for _, _, spec, conversion in fields)
    except ValueError as error:
        raise DataError(f"the template's braces do not match: {error}; a brace as text is written twice") from None
    if not plain or not bare:
        raise DataError("a placeholder is a column's name and nothing else, as in {question}")
    if len(fields) < 2:
        raise DataError("a template needs a placeholder for what is asked and, last, one for the answer")
    cut = text.rindex("{" + str(fields[-1][1]) + "}")
    return Template(text[:cut], text[cut:])
