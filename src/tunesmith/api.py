"""One function per verb: what the command line does, from Python, typed.

import tunesmith
result = tunesmith.train({"stage": "sft", "base": "my-model", "data": {"train": "rows.jsonl", "split": {"eval": 0.1}}})
print(result["before"]["loss"], result["after"]["loss"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RunError
from tunesmith.recipe import Resolved, load_recipe
from tunesmith.rundir import RunDir, create_run, flatten, list_runs, open_run

if TYPE_CHECKING:
    from tunesmith.engine.fit import StepReport

Say = Callable[[str], None]
RecipeLike = str | Path | Mapping[str, Any] | Resolved


def _silent(_: Any) -> None:
    return None


def _resolved(recipe: RecipeLike, overrides: Sequence[str]) -> Resolved:
    return recipe if isinstance(recipe, Resolved) else load_recipe(recipe, overrides)


def train(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    run: str | None = None,
    say: Say = _silent,
    show: Callable[[StepReport], None] = _silent,
) -> dict[str, Any]:
    """Train, measure before and after, write the report; returns what is in the run's result.json.

    `recipe` is a file, a mapping or a resolved recipe; `overrides` are `key.path=value`; `run` is the run's name under
    ./runs or a folder. Raises a `TunesmithError` for anything the user can mend; `Interrupted` after a signal, with a
    checkpoint saved.
    """
    resolved = _resolved(recipe, overrides)
    folder = create_run(run or resolved.recipe.run, stage=resolved.recipe.stage)
    folder.lock()
    try:
        from tunesmith.stages import running

        return running.start(folder, resolved, say=say, show=show)
    finally:
        folder.unlock()


def resume(run: str | Path, *, say: Say = _silent, show: Callable[[StepReport], None] = _silent) -> dict[str, Any]:
    """Go on with an interrupted run from its newest sound checkpoint; a finished one gives its result again."""
    folder = open_run(run)
    if folder.finished:
        say(f"{folder.path} is finished; this is its result")
        return dict(folder.read_json("result"))
    folder.lock()
    try:
        from tunesmith.stages import running

        return running.go_on(folder, say=say, show=show)
    finally:
        folder.unlock()


def evaluate(
    run_or_model: str | Path, data: str | Path, *, stage: str | None = None, say: Say = _silent
) -> dict[str, Any]:
    """Measure a run's tuned model, or any model folder or hub id, on `data`; `{metric: {value, low, high, n}}`."""
    from tunesmith.stages import using

    return using.evaluate(run_or_model, str(data), stage=stage, say=say)


def predict(run: str | Path, texts: Sequence[str], *, say: Say = _silent) -> list[dict[str, Any]]:
    """Labels with probabilities (classify) or greedy completions (the other causal stages) for `texts`."""
    from tunesmith.stages import using

    return using.predict(open_run(run), list(texts), say=say)


def chat(run: str | Path, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> str:
    """The tuned model's completion of one prompt, through the template it was trained with."""
    from tunesmith.stages import using

    return using.chat(open_run(run), prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)


def check(recipe_or_data: RecipeLike, overrides: Sequence[str] = (), *, say: Say = _silent) -> dict[str, Any]:
    """Everything a run would notice before its first step; for a data file, what it is recognised as."""
    from tunesmith.stages import checking

    if isinstance(recipe_or_data, (str, Path)) and Path(recipe_or_data).suffix not in (".yaml", ".yml"):
        return checking.check_data(str(recipe_or_data))
    return checking.check_recipe(_resolved(recipe_or_data, overrides), say=say)


def export(run: str | Path, to: str | Path, format: str = "adapter", *, say: Say = _silent) -> dict[str, Any]:
    """Write the tuned model to `to` as PEFT's adapter folder or as a merged transformers model, verified."""
    from tunesmith.stages import using

    return using.export(open_run(run), Path(to), format, say=say)


def runs_list(root: str | Path = "runs") -> list[dict[str, Any]]:
    """One row per run, oldest first: name, stage, state, the main figures."""
    return [_row(run) for run in list_runs(root)]


def _row(run: RunDir) -> dict[str, Any]:
    if not run.finished:
        return {"run": run.name, "finished": False}
    result = run.read_json("result")
    keep = ("stage", "base", "method", "verdict", "trainable_parameters", "seconds")
    return {"run": run.name, "finished": True, **{key: result.get(key) for key in keep}}


def runs_show(run: str | Path) -> dict[str, Any]:
    """A run's result, or how far it got."""
    folder = open_run(run)
    if folder.finished:
        return dict(folder.read_json("result"))
    return {"run": folder.name, "finished": False, "note": f"go on with `tunesmith train --resume {folder.path}`"}


def runs_diff(a: str | Path, b: str | Path) -> dict[str, Any]:
    """What two runs do differently (`recipe`) and what came out (`after`), key by key, as [a, b]."""
    first, second = open_run(a), open_run(b)
    return {
        "recipe": _differences(_settings(first), _settings(second)),
        "after": _differences(_figures(first), _figures(second)),
    }


def _settings(run: RunDir) -> dict[str, Any]:
    from tunesmith.recipe import load_resolved

    return flatten(load_resolved(run.file("recipe")).model_dump(exclude={"run"}, exclude_none=True))


def _figures(run: RunDir) -> dict[str, Any]:
    if not run.finished:
        raise RunError(f"{run.path} is not finished; go on with `tunesmith train --resume {run.path}`")
    result = run.read_json("result")
    figures = {name: entry["value"] for name, entry in (result.get("after") or {}).items()}
    return {**figures, "seconds": result["seconds"], "trainable_parameters": result["trainable_parameters"]}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = [*a, *(key for key in b if key not in a)]
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}
