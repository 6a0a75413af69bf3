"""The records of a run: every data source of the recipe opened, parts drawn, splits made, rows left out named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.mix import Mixed
from tunesmith.data.part import drawn_part
from tunesmith.data.records import RecordSet, read_records
from tunesmith.data.split import Subset, narrowed, split_records
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe
from tunesmith.recipe_data import DataSource, MixPart, as_source

Records = Any
"""Anything that gives records again and again and has a fingerprint."""


@dataclass(frozen=True, slots=True)
class Sets:
    """The records of a run by what they are for."""

    train: Records
    eval: Records | None
    test: Records | None


def read_sets(recipe: Recipe, folder: Path) -> Sets:
    """Open every data source of the recipe; nothing is held in memory."""
    data = recipe.data

    def read(named: str | DataSource | MixPart) -> RecordSet | Subset:
        own = named if isinstance(named, MixPart) else None
        source = named if isinstance(named, MixPart) else as_source(named)
        records = read_records(
            locate(source.path, folder), stage=recipe.stage, format=(own and own.format) or data.format,
            columns=(own and own.columns) or data.columns, on_bad_row=data.on_bad_row,
            template=data.asked_by(own and own.template),
        )  # fmt: skip
        if source.rows is None:
            return records
        return drawn_part(records, source.rows, seed=source.seed, balance=source.balance)

    def narrow(records: RecordSet | Subset) -> RecordSet | Subset:
        return narrowed(records, key=data.group_key, max_per_key=data.max_per_key,
                        personal=data.on_personal == "keep", seed=recipe.seed)  # fmt: skip

    if data.mix is not None:
        parts = [(narrow(read(part)), part.weight) for part in data.mix]
        train: Records = Mixed(parts, recipe.seed)
    else:
        assert data.train is not None, "the recipe is checked"
        train = read(data.train)
    held_out = read(data.eval) if data.eval is not None else None
    test = read(data.test) if data.test is not None else None
    if data.split is not None:
        train, split_eval, split_test = _split(recipe, train)
        held_out, test = held_out or split_eval, test or split_test
    return Sets(train if isinstance(train, Mixed) else narrow(train), held_out, test)


def _split(recipe: Recipe, records: Records) -> tuple[Records, Records | None, Records | None]:
    """(train, eval, test) as `data.split` shares them out; a share of 0 gives None."""
    split = recipe.data.split
    assert split is not None
    if isinstance(records, Mixed):
        raise RecipeError(
            "data.split cannot divide data.mix; name data.eval and data.test, or split the parts beforehand"
        )
    shares = {"train": 1.0 - split.eval - split.test, "eval": split.eval, "test": split.test}
    if shares["train"] <= 0:
        raise RecipeError(f"data.split holds out {split.eval + split.test:g} of the rows; leave some to train on")
    kept = {name: share for name, share in shares.items() if share > 0}
    parts = dict(zip(kept, split_records(records, kept, recipe.seed, group_key=recipe.data.group_key), strict=True))
    return parts["train"], parts.get("eval"), parts.get("test")


def locate(spec: str, folder: Path) -> str:
    """A path of the recipe, `FOLDER:split` too: relative to the recipe's folder when something is there, else as it
    stands."""
    if Path(spec).is_absolute():
        return spec
    beside, split_of = (folder / Path(text).expanduser() for text in (spec, spec.rpartition(":")[0]))
    found = beside.exists() or (":" in spec and split_of != folder and split_of.is_dir())
    if found or (any(c in spec for c in "*?[") and list(folder.glob(spec))):
        return str(beside)
    return spec


def bad_rows(sets: Sets) -> tuple[dict[str, str], ...]:
    """The rows passed over (the first 1,000 of each data set), once each although parts of a split share their file."""
    found: dict[str, dict[str, str]] = {}
    for name, records in (("training", sets.train), ("held-out", sets.eval), ("test", sets.test)):
        for row in () if records is None else records.bad_rows:
            found.setdefault(row.origin, {"set": name, **row.as_dict()})
    return tuple(found.values())


def left_out(sets: Sets) -> list[str]:
    """Rows passed over under `data.on_bad_row: skip`, counted and, the first of them, named."""
    found = []
    for name, records in (("training", sets.train), ("held-out", sets.eval), ("test", sets.test)):
        if records is not None and records.num_bad:
            first = [str(row.origin) for row in records.bad_rows[:5]]
            where = f" ({', '.join(first)}{', ...' if records.num_bad > len(first) else ''})" if first else ""
            found.append(f"warning: {records.num_bad:,} bad {name} rows left out{where}")
    return found


def narrowings(sets: Sets) -> list[str]:
    """What the recipe leaves out of each data set for good, once where the parts of a split share it.

    Of held-out and test rows also what was remarked while reading, as their description is not shown.
    """
    found: dict[str, str] = {}
    for name, records in (("training", sets.train), ("held-out", sets.eval), ("test", sets.test)):
        noted = records.notes if records is not None and name != "training" else ()
        for text in () if records is None else (*records.narrowed, *noted):
            found.setdefault(text, f"{name}: {text}")
    return list(found.values())
