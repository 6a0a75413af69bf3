"""`tunesmith runs rows`: single rows by what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from tunesmith.cli_output import table

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Give = Callable[[Any, bool, Callable[[Any], Iterable[str]]], None]
_TITLES = {
    "expensive": "most expensive at the last visit",
    "never_learned": "never learned",
    "mislabelled": "probably mislabelled, the likeliest first",
}


def register(runs: typer.Typer, give: Give) -> None:
    """Add the command to `tunesmith runs`."""

    @runs.command()
    def rows(
        run: str,
        *,
        top: Annotated[int, typer.Option("--top", min=1, help="Rows in each list.")] = 10,
        which: Annotated[str, typer.Option("--set", help="train or eval.")] = "train",
        as_json: AsJson = False,
    ) -> None:
        """Rows of a run that cost most, were never learned, are probably mislabelled, or stand there twice."""
        from tunesmith import api

        give(api.runs_rows(run, top=top, which=which), as_json, rows_lines)


def rows_lines(found: Mapping[str, Any]) -> list[str]:
    """The lists as people read them."""
    lines = [f"{found['rows']:,} rows of {found['set']}, {found['run']} ({found['stage']})"]
    for key, title in _TITLES.items():
        if found[key]:
            lines += ["", f"{title}:", *_rows(found[key])]
    if found["duplicates"]:
        lines += ["", "standing there more than once:", *_groups(found["duplicates"])]
    return [*lines, *(f"note: {note}" for note in found["notes"])]


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["row", "label", "first", "last", "visits", "text"]
    body = [
        [row["origin"], _word(row["label"]), f"{row['first']:.3f}", f"{row['last']:.3f}", str(row["visits"]),
         _word(row["text"])[:90]]
        for row in rows
    ]  # fmt: skip
    return [f"  {line}" for line in table([head, *body], right=False)]


def _groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    body = [
        [
            " = ".join(group["rows"]),
            group["kind"],
            "labels differ" if group["conflict"] else "",
            _word(group["text"])[:90],
        ]
        for group in groups
    ]
    return [f"  {line}" for line in table([["rows", "kind", "", "text"], *body], right=False)]


def _word(text: Any) -> str:
    return "-" if text is None else str(text)
