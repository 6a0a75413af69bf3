"""A user's data -> typed records, streamed, each with its origin; what was recognised can be read before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping

from tunesmith.data.convert import COMPLETED, answer_column, converter, instances_of
from tunesmith.data.corrections import own_columns, remarks
from tunesmith.data.detect import STAGES, Layout, Survey, recognise
from tunesmith.data.files import DataFile
from tunesmith.data.kinds import (
    Chat,
    Labelled,
    Message,
    Pair,
    Prompt,
    Ranking,
    Record,
    Text,
    as_ranking,
    comparisons,
    full_text,
    input_text,
    output_text,
    pairs_of,
)
from tunesmith.data.readers import kind_of, read_rows
from tunesmith.data.rows import MAX_LISTED, BadRow, Row, RowError, bad_row, refuse, shown
from tunesmith.data.sources import HubRows, Spec, find
from tunesmith.data.templates import Template, get_template, placeholders
from tunesmith.errors import DataError, printable, several

__all__ = [
    "BadRow", "Chat", "Labelled", "Message", "Pair", "Prompt", "Ranking", "Record", "RecordSet", "Text",
    "as_ranking", "comparisons", "full_text", "input_text", "output_text", "pairs_of", "read_records",
]  # fmt: skip

_SAMPLED_ROWS = 64
_KEPT_BAD_ROWS = 1000


class RecordSet:
    """Records that can be read again and again, one at a time; made by `read_records`.

    `format` and `columns` (role -> column) are what was recognised, `files` what is read, `template` what the rows
    were put through (None: none), `notes` what the user should know. Iterating raises DataError that lists the first
    20 bad rows; with `on_bad_row="skip"` they are left out, counted in `num_bad`, kept in `bad_rows` (the first
    1,000 of the last pass) and given to `report_bad`. Rows read = good rows + `num_bad`.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        layout: Layout,
        *,
        stage: str,
        template: Template | None,
        skip_bad: bool,
        report_bad: Callable[[BadRow], None] | None,
        notes: tuple[str, ...],
    ) -> None:
        self._parts = parts
        self._layout = layout
        self._convert = converter(layout, stage, template)
        self._bad: list[BadRow] = []
        self._skip_bad = skip_bad
        self._report_bad = report_bad
        self._counts: tuple[int, int] | None = None
        self._hashes: dict[str, str] | None = None
        self.stage = stage
        self.format = layout.format
        self.columns: Mapping[str, str] = layout.columns
        self.template = template
        self.notes = notes
        self.narrowed: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.rows())

    def rows(self) -> Iterator[tuple[Row, Record]]:
        """Every record with the row it was made from."""
        good = 0
        num_bad = 0
        bad: list[BadRow] = []
        self._bad = []
        for row in self._raw_rows():
            record = self._typed(row)
            if isinstance(record, BadRow):
                num_bad += 1
                self._note(record, bad)
            elif not bad:
                good += 1
                assert isinstance(row, Row)
                yield row, record
        if bad:
            raise refuse(bad)
        if not good:
            raise DataError(self._nothing(num_bad))
        self._counts = (good, num_bad)

    def _typed(self, row: Row | BadRow) -> Record | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return self._convert(row)
        except RowError as error:
            return bad_row(row.origin, error, row.raw or row.values)

    def _note(self, row: BadRow, bad: list[BadRow]) -> None:
        if len(self._bad) < _KEPT_BAD_ROWS:
            self._bad.append(row)
        if self._report_bad is not None:
            self._report_bad(row)
        if not self._skip_bad:
            bad.append(row)
            if len(bad) == MAX_LISTED:
                raise refuse(bad, more=True)

    def _raw_rows(self) -> Iterator[Row | BadRow]:
        for part in self._parts:
            for row in part.rows():
                if isinstance(row, BadRow):
                    yield row
                else:
                    yield from instances_of(row, self._layout)

    def _nothing(self, num_bad: int) -> str:
        names = ", ".join(self.files)
        return f"{names}: all {num_bad} rows are bad" if num_bad else f"{names}: there are no rows; give at least one"

    def _count(self) -> tuple[int, int]:
        if self._counts is None:
            for _ in self.rows():
                pass
        assert self._counts is not None
        return self._counts

    def __len__(self) -> int:
        """Good rows; reads the data once if it has not been read yet."""
        return self._count()[0]

    @property
    def num_bad(self) -> int:
        """Rows left out; reads the data once if it has not been read yet."""
        return self._count()[1]

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """The first 1,000 rows left out, with their places; reads the data once if it has not been read yet."""
        self._count()
        return tuple(self._bad)

    @property
    def files(self) -> tuple[str, ...]:
        """What is read, as the user named it."""
        return tuple(part.name for part in self._parts)

    @property
    def file_hashes(self) -> Mapping[str, str]:
        """sha256 of every file's bytes (of a hub data set's rows), by name."""
        if self._hashes is None:
            self._hashes = {part.name: part.sha256() for part in self._parts}
        return self._hashes

    @property
    def fingerprint(self) -> str:
        """sha256 of the content and of how it is read: equal fingerprints give equal records (origins aside)."""
        how = [self.stage, self.format, sorted(self.columns.items()), self.template and self.template.as_dict()]
        whole = [list(self.file_hashes.values()), how, [part.kind for part in self._parts], self._skip_bad]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def describe(self) -> str:
        """What was recognised, for people: files, format, columns, what is left out, the first record."""
        lines = [
            f"{len(self._parts)} file{'s' if len(self._parts) != 1 else ''}: {', '.join(self.files[:5])}"
            + (f" and {len(self.files) - 5} more" if len(self.files) > 5 else "")
        ]
        used = ", ".join(f"{role} <- {column!r}" for role, column in self.columns.items())
        lines.append(f"format: {self.format} ({', '.join(sorted({part.kind for part in self._parts}))}); {used}")
        if self.template is not None:
            lines.append(f"template: {shown(self.template.prompt + self.template.completion, 120)}")
        first = next(self.rows(), None)
        if first is not None:
            row, record = first
            held = {*self.columns.values(), *(self.template.columns if self.template else ())}
            left = [shown(str(name), 40) for name in row.values if name not in held]
            lines += [f"left out: {', '.join(left)}"] if left else []
            lines.append(f"first: {shown(input_text(record), 100)}")
            lines += [f"    -> {shown(output_text(record), 100)}"] if output_text(record) else []
        return printable("\n".join([*lines, *(f"note: {note}" for note in self.notes)]))


class Part:
    """One file or hub data set and how it is read."""

    def __init__(self, source: DataFile | HubRows, kind: str) -> None:
        self.source = source
        self.kind = kind
        self.name = source.name

    def rows(self) -> Iterator[Row | BadRow]:
        """Every row; DataError if the file is not the one that was found."""
        if isinstance(self.source, HubRows):
            return iter(self.source)
        self.source.check_unchanged()
        return read_rows(self.source, self.kind)

    def sha256(self) -> str:
        """Of the content."""
        if isinstance(self.source, HubRows):
            digest = hashlib.sha256()
            for piece in self.source.content():
                digest.update(piece)
            return digest.hexdigest()
        self.source.check_unchanged()
        with open(self.source.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def read_records(
    spec: Spec,
    *,
    stage: str,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    template: str | Mapping[str, str] | Template | None = None,
    report_bad: Callable[[BadRow], None] | None = None,
) -> RecordSet:
    """The records of `spec` for a stage: a file, folder, glob, `owner/name[:split]` on the hub, or a list of these.

    `columns` names columns by role (`{"text": "review", "label": "stars"}`; with a template, by placeholder).
    DataError if something is missing or empty, or if it is in doubt which columns are meant.
    """
    if stage not in STAGES:
        raise DataError(f"stage {stage!r} is not known; stages are {', '.join(STAGES)}")
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"data.on_bad_row: {on_bad_row!r} is not known; it is error or skip")
    found = find(spec)
    parts = _parts(found.files, found.hub, stage, format)
    made = None if template is None else get_template(template, answered=stage == "sft")
    samples = _samples(parts, skip=on_bad_row == "skip")
    layout = _layout(samples, stage, format, dict(columns or {}), made)
    skip = on_bad_row == "skip"
    notes = (*found.notes, *remarks(samples, answer_column(layout.columns, made)))
    return RecordSet(parts, layout, stage=stage, template=made, skip_bad=skip, report_bad=report_bad, notes=notes)


def _parts(files: tuple[DataFile, ...], hub: tuple[str, ...], stage: str, format: str | None) -> tuple[Part, ...]:
    parts: list[Part] = []
    problems: list[str] = []
    for file in files:
        try:
            kind = kind_of(file)
        except DataError as error:
            problems.append(str(error))
            continue
        by_line = kind == "text" and (format == "lines" or stage not in ("pretrain", "mlm"))
        parts.append(Part(file, "lines" if by_line else kind))
    if problems:
        raise several(problems, DataError)
    return (*parts, *(Part(HubRows(name), "hub") for name in hub))


def _samples(parts: tuple[Part, ...], *, skip: bool) -> list[tuple[str, list[Mapping[str, object]]]]:
    """The first good rows of each file; DataError if a file has none (unless told to skip: none where one may look)."""
    samples: list[tuple[str, list[Mapping[str, object]]]] = []
    for part in parts:
        good: list[Mapping[str, object]] = []
        bad: list[BadRow] = []
        for row in part.rows():
            if isinstance(row, Row):
                good.append(row.values)
            else:
                bad.append(row)
            if len(good) + (0 if skip else len(bad)) >= _SAMPLED_ROWS:
                break
        if bad and not good:
            raise refuse(bad[:MAX_LISTED], more=len(bad) > MAX_LISTED)
        if not good:
            raise DataError(f"{part.name}: there are no rows in it; give at least one")
        samples.append((part.name, good))
    return samples


def _layout(
    samples: list[tuple[str, list[Mapping[str, object]]]],
    stage: str,
    format: str | None,
    columns: dict[str, str],
    template: Template | None,
) -> Layout:
    """The one layout of all files; DataError naming the files that do not fit the first."""
    name, rows = samples[0]
    named = (*columns.values(), *(template.columns if template is not None else ()))
    survey = Survey([own_columns(row, named) for row in rows])
    layout = (
        recognise(survey, stage=stage, name=format, given=columns, where=name)
        if template is None
        else _templated_layout(survey, stage, columns, template, name)
    )
    problems = []
    for other, their_rows in samples[1:]:
        theirs = Survey(their_rows).columns
        missing = sorted({c for c in layout.columns.values() if c not in theirs and c in survey.columns} - {""})
        if missing:
            problems.append(
                f"{other}: has no column {', '.join(missing)} as {name} has; it has {', '.join(theirs)}. "
                "Files read together have the same columns: name them apart, or mix them (data.mix)"
            )
    if problems:
        raise several(problems, DataError)
    return layout


def _templated_layout(survey: Survey, stage: str, columns: dict[str, str], template: Template, where: str) -> Layout:
    """Columns by placeholder; a placeholder that is no column is looked for by its role."""
    roles = dict(columns)
    extra = {"classify": ("label",), "reward": ("chosen", "rejected"), "dpo": ("chosen", "rejected")}.get(stage, ())
    named = template.columns if stage in COMPLETED else tuple(dict.fromkeys(placeholders(template.prompt)))
    guessed: Mapping[str, str] = {}
    if any(role not in roles and role not in survey.columns for role in (*named, *extra)):
        guessed = _guess(survey, stage, where)
    problems = []
    for role in (*named, *extra):
        column = roles.get(role) or (role if role in survey.columns else guessed.get(role))
        if column is None or column not in survey.columns:
            problems.append(
                f"{where}: template placeholder {{{role}}} is no column; columns are: "
                f"{', '.join(survey.columns)}. Name it: data.columns: {{{role}: COLUMN}}"
            )
        else:
            roles[role] = column
    if stage == "sft" and not template.completion:
        problems.append("the template has no completion to learn; it needs two placeholders, the last for the answer")
    if problems:
        raise several(problems, DataError)
    return Layout("template", roles)


def _guess(survey: Survey, stage: str, where: str) -> Mapping[str, str]:
    try:
        return recognise(survey, stage=stage, where=where).columns
    except DataError:
        return {}
