"""One function per verb: what the command line does, from Python, typed.

import tunesmith
result = tunesmith.train({"stage": "sft", "base": "my-model", "data": {"train": "rows.jsonl", "split": {"eval": 0.1}}})
print(result["before"]["loss"], result["after"]["loss"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api_preferences import elo as elo
from tunesmith.api_preferences import rank as rank
from tunesmith.api_preferences import ratings as ratings
from tunesmith.api_preferences import sample as sample
from tunesmith.api_preferences import winrate as winrate
from tunesmith.api_rows import runs_rows as runs_rows
from tunesmith.api_trust import compare as compare
from tunesmith.api_trust import plan as plan
from tunesmith.api_trust import selftest as selftest
from tunesmith.errors import RunError
from tunesmith.recipe import Resolved, known_keys, load_recipe
from tunesmith.recipe_chain import is_chain_recipe, load_chain, load_saved
from tunesmith.rundir import (
    NAME,
    RunDir,
    chain_run,
    create_run,
    flatten,
    is_chain,
    list_runs,
    model_run,
    open_run,
    refuse_outside,
    refuse_taken,
)

if TYPE_CHECKING:
    from tunesmith.engine.fit import StepReport

Say = Callable[[str], None]
RecipeLike = str | Path | Mapping[str, Any] | Resolved


def _place(recipe: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` put where they belong: whole sections by name, single keys into the first section that has them."""
    sections = dict.fromkeys(key.partition(".")[0] for key in known_keys() if "." in key)
    order = list(dict.fromkeys([recipe["stage"], "tune", "train", "data", *sections]))
    for name, value in settings.items():
        section = next((s for s in order if f"{s}.{name}" in known_keys()), None)
        if name in sections and isinstance(value, Mapping):
            recipe[name] = {**recipe.get(name, {}), **value}
        elif section is not None and name not in known_keys():
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[name] = value  # a key of its own; one that does not exist is refused with the nearest name
    return recipe


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

    A recipe with a list of `stages` is a chain: run NAME again, and only the stages whose settings, data or start have
    changed are trained anew. Its name is that of the recipe's file unless the recipe or `run` gives one.
    """
    if not isinstance(recipe, Resolved) and is_chain_recipe(recipe):
        return _train_chain(recipe, overrides, run, say=say, show=show)
    resolved = _resolved(recipe, overrides)
    if run is None and resolved.recipe.run is not None:
        refuse_outside(resolved.recipe.run)
    folder = create_run(run or resolved.recipe.run, stage=resolved.recipe.stage)
    try:
        folder.lock()
        refuse_taken(folder.path)
        from tunesmith.stages import running

        return running.start(folder, resolved, say=say, show=show)
    finally:
        if folder.locked:
            folder.discard()
        folder.unlock()


def _train_chain(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    run: str | None,
    *,
    say: Say,
    show: Callable[[StepReport], None],
) -> dict[str, Any]:
    chain = load_chain(recipe, overrides)
    stem = "" if isinstance(recipe, Mapping) else Path(recipe).stem
    folder = chain_run(run or chain.run or (stem if NAME.match(stem) else None))
    try:
        folder.lock()
        from tunesmith.stages import chain as chains

        return chains.start(folder, chain, say=say, show=show)
    finally:
        if folder.locked:
            folder.discard()
        folder.unlock()


def finetune(
    base: str | Path,
    data: str | Path | Mapping[str, Any],
    stage: str,
    method: str = "lora",
    *,
    say: Say = _silent,
    show: Callable[[StepReport], None] = _silent,
    **settings: Any,
) -> dict[str, Any]:
    """Train `base` on `data` and measure before and after; returns what is in the run's result.json.

    `data` is a file, folder or hub id, of which a tenth is held out, or the recipe's `data` section. `settings` are the
    recipe's other keys, whole sections (`train={"epochs": 3}`) or single ones by their own name (`epochs=3, rank=16`).
    """
    section: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"train": str(data)}
    if not {"eval", "split"} & set(section):
        section["split"] = {"eval": 0.1}
    recipe = {"stage": stage, "base": str(base), "data": section, "tune": {"method": method}}
    return train(_place(recipe, settings), say=say, show=show)


def quickstart(
    stage: str = "classify",
    overrides: Sequence[str] = (),
    *,
    folder: str | Path = "quickstart",
    say: Say = _silent,
    show: Callable[[StepReport], None] = _silent,
) -> dict[str, Any]:
    """Run a stage, or `chain`, on the embedded base and data; the recipe and its data are left in `folder` to edit.

    Returns the run's result with `recipe`, `examples` before and after, and `next`: (command, what it is for).
    """
    from tunesmith.start import quickstart as first

    recipe, name = first.lay_out(stage, Path(folder)), first.free_name(stage)
    say(f"recipe: {recipe}")
    result = train(recipe, overrides, run=name, say=say, show=show)
    return first.finish(open_run(name), recipe, result, tuple(overrides))


def init(
    stage: str | None = None,
    *,
    data: str | Path | None = None,
    base: str | None = None,
    to: str | Path | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """Write a commented recipe for a stage, or for a data file that is looked at first; `{recipe, stage, notes}`.

    `to` is the new file (STAGE.yaml when not named); one that exists is never overwritten (`RecipeError`).
    """
    from tunesmith.start import starter

    return starter.write(stage, data=None if data is None else str(data), base=base, to=to, say=say)


def resume(run: str | Path, *, say: Say = _silent, show: Callable[[StepReport], None] = _silent) -> dict[str, Any]:
    """Go on with an interrupted run from its newest sound checkpoint; a finished one gives its result again."""
    folder = open_run(run)
    if is_chain(folder):
        return _resume_chain(folder, say=say, show=show)
    if folder.finished:
        say(f"{folder.path} is finished; this is its result")
        if not (folder.file("report").is_file() and folder.file("card").is_file()):
            from tunesmith.stages import running

            running.write_pages(folder)
        return dict(folder.read_json("result"))
    folder.lock()
    try:
        from tunesmith.stages import running

        return running.go_on(folder, say=say, show=show)
    finally:
        folder.unlock()


def _resume_chain(folder: RunDir, *, say: Say, show: Callable[[StepReport], None]) -> dict[str, Any]:
    if folder.finished and folder.file("report").is_file():
        say(f"{folder.path} is finished; this is its result")
        return dict(folder.read_json("result"))
    folder.lock()
    try:
        from tunesmith.stages import chain as chains

        return chains.go_on(folder, say=say, show=show)
    finally:
        folder.unlock()


def evaluate(
    run_or_model: str | Path,
    data: str | Path,
    *,
    stage: str | None = None,
    metrics: Sequence[str | Callable[..., Any]] = (),
    rewards: Sequence[str] = (),
    say: Say = _silent,
) -> dict[str, Any]:
    """Measure a run's tuned model, or any model folder or hub id, on `data`; `{metric: {value, low, high, n}}`.

    `metrics` are functions of your own, or `file.py:name`, that judge every row beside the built-in metrics. `rewards`
    are the functions of the run's reward, `file.py:name`: what a run's recipe names does not run unless it is given.
    """
    from tunesmith.stages import using

    return using.evaluate(run_or_model, str(data), stage=stage, metrics=metrics, rewards=rewards, say=say)


def predict(run: str | Path, texts: Sequence[str], *, max_tokens: int = 256) -> list[dict[str, Any]]:
    """Per text, `{text, answer}`: the label with the probabilities of all (classify), else a greedy completion."""
    from tunesmith.stages import using

    return using.predict(model_run(open_run(run)), list(texts), max_tokens=max_tokens)


def annotate(
    run: str | Path, file: str | Path, to: str | Path, *, column: str | None = None, max_tokens: int = 256
) -> list[dict[str, Any]]:
    """`predict` on the rows of a file, which are written to the new file `to` with `prediction` and `correction`.

    The file is training data as it stands: a correction that someone fills in counts instead of the row's answer.
    """
    from tunesmith.stages import annotating

    return annotating.annotate(model_run(open_run(run)), file, Path(to), column=column, max_tokens=max_tokens)


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """The texts of a file for `predict`: a line each of a .txt, else `column` of its rows, or the one that is plain."""
    from tunesmith.data.column import read_column

    return read_column(path, column)


def chat(run: str | Path, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> str:
    """The tuned model's completion of one prompt, through the template it was trained with."""
    return open_chat(run)(prompt, max_tokens, temperature, seed)


def open_chat(run: str | Path) -> Callable[..., str]:
    """`chat` for many prompts: the run is opened once, and `ask(prompt, max_tokens, temperature, seed)` answers."""
    from tunesmith.stages import using

    return using.chat(model_run(open_run(run)))


def check(
    recipe_or_data: RecipeLike, overrides: Sequence[str] = (), *, html: str | Path | None = None, say: Say = _silent
) -> dict[str, Any]:
    """Everything a run would notice before its first step; for a data file, what it is recognised as.

    `html` is a file to which the page of a recipe is written too. Gates that are not passed are a `DataError`.
    """
    from tunesmith.stages import checking

    found = _checked(recipe_or_data, overrides, say=say)
    if html is not None:
        checking.write_page(found, Path(html))
    return found


def _checked(recipe_or_data: RecipeLike, overrides: Sequence[str], *, say: Say) -> dict[str, Any]:
    from tunesmith.stages import checking

    if isinstance(recipe_or_data, (str, Path)) and Path(recipe_or_data).suffix not in (".yaml", ".yml"):
        return checking.check_data(str(recipe_or_data))
    if not isinstance(recipe_or_data, Resolved) and is_chain_recipe(recipe_or_data):
        from tunesmith.stages import chain as chains

        return {"chain": chains.check(load_chain(recipe_or_data, overrides), say=say)}
    return checking.check_recipe(_resolved(recipe_or_data, overrides), say=say)


def export(
    run: str | Path, to: str | Path, format: str = "adapter", *, push_to: str | None = None, say: Say = _silent
) -> dict[str, Any]:
    """Write the tuned model to `to` as PEFT's adapter folder or as a merged transformers model, verified.

    Nothing leaves the machine unless `push_to` names a repository of the hub (owner/name), which is made private.
    """
    from tunesmith.stages import using

    return using.export(model_run(open_run(run)), Path(to), format, push_to=push_to, say=say)


def serve(
    run_or_model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_tokens: int = 1024,
    say: Say = _silent,
) -> None:
    """Answer over HTTP until SIGINT or SIGTERM: OpenAI's completions and chat completions, or `/predict`.

    On this machine alone unless `host` says otherwise; `port` 0 takes a free one; `max_tokens` is the most that a
    request may ask for. Raises `RunError` when the address cannot be had.
    """
    from tunesmith.serve.server import serve_until_stopped
    from tunesmith.stages import serving

    serve_until_stopped(serving.open_server(run_or_model, host=host, port=port, max_tokens=max_tokens, say=say))


def runs_list(root: str | Path = "runs") -> list[dict[str, Any]]:
    """One row per run, oldest first: name, stage, state, the main figures."""
    return [_row(run) for run in list_runs(root)]


def _row(run: RunDir) -> dict[str, Any]:
    if not run.finished:
        return {"run": run.name, "finished": False, **({"stage": "chain"} if is_chain(run) else {})}
    result = run.read_json("result")
    keep = ("stage", "base", "method", "verdict", "trainable_parameters", "seconds")
    return {"run": run.name, "finished": True, **{key: result.get(key) for key in keep}}


def runs_show(run: str | Path) -> dict[str, Any]:
    """A run's result, or how far it got."""
    folder = open_run(run)
    if folder.finished:
        return dict(folder.read_json("result"))
    note = f"go on with `tunesmith train --resume {folder.path}`"
    done = {"stages": _stages_of(folder)} if is_chain(folder) else {}
    return {"run": folder.name, "finished": False, **done, "note": note}


def _stages_of(chain: RunDir) -> dict[str, str]:
    """Each stage of a chain, and whether it is finished, under way or still to come."""
    stages = load_saved(chain.file("recipe"), Path.cwd()).stages
    places = {stage.name: RunDir(chain.path / stage.name) for stage in stages}
    begun = {name: place.file("recipe").is_file() for name, place in places.items()}
    return {n: "finished" if p.finished else ("under way" if begun[n] else "to come") for n, p in places.items()}


def runs_diff(a: str | Path, b: str | Path) -> dict[str, Any]:
    """What two runs do differently (`recipe`) and what came out (`after`), key by key, as [a, b]."""
    first, second = open_run(a), open_run(b)
    return {
        "recipe": _differences(_settings(first), _settings(second)),
        "after": _differences(_figures(first), _figures(second)),
    }


def _settings(run: RunDir) -> dict[str, Any]:
    from tunesmith.recipe import load_resolved

    if is_chain(run):
        stages = load_saved(run.file("recipe"), Path.cwd()).stages
        return flatten({s.name: s.resolved.recipe.model_dump(exclude={"run"}, exclude_none=True) for s in stages})
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
