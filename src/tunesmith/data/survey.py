"""What a sample of the rows shows of each column: its kind, what it asks, how it is named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

IGNORED = (
    "id", "idx", "index", "uid", "uuid", "guid", "nr", "no", "number", "url", "link", "source_url", "date", "timestamp",
    "created_at", "name", "split", "datum",
)  # fmt: skip


@dataclass(slots=True)
class Column:
    """What the sample shows of one column. Shares are of the rows that have it."""

    name: str
    num_rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    num_asking: int = 0
    num_numeric: int = 0
    num_chars: int = 0
    values: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        """text, number, messages, turns, instances, list, object or null: the most frequent that is not null."""
        real = {kind: count for kind, count in self.kinds.items() if kind != "null"}
        return max(real, key=lambda kind: real[kind]) if real else "null"

    @property
    def asks(self) -> float:
        """Share of values that end in a question mark."""
        return self.num_asking / max(self.num_rows, 1)

    @property
    def is_numeric(self) -> bool:
        """True where every text is a number, as ids and counts are in a CSV file."""
        return self.num_numeric == self.num_rows

    @property
    def is_class_like(self) -> bool:
        """True where few different short values come again and again."""
        few = len(self.values) * 2 <= self.num_rows and len(self.values) >= 2
        return self.kind in ("text", "number") and few and self.num_chars <= 40 * self.num_rows


class Survey:
    """The columns that at least half of the sampled rows have, in file order."""

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self.num_rows = len(rows)
        seen: dict[str, Column] = {}
        for row in rows:
            for name, value in row.items():
                column = seen.setdefault(name, Column(name))
                kind = kind_of_value(value)
                column.num_rows += 1
                column.kinds[kind] = column.kinds.get(kind, 0) + 1
                column.values.add(str(value)[:200])
                if isinstance(value, str):
                    column.num_asking += value.rstrip().endswith(("?", "？"))
                    column.num_numeric += _is_number(value)
                    column.num_chars += len(value)
        self.columns = {name: c for name, c in seen.items() if c.num_rows * 2 >= len(rows)}
        self._folded = {fold(name): name for name in reversed(self.columns)}

    def find(self, name: str, *kinds: str) -> str | None:
        """The column of that name (case and -/space/_ aside), if its values are of these kinds."""
        found = self._folded.get(name)
        return found if found is not None and (not kinds or self.columns[found].kind in kinds) else None

    def first(self, names: Sequence[str], *kinds: str) -> str | None:
        """The first of `names` that is a column of these kinds."""
        return next((found for name in names if (found := self.find(name, *kinds))), None)

    def all(self, names: Sequence[str], *kinds: str) -> list[str]:
        """Every one of `names` that is a column of these kinds."""
        return list(dict.fromkeys(found for name in names if (found := self.find(name, *kinds))))

    def texts(self) -> list[str]:
        """Columns of text that are not ids, dates and the like, nor numbers beside other text."""
        named = [c for c in self.columns.values() if c.kind == "text" and fold(c.name) not in IGNORED]
        words = [c for c in named if not c.is_numeric]
        return [c.name for c in (named if len(named) == 2 else words)]

    def speaking(self, names: Sequence[str]) -> list[str]:
        """Columns of text in whose names one of `names` stands, as `question` in `my_question`."""
        return [name for name in self.texts() if any(_stands_in(word, name) for word in names)]


def _stands_in(word: str, name: str) -> bool:
    parts = re.split(r"[^\w]+|_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    return word in (part.casefold() for part in parts) or (len(word) >= 5 and word in name.casefold())


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[-+]?[\d.,]*\d\s*", text))


def fold(name: str) -> str:
    """How column names are compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def kind_of_value(value: object) -> str:
    """text, number, messages (role/content), turns (from/value), instances (output), list, object or null."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, list | tuple):
        heads = [set(item) for item in value if isinstance(item, Mapping)]
        if heads and len(heads) == len(value):
            if all("role" in head for head in heads):
                return "messages"
            if all("from" in head for head in heads):
                return "turns"
            if all("output" in head for head in heads):
                return "instances"
        return "list"
    return "object"
