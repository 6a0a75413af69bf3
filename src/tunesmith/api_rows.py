"""The verb about single rows: `tunesmith.api` has it as `runs_rows`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.rundir import model_run, open_run


def runs_rows(run: str | Path, *, top: int = 10, which: str = "train") -> dict[str, Any]:
    """The rows of a run by what they cost: `{expensive, never_learned, mislabelled, duplicates, notes, ...}`.

    `which` is `train` or `eval`; each list has at most `top` rows, with file and line, losses, label and text. Of a
    chain, the rows of the stage that its model comes from. `RunError` when the run kept no losses by row.
    """
    if which not in ("train", "eval"):
        raise RunError(f"there are rows of `train` and of `eval`, not of `{which}`")
    from tunesmith.stages.listing import list_rows

    return list_rows(model_run(open_run(run)), top=top, which=which)
