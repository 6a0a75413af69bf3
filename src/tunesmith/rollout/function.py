"""The user's own reward function: `reward(prompts, completions, **columns) -> list[float]` from a file they name."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.rollout.rewards import Completed, Score

OWN = ("prompts", "completions")


def load_function(path: Path, name: str, key: str = "reward.function") -> Callable[..., Any]:
    """The function `name` of the Python file `path`, which runs as what it is: the user's own code.

    `key` is what named it, for messages.

    Raises `RecipeError` when the file is missing, cannot be run, or has no such function.
    """
    if not path.is_file():
        raise RecipeError(f"{key}: there is no file {path}")
    own_name = f"reward_function_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(own_name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module  # where dataclasses and pickling look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does when it is imported
        raise RecipeError(f"{key}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == own_name]
        raise RecipeError(f"{key}: {path} has no function `{name}`; it has {', '.join(known) or 'none'}")
    return found


def scored_by(function: Callable[..., Any], columns: Sequence[str], where: str) -> Score:
    """`function(prompts, completions, **columns)` as a score; it gets the columns that it asks for, lists all.

    Raises `RecipeError` when it cannot be called so, or asks for a column that the rows do not have.
    """
    wanted = _wanted(function, columns, where)

    def score(items: Sequence[Completed]) -> Sequence[float]:
        given = {name: [_column(item, name) for item in items] for name in wanted}
        return function([item.prompt for item in items], [item.completion for item in items], **given)

    return score


def _column(item: Completed, name: str) -> object:
    return item.columns.get(name, item.answer if name == "answer" else None)


def _wanted(function: Callable[..., Any], columns: Sequence[str], where: str) -> list[str]:
    known = [name for name in dict.fromkeys([*columns, "answer"]) if name.isidentifier() and name not in OWN]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return known
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [p for p in parameters if p.kind in plain]
    if len(first) < 2 and not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        raise RecipeError(f"reward.function: {where} must take (prompts, completions, **columns)")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return known
    asked = [p for p in parameters if p not in first[:2] and p.kind is not inspect.Parameter.VAR_POSITIONAL]
    missing = [p.name for p in asked if p.name not in known and p.default is inspect.Parameter.empty]
    if missing:
        raise RecipeError(
            f"reward.function: {where} asks for {', '.join(missing)}, and the prompts' rows have {', '.join(known)}"
        )
    return [p.name for p in asked if p.name in known]
