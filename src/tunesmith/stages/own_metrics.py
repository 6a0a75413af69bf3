"""The user's own metrics in a run: read once, given every held-out row with what the model made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.kinds import Chat, Record, input_text
from tunesmith.data.naming import place, short_names
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.classify import ScoreResult
from tunesmith.evaluate.generate import GenerationResult
from tunesmith.evaluate.intervals import Statistic
from tunesmith.evaluate.own import Case, OwnMetric, metric_of, own_statistic, read_metric
from tunesmith.recipe_metrics import ARGUMENTS, name_problems, named, parts_of

Given = str | Callable[..., Any]
Rows = Mapping[str, tuple[Mapping[str, Any], str]]
"""By origin: the row as it stands in the file, and the text of its prompt."""


@dataclass(frozen=True, slots=True)
class Own:
    """The metrics, and the rows they are told of; `rows()` reads the held-out files once, when first asked."""

    metrics: tuple[OwnMetric, ...]
    rows: Callable[[], Rows]

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called in results."""
        return tuple(metric.name for metric in self.metrics)

    def of_classes(self, result: ScoreResult, labels: Sequence[str]) -> list[Statistic]:
        """One statistic a metric, of a classifier's answers."""
        return self._judged(list(_class_cases(result, labels, self.rows())))

    def of_completions(self, items: Iterable[tuple[str, str | None, str]]) -> list[Statistic]:
        """One statistic a metric, of (completion, reference answer, origin) of every prompt."""
        rows, cases = self.rows(), list[Case]()
        for completion, answer, origin in items:
            row, prompt = _row(rows, origin)
            cases.append(Case({"prompt": prompt, "completion": completion, "answer": answer, "row": row}, origin))
        return self._judged(cases)

    def of_generation(self, generation: GenerationResult) -> list[Statistic]:
        """The same, of completions that were made for an evaluation."""
        pairs = zip(generation.questions, generation.completions, strict=True)
        return self.of_completions((text, question.reference, question.origin) for question, text in pairs)

    def _judged(self, cases: list[Case]) -> list[Statistic]:
        return [own_statistic(metric, cases) for metric in self.metrics]


def own_metrics(
    stage: str, asked: str | Sequence[str] | None, folder: Path, sets: Sequence[Any], *, beside: Any = None
) -> Own | None:
    """The metrics of `evaluate.metrics`, whose paths begin in `folder`; None without any.

    `sets` are the held-out records; a run, which calls files shortly in its origins, gives the training records
    `beside` them. Raises `RecipeError` for what cannot be loaded or called.
    """
    found = [_read(text, stage, folder, "evaluate.metrics") for text in named(asked)]
    read = [] if beside is None else [records for records in (beside, *sets) if records is not None]
    names = short_names([name for records in read for name in records.files]) if found else {}
    return _made(found, sets, names) if found else None


def given_metrics(stage: str, given: Sequence[Given], records: Any, key: str) -> Own | None:
    """The metrics that are `given` beside a recipe; None without any."""
    if given and stage not in ARGUMENTS:
        raise RecipeError(f"{key}: stage {stage} has neither labels nor completions that a function could judge; "
                          f"metrics are for {', '.join(ARGUMENTS)}")  # fmt: skip
    found = [
        _read(one, stage, Path.cwd(), key) if isinstance(one, str) else metric_of(one, ARGUMENTS[stage])
        for one in given
    ]
    if problems := name_problems([metric.name for metric in found]):
        raise RecipeError(f"{key}: {problems[0]}")
    return _made(found, [records], {}) if found else None


def _read(text: str, stage: str, folder: Path, key: str) -> OwnMetric:
    parts = parts_of(text)
    if parts is None:
        raise RecipeError(f"{key}: `{text}` is not `file.py:name`")
    file, name = parts
    beside = folder / Path(file).expanduser()
    path = beside if beside.exists() else Path(file).expanduser()
    return read_metric(path, name, ARGUMENTS[stage], where=text, key=key)


def _made(metrics: Sequence[OwnMetric], sets: Iterable[Any], names: Mapping[str, str]) -> Own:
    kept = [records for records in sets if records is not None]

    @cache
    def rows() -> Rows:
        return {
            place(record.origin, names): (row.values, _prompt(record))
            for records in kept
            for row, record in records.rows()
        }

    return Own(tuple(metrics), rows)


def _prompt(record: Record) -> str:
    """What is asked: of a conversation, what stands before the first answer that is learned."""
    if isinstance(record, Chat):
        ends = [i for i, m in enumerate(record.messages) if m.role == "assistant" and m.trained is not False]
        return "\n".join(m.content for m in record.messages[: ends[0] if ends else len(record.messages)])
    return input_text(record)


def _row(rows: Rows, origin: str) -> tuple[Mapping[str, Any], str]:
    if origin not in rows:
        raise DataError(f"{origin}: the row is not there any more; were the held-out files changed during the run?")
    return rows[origin]


def _class_cases(result: ScoreResult, labels: Sequence[str], rows: Rows) -> Iterator[Case]:
    scores = result.scores - result.scores.max(1, keepdims=True)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    if result.multi_label:
        shares = np.exp(-np.logaddexp(0, -result.scores))
    for i, origin in enumerate(result.origins):
        said, has = (_called(part[i], labels) for part in (result.predictions, result.labels))
        values = {"predicted": said, "label": has, "probabilities": dict(zip(labels, shares[i].tolist(), strict=True))}
        yield Case(values | {"row": _row(rows, origin)[0]}, origin)


def _called(found: Any, labels: Sequence[str]) -> str | list[str]:
    """The name of a class; multi-label, of every class that is 1."""
    if np.ndim(found):
        return [name for name, on in zip(labels, found, strict=True) if on]
    return labels[int(found)]
