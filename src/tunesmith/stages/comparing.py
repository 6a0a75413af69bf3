"""compare: one recipe, several ways to tune it, one table; every trial is a run of its own and can be looked at.

Trials are judged on the held-out rows. The test rows, where the recipe names some, are measured once, with the winner.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.engine.signals import StopSignals
from tunesmith.errors import Interrupted, RecipeError, RunError
from tunesmith.evaluate.trials import Rows, claim, difference, mean_rows, rank, recommend, rows_of, trial_row
from tunesmith.recipe import Resolved, load_recipe
from tunesmith.recipe_rules import BASELINES, DEFAULTS, default_rate
from tunesmith.rundir import RunDir, write_whole
from tunesmith.stages.untuned import measure_test, same_recipe, untuned_rows

Json = dict[str, Any]
RunTrial = Callable[["Trial", Path], None]
"""Trains one trial into a folder, or goes on with it."""
_SHORT = {"last_layers": "layers", "lora": "rank", "4bit": "rank", "8bit": "rank"}
"""What a bare number after a method's name means: last_layers=2, lora=8."""
_QUANTIZED = ("4bit", "8bit")
"""Names for LoRA beside a base in so many bits."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to tune: its name in the table, a seed, and what it changes in the recipe."""

    name: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its run's name below the comparison's folder."""
        return file_name(f"{self.name}-seed{self.seed}")


def file_name(text: str) -> str:
    """The text as a file's name; a long one keeps its end and the hash of the whole."""
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")
    return name if len(name) <= 100 else f"{sha256(text.encode()).hexdigest()[:8]}-{name[-80:].strip('-.')}"


def trials_of(
    recipe: str, given: Sequence[str], *, tune: Sequence[str], bases: Sequence[str], grid: Sequence[str], seeds: int
) -> list[Trial]:
    """Every combination of tunings, bases and grid values, each with `seeds` seeds; the first seed of all comes first.

    Raises `RecipeError` with every problem of every trial before anything runs.
    """
    start = load_recipe(recipe, given)
    if not (start.recipe.data.eval or start.recipe.data.split):
        raise RecipeError("compare needs held-out rows to judge by: add data.eval or data.split to the recipe")
    tunings = [tuning(text, start) for text in tune] or [("", ())]
    models = [(f"base={base}", (f"base={base}",)) for base in bases] or [("", ())]
    cells = [_cells(text) for text in grid]
    quiet = ("evaluate.baselines=false",) if start.recipe.evaluate.baselines is None and _has_baselines(start) else ()
    found, problems = [], []
    for number in range(seeds):
        for parts in itertools.product(tunings, models, *cells):
            name = " ".join(label for label, _ in parts if label) or start.recipe.tune.method
            seed = start.recipe.seed + number
            changes = (
                *given,
                *(text for _, texts in parts for text in texts),
                f"seed={seed}",
                "evaluate.test=false",
                *quiet,
            )
            found.append(Trial(name, seed, recipe, changes))
            try:
                load_recipe(recipe, changes)
            except RecipeError as error:
                problems += [f"{name}: {error}"] if number == 0 else []
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def _has_baselines(start: Resolved) -> bool:
    return start.recipe.stage in BASELINES


def tuning(text: str, start: Resolved) -> tuple[str, tuple[str, ...]]:
    """`lora:rank=4:alpha=8`, `4bit:rank=8`, `last_layers=2` or `full` as (name, overrides). The recipe's own settings
    of the same method stay; another method gets its own default learning rate."""
    head, *pairs = text.split(":")
    named, equals, number = head.partition("=")
    method = "lora" if named in _QUANTIZED else named
    if method not in DEFAULTS or (equals and named not in _SHORT):
        known = ", ".join([*DEFAULTS, *_QUANTIZED])
        raise RecipeError(f"--tune {text}: there is no method `{head}`; take {known}, as in lora:rank=4")
    settings: Json = {}
    same = method == start.recipe.tune.method
    if same:
        settings = start.recipe.tune.model_dump(exclude_none=True)
    settings |= {"method": method} | ({_SHORT[named]: number} if equals else {})
    settings |= {"quantize": named} if named in _QUANTIZED else {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise RecipeError(f"--tune {text}: write key=value after a colon, as in lora:rank=4")
        settings[key] = value
    given = {pair.partition("=")[0] for pair in pairs} | ({"rank"} if equals and method == "lora" else set())
    if "rank" in given and "alpha" not in given:
        settings.pop("alpha", None)  # twice the rank, as by default
    changes = [f"tune={json.dumps(_typed(settings))}"]
    return text, tuple(
        changes if same else [*changes, f"train.learning_rate={default_rate(start.recipe.stage, method):g}"]
    )


def _typed(settings: Mapping[str, Any]) -> Json:
    from tunesmith.recipe_yaml import scalar

    return {key: scalar(value) if isinstance(value, str) else value for key, value in settings.items()}


def _cells(text: str) -> list[tuple[str, tuple[str, ...]]]:
    key, equals, values = text.partition("=")
    parts = split_list(values)
    if not equals or not parts:
        raise RecipeError(f"--grid {text}: write key.path=value,value, as in train.learning_rate=1e-4,3e-4")
    return [(f"{key.rpartition('.')[2]}={value}", (f"{key}={value}",)) for value in parts]


def split_list(text: str) -> list[str]:
    """Parts between commas; a comma inside brackets or braces belongs to its part, as in `[q,v],all-linear`."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def run_as_command(trial: Trial, folder: Path) -> None:
    """Train in a process of its own, so that its memory is its own. It is asked to stop when this process is.

    `TrialFailed` when the trial itself does not work out, `Interrupted` when it was stopped.
    """
    if (folder / "recipe.yaml").exists():
        arguments = ["--resume", str(folder)]
    else:
        arguments = [trial.recipe, *trial.overrides, "--run", str(folder)]
    command = [sys.executable, "-m", "tunesmith", "train", *arguments, "--json"]
    with StopSignals() as stop, tempfile.TemporaryFile("w+") as talk:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=talk)
        told = False
        while (code := _waited(child)) is None:
            if not told and stop.received not in (None, signal.SIGINT):  # Ctrl-C reaches the trial by itself
                child.terminate()
                told = True
        talk.seek(0)
        last = (talk.read().strip().splitlines() or ["no message"])[-1]
    if stop.requested or code in (130, 143):
        raise Interrupted(
            f"{trial.name} was interrupted; the same command goes on where it stopped", stop.exit_code or code
        )
    if code:
        raise TrialFailed(last.removeprefix("error: "))


def _waited(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(0.5)
    except subprocess.TimeoutExpired:
        return None


class TrialFailed(RunError):
    """A trial that cannot be trained; the others go on."""


def compare(
    trials: Sequence[Trial], folder: Path, *, budget_seconds: float | None, say: Callable[[str], None],
    run_trial: RunTrial | None = None,
) -> Json:  # fmt: skip
    """Run what is not yet run, within the budget (seconds of training runs, those before included), and compare.

    `{metric, rows, best, recommendation, left_out, failed, seconds, winner}`. The same call goes on where it stopped.
    """
    _refuse_others(trials, folder)
    spent, left_out, failed, done = 0.0, list[str](), list[Json](), list[tuple[Trial, Json]]()
    for trial in trials:
        run = RunDir(folder / trial.folder)
        if not run.finished:
            if budget_seconds is not None and spent >= budget_seconds:
                left_out.append(f"{trial.name} seed {trial.seed}")
                continue
            say(f"{trial.name}, seed {trial.seed}")
            try:
                (run_trial or run_as_command)(trial, run.path)
            except TrialFailed as error:
                failed.append({"name": trial.name, "seed": trial.seed, "why": str(error)})
                say(f"{trial.name}, seed {trial.seed} failed: {error}")
                continue
        result = run.read_json("result")
        spent += float(result["seconds"])
        done.append((trial, result))
    if not done:
        why = (
            f"every trial failed: {failed[0]['why']}"
            if failed
            else "the budget allowed no trial; give more with --budget"
        )
        raise RunError(why)
    rows = _ranked(done, folder)
    winner = next(trial for trial, _ in done if trial.name == rows[0]["name"])
    return {
        "metric": rows[0]["metric"], "rows": rows, "best": rows[0]["name"], "recommendation": recommend(rows),
        "left_out": left_out, "failed": failed, "seconds": round(spent, 3), "winner": winner.folder,
    }  # fmt: skip


def _refuse_others(trials: Sequence[Trial], folder: Path) -> None:
    """Runs of the same names that were begun from another recipe are not taken for these."""
    other = [t.folder for t in trials if t.recipe and not same_recipe(folder / t.folder, t.recipe, t.overrides)]
    if other:
        raise RecipeError(f"{folder} holds trials of other settings ({', '.join(other[:5])}); name another comparison "
                          "with --to, or remove that folder")  # fmt: skip


def _ranked(done: Sequence[tuple[Trial, Json]], folder: Path) -> list[Json]:
    """One row a way to tune, the best first, compared row by row where the runs kept their rows."""
    rows, held_out = [], dict[str, Rows | None]()
    for name in dict.fromkeys(trial.name for trial, _ in done):
        row = trial_row(name, [result for trial, result in done if trial.name == name])
        kept = [kept_rows(folder / trial.folder) for trial, _ in done if trial.name == name]
        held_out[name] = mean_rows([rows_of(k, "held_out", row["metric"]) for k in kept])
        rows.append(row)
    return rank(rows, held_out)


def kept_rows(run: Path) -> Json | None:
    """What a run measured row by row after training; None where it kept nothing."""
    folder = RunDir(run)
    return folder.read_json("after") if folder.file("after").is_file() else None


def on_test(found: Json, trials: Sequence[Trial], folder: Path) -> Json | None:
    """The winner on the test rows: measured when it first wins, and read from `test.json` from then on.

    `{best, metrics, looks, ...}`; `looks` counts how many winners have been measured here: more than one is a choice
    that has seen the test rows.
    """
    file = folder / "test.json"
    kept: Json = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found["winner"] not in kept:
        trial = next(trial for trial in trials if trial.folder == found["winner"])
        measured = measure_test(folder / trial.folder, trial.recipe, trial.overrides)
        if measured is None:
            return None
        kept[found["winner"]] = measured
        write_whole(file, json.dumps(kept) + "\n")
    return {"best": found["best"], "looks": len(kept), **kept[found["winner"]]}


def beside_untuned(found: Json, untuned: Sequence[Json], test: Json | None, folder: Path) -> Json:
    """`{part, rows, claim}`: the winner against models that were only asked, on the test rows where there are some."""
    part, metric, best = ("held_out" if test is None else "test"), found["metric"], found["rows"][0]
    kept = kept_rows(folder / found["winner"]) if test is None else test
    mine, value = rows_of(kept, part, metric), best["value"] if test is None else test["metrics"][metric]["value"]
    if test is None and kept is not None and kept.get("held_out"):
        value = kept["held_out"]["metrics"][metric]["value"]
    rows = []
    for kept_untuned in untuned:
        for entry, theirs in untuned_rows(kept_untuned, part, metric):
            change = difference(mine, theirs)
            rows.append(entry | {"difference": None if change is None else change.as_json()})
    tuned = {"name": best["name"], "parameters": best["parameters"], "value": value}
    return {"part": part, "tuned": tuned, "rows": rows, "claim": claim(metric, tuned, rows)}


def seconds_of(text: str) -> float:
    """`90`, `90s`, `10m`, `1.5h` in seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not found:
        raise RecipeError(f"--budget {text}: write seconds, or a number with s, m or h, as in 10m")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
