"""Which format a file has, from its columns and its first rows. Recognised, shown, and never guessed twice."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError

TEXT = ("text", "content", "body", "document", "sentence", "review", "comment", "message", "tweet", "quote")
LABEL = ("label", "labels", "class", "category", "categories", "sentiment", "target", "tag", "tags", "stars", "rating")
PROMPT = ("prompt", "question", "query", "instruction", "input", "source", "problem", "request", "frage")
COMPLETION = ("completion", "response", "answer", "output", "target", "reply", "solution", "summary", "antwort")
FORMATS = ("text", "alpaca", "pairs", "messages", "sharegpt", "labelled", "preference", "template")
SAMPLE_ROWS = 200


@dataclass(frozen=True, slots=True)
class Format:
    """A recognised format: `columns` maps its roles (text, label, prompt, ...) to the file's columns."""

    name: str
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        roles = ", ".join(f"{role} = {column}" for role, column in self.columns.items())
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.name} ({roles}{unused})"


ROLES = {
    "text": ("text",),
    "alpaca": ("instruction", "output"),
    "pairs": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "labelled": ("text", "label"),
    "preference": ("chosen", "rejected"),
}
_STAGE = {
    "pretrain": ("text", "labelled"),
    "mlm": ("text", "labelled"),
    "sft": ("messages", "sharegpt", "alpaca", "pairs"),
    "classify": ("labelled",),
}


def detect(
    rows: Sequence[Mapping[str, Any]], *, stage: str, place: str, name: str | None = None, given: Mapping[str, str] | None = None
) -> Format:
    """The format of `rows` (the first ones of a file) for `stage`.

    `name` and `given` (role -> column) come from the recipe and win. `DataError` says which columns there are and how
    to name them.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    given = dict(given or {})
    if unknown := [f"{role}: {column}" for role, column in given.items() if column not in columns]:
        raise DataError(f"{place}: data.columns names {', '.join(unknown)}, and the columns are {', '.join(columns)}")
    if name is not None and name not in ROLES:
        raise DataError(f"there is no format `{name}`; take {', '.join(ROLES)}")
    candidates = [name] if name else list(_STAGE[stage])
    for candidate in candidates:
        found = _match(candidate, columns, rows, given)
        if found is not None:
            used = set(found.values())
            return Format(candidate, found, tuple(c for c in columns if c not in used))
    raise DataError(_unclear(columns, stage, place, candidates))


def _match(
    name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[str, str]
) -> dict[str, str] | None:
    """role -> column when the columns fit the format, else None."""
    if set(ROLES[name]) <= set(given):
        return dict(given)
    if name == "alpaca":
        fits = {"instruction", "output"} <= set(columns)
        return {k: k for k in ("instruction", "input", "output") if k in columns} if fits else None
    if name in ("messages", "sharegpt"):
        return _conversation(name, columns, rows)
    if name == "pairs":
        return _two(columns, rows, given, ("prompt", PROMPT), ("completion", COMPLETION))
    if name == "labelled":
        return _two(columns, rows, given, ("text", TEXT), ("label", LABEL)) or _label_by_looks(columns, rows, given)
    if name == "preference":
        fits = {"chosen", "rejected"} <= set(columns)
        return {k: k for k in ("prompt", "chosen", "rejected") if k in columns} if fits else None
    return _text(columns, rows, given)


def _conversation(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    role, key = ("messages", "role") if name == "messages" else ("conversations", "from")
    for column in columns:
        first = next((row[column] for row in rows if row.get(column)), None)
        if isinstance(first, list) and first and isinstance(first[0], dict) and key in first[0]:
            return {role: column}
    return None


def _named(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns whose name is one of `names`, in that order."""
    lowered = {column.casefold().strip(): column for column in columns}
    return [lowered[name] for name in names if name in lowered]


def _two(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    given: Mapping[str, str],
    first: tuple[str, Sequence[str]],
    second: tuple[str, Sequence[str]],
) -> dict[str, str] | None:
    """Two roles by the usual names of their columns."""
    (role_a, names_a), (role_b, names_b) = first, second
    a = [given[role_a]] if role_a in given else _named(columns, names_a)
    b = [given[role_b]] if role_b in given else [c for c in _named(columns, names_b) if c not in a[:1]]
    return {**given, role_a: a[0], role_b: b[0]} if a and b and a[0] != b[0] else None


def _label_by_looks(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[str, str]
) -> dict[str, str] | None:
    """The longest column is the text and the only one with few different short values the label, if that is plain."""
    lengths = {c: _mean_length(rows, c) for c in columns}
    text = given.get("text") or (_named(columns, TEXT) or [max(columns, key=lambda c: lengths[c])])[0]
    few = [c for c in columns if c != text and _few_values(rows, c)]
    label = given.get("label") or (few[0] if len(few) == 1 else None)
    if label is None or lengths[text] < 2 * max(1.0, lengths[label]):
        return None
    return {**given, "text": text, "label": label}


def _mean_length(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    values = [len(str(row[column])) for row in rows if isinstance(row.get(column), str)]
    return sum(values) / len(values) if values else 0.0


def _few_values(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [str(row.get(column)) for row in rows]
    return 1 < len(set(values)) <= max(2, min(20, len(values) // 3)) and max(map(len, values)) <= 40


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> dict[str, str] | None:
    if "text" in given:
        return {"text": given["text"]}
    named = _named(columns, TEXT)
    strings = [c for c in columns if any(isinstance(row.get(c), str) for row in rows)]
    if named:
        return {"text": named[0]}
    return {"text": strings[0]} if len(strings) == 1 else None


_HOW = {
    "pretrain": "{text: COLUMN}",
    "mlm": "{text: COLUMN}",
    "sft": "{prompt: COLUMN, completion: COLUMN}",
    "classify": "{text: COLUMN, label: COLUMN}",
}


def _unclear(columns: Sequence[str], stage: str, place: str, candidates: Sequence[str]) -> str:
    return (
        f"{place}: the columns {', '.join(columns) or '(none)'} do not say what to do in stage {stage} "
        f"(looked for {', '.join(candidates)}). Name them in the recipe: `data.columns: {_HOW[stage]}`"
    )
