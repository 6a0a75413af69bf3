"""RecordSet: a user's files as typed records, read from disk again at each pass, never held in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.data import hub, readers
from tunesmith.data.convert import RowProblem, to_record
from tunesmith.data.detect import SAMPLE_ROWS, Format, detect
from tunesmith.data.readers import Bad, Row, shown
from tunesmith.data.records import Chat, Message, Record, Text, normalised, question_of
from tunesmith.data.templates import Template, get_template
from tunesmith.errors import DataError, several

MAX_LISTED = 20


@dataclass(slots=True)
class RecordSet:
    """Records of one source. Iterating raises `DataError` that lists the bad rows, unless they are to be skipped."""

    spec: str
    files: tuple[Path, ...]
    format: Format
    fingerprint: str
    template: Template | None = None
    multi_label: bool = False
    skip_bad: bool = False
    bad: list[Bad] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        self.bad = []
        for file in self.files:
            for row in readers.read_rows(file):
                record = self._convert(row)
                if record is not None:
                    yield record
        if self.bad and not self.skip_bad:
            raise _bad_rows(self.bad)

    def _convert(self, row: Row | Bad) -> Record | None:
        if isinstance(row, Row):
            try:
                return to_record(
                    row.value, row.place, self.format.name, self.format.columns,
                    template=self.template, multi_label=self.multi_label,
                )  # fmt: skip
            except (RowProblem, DataError) as problem:
                row = Bad(row.place, str(problem), shown(row.value))
        self.bad.append(row)
        return None

    def describe(self) -> str:
        """One line: where from, which format."""
        return f"{self.spec}: {self.format}"


def _bad_rows(bad: Sequence[Bad]) -> DataError:
    lines = [str(row) for row in bad[:MAX_LISTED]]
    if len(bad) > MAX_LISTED:
        lines.append(f"and {len(bad) - MAX_LISTED} more")
    headline = f"{len(bad)} row(s) cannot be used; mend them, or leave them out with data.on_bad_row: skip"
    return several(lines, DataError, headline=headline)  # type: ignore[return-value]


def read_records(
    spec: str | Path,
    *,
    stage: str,
    folder: Path | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    multi_label: bool = False,
    on_bad_row: str = "error",
) -> RecordSet:
    """The records that `spec` (file, folder, glob or hub id[:split]) holds for `stage`.

    Raises `DataError` when nothing is there, or when the columns do not say what they are.
    """
    files = readers.find_files(str(spec), folder or Path.cwd())
    if not files:
        files = [hub.fetch(str(spec))]
    built = None if template is None else get_template(template)
    found = _recognise(files, stage, built, format, columns)
    return RecordSet(
        str(spec), tuple(files), found, fingerprint(files), built, multi_label, on_bad_row == "skip"
    )


def _recognise(
    files: Sequence[Path], stage: str, template: Template | None, name: str | None, columns: Mapping[str, str] | None
) -> Format:
    rows: list[Mapping[str, Any]] = []
    bad: list[Bad] = []
    for row in itertools.islice(itertools.chain.from_iterable(map(readers.read_rows, files)), SAMPLE_ROWS):
        if isinstance(row, Bad):
            bad.append(row)
        elif isinstance(row.value, str):
            if stage not in ("pretrain", "mlm"):
                raise DataError(f"{files[0]}: plain text has no answers or labels; stage {stage} wants rows with columns")
            return Format("text", {"text": "(the file)"})
        else:
            rows.append(row.value)
    if not rows:
        raise _bad_rows(bad) if bad else DataError(f"{files[0]}: no rows in it")
    if template is not None and not (columns or name):
        return _fits_template(rows, template, files[0])
    return detect(rows, stage=stage, place=str(files[0]), name=name, given=columns)


def _fits_template(rows: Sequence[Mapping[str, Any]], template: Template, file: Path) -> Format:
    known = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    missing = [name for name in template.columns if name not in known]
    if missing:
        raise DataError(
            f"{file}: the template wants {{{'}, {'.join(missing)}}}, and the columns are {', '.join(known)}; "
            "write the template with these"
        )
    return Format("template", {name: name for name in template.columns})


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 over the bytes of all files, 32 hex digits."""
    digest = sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        digest.update(b"\0file\0")
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Several sets drawn in proportion to their weights until the first is used up, in an order fixed by `seed`."""

    parts: tuple[RecordSet, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def fingerprint(self) -> str:
        """Of all parts, weights and the seed."""
        text = repr([p.fingerprint for p in self.parts] + [self.weights, self.seed])
        return sha256(text.encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Record]:
        draw = random.Random(self.seed)
        iterators = [iter(part) for part in self.parts]
        names = range(len(iterators))
        while True:
            chosen = draw.choices(names, self.weights)[0]
            record = next(iterators[chosen], None)
            if record is None:
                return
            yield record

    def describe(self) -> str:
        """One line per part."""
        return "\n".join(f"{w:g} x {p.describe()}" for p, w in zip(self.parts, self.weights, strict=True))


@dataclass(frozen=True, slots=True)
class Held:
    """One side of a split: the records whose question falls into `[low, high)` of a seeded hash.

    Equal questions (after folding case and white space) always fall on the same side, so the sides are disjoint.
    """

    records: RecordSet | Mixed
    seed: int
    low: float
    high: float

    @property
    def fingerprint(self) -> str:
        """Of the records and the side."""
        return sha256(repr((self.records.fingerprint, self.seed, self.low, self.high)).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Record]:
        for record in self.records:
            key = normalised(question_of(record)) or normalised(repr(record))
            share = int.from_bytes(sha256(f"{self.seed}\0{key}".encode()).digest()[:8], "big") / 2**64
            if self.low <= share < self.high:
                yield record

    def describe(self) -> str:
        """One line."""
        return f"{self.records.describe()} [share {self.low:g} to {self.high:g}]"


Records = RecordSet | Mixed | Held


def split(records: RecordSet | Mixed, *, seed: int, eval: float, test: float) -> tuple[Held, Held, Held]:
    """(train, eval, test), disjoint after normalising; `DataError` when nothing is left to train on."""
    if eval + test >= 1:
        raise DataError(f"data.split holds out {eval + test:g} of the rows; leave some to train on")
    rest = 1 - eval - test
    return (
        Held(records, seed, 0.0, rest), Held(records, seed, rest, rest + eval), Held(records, seed, rest + eval, 1.0)
    )  # fmt: skip


def as_prompt(record: Chat) -> tuple[tuple[Message, ...], str]:
    """(what stands before the last assistant turn, that turn's text)."""
    last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")
    return record.messages[:last], record.messages[last].content


__all__ = ["Held", "Mixed", "RecordSet", "Records", "Text", "as_prompt", "fingerprint", "read_records", "split"]
