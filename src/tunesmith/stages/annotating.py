"""Predictions as rows that a person corrects and that are training data as they stand: `predict --to`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.column import read_texts_of_rows
from tunesmith.data.convert import ANSWERS
from tunesmith.data.corrections import COLUMNS, CORRECTION, MARK, PREDICTION, corrected, is_marked, own_columns
from tunesmith.data.records import read_records
from tunesmith.data.rows import Row
from tunesmith.data.templates import get_template, placeholders
from tunesmith.errors import DataError
from tunesmith.model.score import ScoreModel
from tunesmith.rundir import RunDir, write_whole
from tunesmith.stages import using
from tunesmith.stages.finals import Tuned


def annotate(run: RunDir, file: str | Path, to: Path, *, column: str | None, max_tokens: int) -> list[dict[str, Any]]:
    """Every row of `file` with the model's `prediction`, a `correction` of null and the mark of such a row, written to
    the new file `to`.

    A row without an answer of its own gets the prediction as that; in a file that was corrected already the correction
    is the answer, and the row is predicted anew. Returns what `predict` returns. Raises `DataError`
    when `to` exists, since it may hold corrections already, and when a row has columns of these names of its own.
    """
    if to.exists():
        raise DataError(f"{to} exists and may hold corrections: choose another name with --to, or remove it")
    tuned = using.opened(run)
    found = read_texts_of_rows(file, column or _asked_column(tuned))
    _refuse_own(file, [values for _, _, values in found])
    predicted = using.answers(tuned, [text for text, _, _ in found], max_tokens)
    answer = _answer_column(tuned, str(file))
    rows = []
    for (_, name, values), one in zip(found, predicted, strict=True):
        kept = own_columns(corrected(Row(values, str(file)), answer).values)
        given = kept.get(answer)
        rows.append({
            name: kept.pop(name), **kept, answer: one["answer"] if given is None else given,
            PREDICTION: one["answer"], CORRECTION: None, **MARK,
        })  # fmt: skip
    write_whole(to, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return predicted


def _refuse_own(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`DataError` where a column of the file's own would be written over."""
    taken = [name for name in COLUMNS if any(name in row and not is_marked(row) for row in rows)]
    if taken:
        called = ", ".join(map(repr, taken))
        raise DataError(f"{file} has columns of its own called {called}, which --to would write over; rename them")


def _asked_column(tuned: Tuned) -> str | None:
    """The one column that the run's template puts to the model; None without a template."""
    if tuned.template is None:
        return None
    names = list(dict.fromkeys(placeholders(get_template(tuned.template).prompt)))
    return names[0] if len(names) == 1 else None


def _answer_column(tuned: Tuned, file: str) -> str:
    """Where the answers of these rows stand, or are to stand."""
    data = tuned.recipe.data
    stage = "classify" if isinstance(tuned.model, ScoreModel) else "sft"
    try:
        columns = read_records(
            file, stage=stage, format=data.format, columns=data.columns, template=tuned.template
        ).columns
    except DataError:
        columns = {}
    found = next((columns[role] for role in ANSWERS if role in columns), None)
    if found is not None:
        return found
    if stage == "classify":
        return "label"
    learned: Sequence[str] = () if tuned.template is None else placeholders(get_template(tuned.template).completion)
    return next(iter(learned), "response")
