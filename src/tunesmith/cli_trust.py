"""The commands about trust, before a run and after it: selftest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli_output import table

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values over the recipe's.")]
Give = Callable[[Any, bool, Callable[[Any], Iterable[str]]], None]
Say = Callable[[str], None]


def register(app: typer.Typer, give: Give, say: Say) -> None:
    """Add the commands to `app`."""

    @app.command()
    def selftest(
        recipe: Annotated[str | None, typer.Argument(help="A recipe; without one, the embedded model.")] = None,
        overrides: Overrides = None,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Try the laws of training on your own model and machine; exit code 1 when one does not hold."""
        from tunesmith import api

        result = api.selftest(recipe, overrides or (), say=say)
        give(result, as_json, _selftest_lines)
        if not result["passed"]:
            raise typer.Exit(1)


def _selftest_lines(result: Mapping[str, Any]) -> list[str]:
    rows = [["law", "difference", "allowed", "in", "holds"]]
    for check in result["checks"]:
        error = "-" if check["error"] is None else f"{check['error']:.1e}"
        holds = "not tried" if check["error"] is None else ("yes" if check["passed"] else "NO")
        rows.append([check["name"], error, f"{check['limit']:.0e}", check["unit"], holds])
    return [*table(rows), "", "every law holds" if result["passed"] else "a law does NOT hold on this machine"]
