"""compare: one recipe, several ways to tune it, one table; every trial is a run of its own and can be looked at.

Trials are judged on the held-out rows. The test rows, where the recipe names some, are measured once, with the winner.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError, RunError
from tunesmith.evaluate.compare import main_metric
from tunesmith.evaluate.tasks import LOWER_IS_BETTER
from tunesmith.recipe import Resolved, load_recipe
from tunesmith.recipe_rules import DEFAULTS
from tunesmith.rundir import RunDir

Json = dict[str, Any]
RunTrial = Callable[["Trial", Path], None]
"""Trains one trial into a folder, or goes on with it."""
SURE = 0.95
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
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", f"{self.name}-seed{self.seed}").strip("-.")


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
    found, problems = [], []
    for number in range(seeds):
        for parts in itertools.product(tunings, models, *cells):
            name = " ".join(label for label, _ in parts if label) or start.recipe.tune.method
            seed = start.recipe.seed + number
            changes = (*given, *(text for _, texts in parts for text in texts), f"seed={seed}", "data.test=null")
            found.append(Trial(name, seed, recipe, changes))
            try:
                load_recipe(recipe, changes)
            except RecipeError as error:
                problems += [f"{name}: {error}"] if number == 0 else []
    if problems:
        raise RecipeError("\n".join(problems))
    return found


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
    return text, tuple(changes if same else [*changes, f"train.learning_rate={DEFAULTS[method]:g}"])


def _typed(settings: Mapping[str, Any]) -> Json:
    from tunesmith.recipe_yaml import scalar

    return {key: scalar(value) if isinstance(value, str) else value for key, value in settings.items()}


def _cells(text: str) -> list[tuple[str, tuple[str, ...]]]:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise RecipeError(f"--grid {text}: write key.path=value,value, as in train.learning_rate=1e-4,3e-4")
    return [(f"{key.rpartition('.')[2]}={value}", (f"{key}={value}",)) for value in values.split(",")]


def run_as_command(trial: Trial, folder: Path) -> None:
    """Train in a process of its own, so that its memory is its own."""
    if (folder / "recipe.yaml").exists():
        arguments = ["--resume", str(folder)]
    else:
        arguments = [trial.recipe, *trial.overrides, "--run", str(folder)]
    command = [sys.executable, "-m", "tunesmith", "train", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode in (130, 143):
        raise RunError(f"{trial.name} was interrupted; the same command goes on where it stopped")
    if done.returncode:
        raise RunError(f"{trial.name} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no message'}")


def compare(
    trials: Sequence[Trial], folder: Path, *, budget_seconds: float | None, say: Callable[[str], None],
    run_trial: RunTrial | None = None, measure_test: Callable[[Path, Trial], Json | None] | None = None,
) -> Json:  # fmt: skip
    """Run what is not yet run, within the budget (seconds of training runs, those before included), and compare.

    `{rows, best, recommendation, left_out, test}`. The same call goes on where it stopped.
    """
    spent, left_out, done = 0.0, [], []
    for trial in trials:
        run = RunDir(folder / trial.folder)
        if not run.finished:
            if budget_seconds is not None and spent >= budget_seconds:
                left_out.append(f"{trial.name} seed {trial.seed}")
                continue
            say(f"{trial.name}, seed {trial.seed}")
            (run_trial or run_as_command)(trial, run.path)
        result = run.read_json("result")
        spent += float(result["seconds"])
        done.append((trial, result))
    if not done:
        raise RunError("the budget allowed no trial; give more with --budget")
    rows = [_row(name, [r for t, r in done if t.name == name]) for name in dict.fromkeys(t.name for t, _ in done)]
    metric = str(rows[0]["metric"])
    rows.sort(key=lambda row: row["value"], reverse=metric not in LOWER_IS_BETTER)
    winner = next(trial for trial, _ in done if trial.name == rows[0]["name"])
    out: Json = {
        "metric": metric, "rows": rows, "best": rows[0]["name"], "recommendation": recommend(rows, metric),
        "left_out": left_out, "seconds": round(spent, 3),
    }  # fmt: skip
    if measure_test is not None:
        out["test"] = measure_test(folder / winner.folder, winner)
    return out


def _row(name: str, results: Sequence[Json]) -> Json:
    """Means over the seeds; the interval holds both what differs between rows and what differs between seeds."""
    metric = main_metric(results[0]["after"])
    assert metric is not None, "a run with held-out rows has metrics"
    entries = [result["after"][metric] for result in results]
    values = [entry["value"] for entry in entries]
    error = math.sqrt(statistics.fmean(_error(entry) ** 2 for entry in entries) + _spread(values) ** 2)
    value = statistics.fmean(values)
    forgetting = [
        r["probe"]["after"]["loss"]["value"] - r["probe"]["before"]["loss"]["value"] for r in results if "probe" in r
    ]
    return {
        "name": name, "metric": metric, "value": value, "low": value - 1.96 * error, "high": value + 1.96 * error,
        "before": statistics.fmean(r["before"][metric]["value"] for r in results), "error": error,
        "n": entries[0]["n"], "seeds": len(results),
        "forgetting": statistics.fmean(forgetting) if forgetting else None,
        "trainable_parameters": results[0]["trainable_parameters"], "parameters": results[0]["total_parameters"],
        "seconds": statistics.fmean(r["seconds"] for r in results),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in results), "file_bytes": results[0]["export_bytes"],
    }  # fmt: skip


def _error(entry: Mapping[str, Any]) -> float:
    if entry["low"] is None or entry["high"] is None:
        return 0.0
    return (entry["high"] - entry["low"]) / (2 * 1.96)


def _spread(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def recommend(rows: Sequence[Json], metric: str) -> str:
    """The best by the held-out rows and how sure that is; of what cannot be told apart from it, the cheapest.

    The chance that one is better than another is that of two independent normal errors: on the same rows the real one
    is surer, never less sure.
    """
    best = rows[0]
    sure = [(row, _chance(best, row)) for row in rows[1:]]
    close = [row for row, chance in sure if chance < SURE]
    shown = f"{best['name']}: {metric.replace('_', ' ')} {best['value']:.4f}"
    if not close:
        return f"{shown}, better than all others with at least {SURE:.0%} confidence"
    cheapest = min([best, *close], key=lambda row: (row["trainable_parameters"], row["seconds"]))
    names = ", ".join(row["name"] for row in close)
    chance = min(chance for _, chance in sure)
    told = f"{shown}, not told apart from {names} ({chance:.0%} sure at the least)"
    if cheapest is best:
        return f"{told}; it is also the one that trains least, so take it"
    return f"{told}; {cheapest['name']} trains {cheapest['trainable_parameters']:,} parameters and may do as well"


def _chance(best: Json, other: Json) -> float:
    gap, error = abs(best["value"] - other["value"]), math.hypot(best["error"], other["error"])
    if error == 0.0:
        return 1.0 if gap else 0.5
    return 0.5 * (1.0 + math.erf(gap / error / math.sqrt(2.0)))


def measure_test(run: Path, trial: Trial) -> Json | None:
    """The winner on the recipe's test rows, which no choice has seen; None when it names none."""
    from tunesmith.stages import using
    from tunesmith.stages.prepare import locate

    kept = [text for text in trial.overrides if text != "data.test=null"]
    start = load_recipe(trial.recipe, kept)
    if start.recipe.data.test is None:
        return None
    return using.evaluate(run, locate(start.recipe.data.test, start.folder), stage=None, say=_quiet)["metrics"]


def _quiet(_: str) -> None:
    return None


def seconds_of(text: str) -> float:
    """`90`, `90s`, `10m`, `1.5h` in seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not found:
        raise RecipeError(f"--budget {text}: write seconds, or a number with s, m or h, as in 10m")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
