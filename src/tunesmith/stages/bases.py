"""Where a recipe's base is, and the device it goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.plan.hardware import choose_device


def settled_device(wanted: str) -> str:
    """The device to use; `RecipeError` when it is not here."""
    try:
        return choose_device(wanted)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def base_path(base: str, folder: Path) -> str:
    """A base given as a folder relative to the recipe, or as it stands (a folder or a hub id); of a finished run, the
    folder of its merged model."""
    beside = folder / Path(base).expanduser()
    path = beside if beside.is_dir() else Path(base).expanduser()
    from tunesmith.stages import from_run  # it opens runs, and a run opens its own base through here

    if from_run.is_run(path):
        return str(from_run.model_folder(path))
    return str(beside) if beside.is_dir() else base


def run_origin(base: str) -> dict[str, Any]:
    """What to record of a base that is a run's merged model: the run and its content."""
    from tunesmith.stages import from_run

    return from_run.origin(base)
