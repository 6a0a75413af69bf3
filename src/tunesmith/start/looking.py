"""What a data file looks like to someone who has to write a recipe for it: stage, columns, lengths, labels, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from tunesmith.data.chat import prompting
from tunesmith.data.check import check_records
from tunesmith.data.encode import Encoder
from tunesmith.data.readers import kind_of, read_rows
from tunesmith.data.records import BadRow, Labelled, Prompt, Record, RecordSet, full_text, output_text, read_records
from tunesmith.data.rows import Row, shown
from tunesmith.data.sources import find
from tunesmith.data.survey import IGNORED, Column, Survey, fold
from tunesmith.data.tokens import Asked, Work, together
from tunesmith.errors import DataError

MAX_ROWS = 20_000
_SURVEYED = 256
_TRIED = ("dpo", "sft", "classify", "pretrain")
"""In this order: a file that fits the first is almost never meant for a later one."""
NO_LIMIT = 1 << 30
"""Tokens; samples are measured as long as they are."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was found. `lengths` are tokens of whole samples and `answers` of answers alone, over the first 20,000 rows
    (twice the words where no tokenizer can be had); `guessed` says why columns were taken that nobody named."""

    stage: str
    format: str
    columns: Mapping[str, str]
    all_columns: tuple[str, ...]
    num_rows: int
    lengths: tuple[int, ...]
    answers: tuple[int, ...]
    labels: Mapping[str, int]
    multi_label: bool
    bad: tuple[str, ...]
    findings: tuple[str, ...]
    guessed: str = ""

    def share_within(self, tokens: int) -> float:
        """Share of the rows that are at most this long."""
        return float(np.mean(np.asarray(self.lengths) <= tokens)) if self.lengths else 1.0


def look(data: str, stage: str | None, tokenizer: Any) -> Look:
    """Read the data for `stage`, or for the first stage that it fits. `DataError` when it fits none."""
    bad: dict[str, BadRow] = {}
    records, guessed = _records(data, stage, bad)
    labels, multi, count = Counter[str](), False, 0
    for record in records:
        count += 1
        if isinstance(record, Labelled):
            multi = multi or not isinstance(record.label, str)
            labels.update([record.label] if isinstance(record.label, str) else record.label)
    sizes = list(_sizes(islice(records, MAX_ROWS), records.stage, tokenizer, tuple(labels), multi))
    findings = tuple(str(f) for f in check_records(records, None) if f.severity != "note")
    seen = tuple(_survey(data).columns) if records.columns else ()
    return Look(
        records.stage, records.format, dict(records.columns), seen, count, tuple(whole for whole, _ in sizes),
        tuple(answer for _, answer in sizes), dict(labels.most_common()), multi, tuple(map(str, bad.values())),
        findings, guessed,
    )  # fmt: skip


def _sizes(
    records: Iterable[Record], stage: str, tokenizer: Any, labels: tuple[str, ...], multi: bool
) -> Iterator[tuple[int, int]]:
    """Of each record (tokens of the whole sample or, where answers are sampled, of the prompt; of the answer)."""
    if tokenizer is None:
        return ((2 * len(full_text(record).split()), 2 * len(output_text(record).split())) for record in records)
    encoder = Encoder(tokenizer, stage, NO_LIMIT, label_names=labels, multi_label=multi)

    def size(record: Record) -> Work[tuple[int, int]]:
        if isinstance(record, Prompt):
            tokens = len((yield from prompting(record.messages, tokenizer, plain=record.plain)))
        else:
            samples = yield from encoder.encoding(record)
            tokens = max((len(sample.ids) for sample in samples), default=0)
        (answer,) = yield [Asked(output_text(record))]
        return tokens, len(answer)

    return together(map(size, records), tokenizer)


def _records(data: str, stage: str | None, bad: dict[str, BadRow]) -> tuple[RecordSet, str]:
    """The records, and why their columns were taken if that was a guess; the rows that cannot be used go to `bad`."""
    problems: list[str] = []
    for candidate in (stage,) if stage is not None else _TRIED:
        try:
            return _read(data, candidate, None, bad), ""
        except DataError as error:
            problems.append(str(error))
    survey = _survey(data)
    for candidate in (stage,) if stage is not None else tuple(_GUESSES):
        found = _GUESSES[candidate](survey) if candidate in _GUESSES else None
        if found is not None:
            return _read(data, candidate, found[0], bad), found[1]
    raise DataError(problems[-1])


def _read(data: str, stage: str, columns: Mapping[str, str] | None, bad: dict[str, BadRow]) -> RecordSet:
    """Read once, so that what cannot be read at all is noticed here."""
    bad.clear()

    def note(row: BadRow) -> None:
        bad[row.origin] = row

    records = read_records(data, stage=stage, columns=columns, on_bad_row="skip", report_bad=note)
    len(records)
    return records


def _survey(data: str) -> Survey:
    """The columns of the first file's first rows; none for a hub id."""
    rows: list[Mapping[str, object]] = []
    for file in find(data).files[:1]:
        kind = kind_of(file)
        read = read_rows(file, "lines" if kind == "text" else kind)
        rows += [row.values for row in islice(read, _SURVEYED) if isinstance(row, Row)]
    return Survey(rows)


def _by_length(survey: Survey, taken: Sequence[str] = ()) -> list[Column]:
    """Columns of words, the longest texts first."""
    texts = [survey.columns[name] for name in survey.texts() if name not in taken]
    return sorted(texts, key=lambda column: -column.num_chars / max(column.num_rows, 1))


def _guess_labelled(survey: Survey) -> tuple[dict[str, str], str] | None:
    """The longest texts and the column of fewest values that come again and again."""
    alike = [c for c in survey.columns.values() if c.is_class_like and fold(c.name) not in IGNORED]
    if not alike:
        return None
    label = min(alike, key=lambda column: len(column.values))
    texts = _by_length(survey, [column.name for column in alike])
    if not texts:
        return None
    why = f"{_name(texts[0])} has the longest texts, {_name(label)} the fewest values ({len(label.values)})"
    return {"text": texts[0].name, "label": label.name}, why


def _guess_answered(survey: Survey) -> tuple[dict[str, str], str] | None:
    """Two columns of words, in their order: the first asks, the second answers."""
    texts = [name for name in survey.texts() if not survey.columns[name].is_class_like]
    if len(texts) != 2:
        return None
    why = "the only two columns of text, in their order; swap them if the second asks"
    return {"question": texts[0], "answer": texts[1]}, why


def _guess_text(survey: Survey) -> tuple[dict[str, str], str] | None:
    texts = _by_length(survey)
    return ({"text": texts[0].name}, f"{_name(texts[0])} has the longest texts") if texts else None


def _name(column: Column) -> str:
    return shown(column.name, 40)


_GUESSES: dict[str, Any] = {
    "classify": _guess_labelled, "sft": _guess_answered, "pretrain": _guess_text, "mlm": _guess_text
}  # fmt: skip
"""By stage, in the order in which a file without a stage is tried."""
