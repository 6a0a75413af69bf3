"""What a sample of the rows shows of each column: its kind, what it asks, how it is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

IGNORED = [
    "id",
    "idx",
    "index",
    "uid",
    "uuid",
    "guid",
    "url",
    "link",
    "source_url",
    "date",
    "timestamp",
    "created_at",
    "name",
    "split",
]


@dataclass(slots=True)
class Column:
    """What the sample shows of one column. Shares are of the rows that have it."""

    name: str
    num_rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    num_asking: int = 0

    @property
    def kind(self) -> str:
        """text, number, messages, turns, list, object or null: the most frequent that is not null."""
        real = {kind: count for kind, count in self.kinds.items() if kind != "null"}
        return max(real, key=lambda kind: real[kind]) if real else "null"

    @property
    def asks(self) -> float:
        """Share of values that end in a question mark."""
        return self.num_asking / max(self.num_rows, 1)


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
                column.num_asking += isinstance(value, str) and value.rstrip().endswith(("?", "？"))
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
        """Columns of text that are not ids, dates and the like."""
        return [c.name for c in self.columns.values() if c.kind == "text" and fold(c.name) not in IGNORED]


def fold(name: str) -> str:
    """How column names are compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def kind_of_value(value: object) -> str:
    """text, number, messages (role/content), turns (from/value), list, object or null."""
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
        return "list"
    return "object"
