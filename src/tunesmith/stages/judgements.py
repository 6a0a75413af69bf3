"""Files of people's judgements: comparisons of two systems for Elo ratings, and ratings from 1 to 7."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.data.readers import kind_of, read_rows
from tunesmith.data.rows import MAX_LISTED, BadRow, Row, RowError, bad_row
from tunesmith.data.sources import find
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.elo import SCORES, Judgement, rate
from tunesmith.evaluate.ratings import HIGHEST, LOWEST, Rating, mean_ratings, rating_differences

Json = dict[str, Any]
Made = TypeVar("Made")
_COMPARED = "a row is {a: SYSTEM, b: SYSTEM, winner: a | b | tie}, or one that `winrate` wrote"
_RATED = "a row is {system: NAME, rating: 1 to 7} and, where known, the `item` that was answered"


def elo(files: Sequence[str | Path], *, seed: int = 0) -> Json:
    """`{ratings: {system: {value, low, high, n}}, differences: [...], judgements, ties, unclear, files}`.

    Rows of `winrate` whose verdict is unclear are left out and counted. `DataError` lists every row that is none;
    `RecipeError` for a negative seed.
    """
    if seed < 0:
        raise RecipeError(f"seed is {seed}; it is 0 or more")
    read = _read(files, _judgement, _COMPARED)
    kept = [one for one in read if one is not None]
    if not kept:
        raise DataError(f"{_names(files)}: no judgement names a winner")
    found = rate(kept, seed=seed)
    return {
        "ratings": {name: estimate.as_json() for name, estimate in found.estimates().items()},
        "differences": found.differences(), "judgements": len(kept),
        "ties": sum(one.winner == "tie" for one in kept), "unclear": len(read) - len(kept),
        "files": [str(file) for file in files],
    }  # fmt: skip


def ratings(files: Sequence[str | Path]) -> Json:
    """`{ratings: {system: {value, low, high, n}}, differences: [...], count, files}`.

    `DataError` lists every row whose rating is not from 1 to 7.
    """
    read = _read(files, _rating, _RATED)
    return {
        "ratings": {name: estimate.as_json() for name, estimate in mean_ratings(read).items()},
        "differences": rating_differences(read), "count": len(read), "files": [str(file) for file in files],
    }  # fmt: skip


def _read(files: Sequence[str | Path], make: Callable[[Mapping[str, Any]], Made], advice: str) -> list[Made]:
    """Every row of the files as `make` has it; all bad rows are refused together, by `file:line`."""
    good: list[Made] = []
    bad: list[BadRow] = []
    for row in _rows(files):
        try:
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                good.append(make(row.values))
        except _Bad as error:
            assert isinstance(row, Row)
            bad.append(bad_row(row.origin, RowError(str(error), advice), row.raw or row.values))
    if bad:
        more = f"\n  and {len(bad) - MAX_LISTED:,} more" if len(bad) > MAX_LISTED else ""
        listed = "\n".join(f"  - {row}" for row in bad[:MAX_LISTED])
        raise DataError(f"{len(bad):,} bad row{'s' if len(bad) > 1 else ''} found:\n{listed}{more}")
    return good


def _rows(files: Sequence[str | Path]) -> Iterator[Row | BadRow]:
    found = find([str(file) for file in files])
    if found.hub:
        raise DataError(f"{found.hub[0]}: there is no such file")
    for file in found.files:
        yield from read_rows(file, kind_of(file))


def _names(files: Sequence[str | Path]) -> str:
    return ", ".join(str(file) for file in files)


class _Bad(ValueError):
    """What is wrong with a row."""


def _judgement(row: Mapping[str, Any]) -> Judgement | None:
    """A comparison; None for one whose judge did not say."""
    judged = row.get("judged")
    names, winner = (judged, row.get("verdict")) if isinstance(judged, Mapping) else (row, row.get("winner"))
    a, b = (_name(names, key) for key in ("a", "b"))
    if a == b:
        raise _Bad(f"{a!r} is compared with itself")
    if isinstance(judged, Mapping) and winner == "unclear":
        return None
    if not isinstance(winner, str) or winner not in SCORES:
        raise _Bad(f"the winner is {winner!r:.60}, which is none of {', '.join(SCORES)}")
    return Judgement(a, b, winner)


def _rating(row: Mapping[str, Any]) -> Rating:
    given, item = row.get("rating"), row.get("item")
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise _Bad(f"the rating is {given!r:.60}, which is no number")
    try:
        value = float(given)
    except (ValueError, OverflowError):
        raise _Bad(f"the rating is {given!r:.60}, which is no number") from None
    if not LOWEST <= value <= HIGHEST:
        raise _Bad(f"the rating is {value:g}, which is not from {LOWEST:g} to {HIGHEST:g}")
    return Rating(_name(row, "system"), value, None if item in (None, "") else str(item))


def _name(row: Mapping[str, Any], key: str) -> str:
    found = row.get(key)
    if not isinstance(found, str) or not found.strip():
        raise _Bad(f"`{key}` names no system" if key in row else f"there is no `{key}`")
    return found
