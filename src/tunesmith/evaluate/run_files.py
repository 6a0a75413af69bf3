"""What a run folder says, read once for the report and the card; a damaged line is passed over and mentioned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import RunError
from tunesmith.evaluate.compare import Difference, Estimate, judge, main_metric
from tunesmith.recipe_metrics import lower_is_better
from tunesmith.rundir import LAYOUT

Json = dict[str, Any]
HIDDEN = ("", None, [], {}, "None", "none", "null", "NaN")


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The contents of a run's files; what is missing is empty. `problems` names what could not be read."""

    path: Path
    result: Json
    recipe: Json
    recipe_text: str
    origins: Json
    environment: Json
    trainable: Json
    inputs: Json
    metrics: tuple[Json, ...]
    evaluations: tuple[Json, ...]
    samples: tuple[Json, ...]
    problems: tuple[str, ...]

    def text(self, *keys: str, otherwise: str) -> str:
        """The first of `keys` (dotted) that the result, the recipe or the inputs state."""
        for source in (self.result, self.recipe, self.inputs):
            for key in keys:
                value = dig(source, key)
                if isinstance(value, str | int | float) and value not in HIDDEN:
                    return str(value)
        return otherwise

    def main_metric(self) -> str | None:
        """What the verdict is about: `train.select_by`, else the first known metric."""
        preferred = dig(self.recipe, "train.select_by")
        names = self.differences() or estimates(self.result.get("after"))
        return main_metric(names, preferred if isinstance(preferred, str) else None)

    def differences(self, part: str = "") -> dict[str, Difference]:
        """The paired differences in the result, or in one `part` of it such as `probe` or `test`."""
        return differences(dig(self.result, part) if part else self.result)


def data_facts(run: RunFiles) -> dict[str, Any]:
    """What is known of the data: where each set came from, its counts and its hash. No folder of this machine."""
    given = flat(dig(run.recipe, "data"))
    named = {f"{k}.source": v for k, v in given.items() if k in ("train", "eval", "test")}
    named |= {k: v for k, v in given.items() if k.startswith("mix[")}
    counted = flat(run.result.get("data")) or flat(run.inputs.get("data"))
    labels = {k: v for k, v in flat(run.inputs).items() if k in ("labels", "template")}
    return dict(sorted({**named, **counted}.items())) | labels


def read_run(run_dir: Path) -> RunFiles:
    """Read every file of the run. `RunError` when there is neither a recipe nor a result."""
    folder = Path(run_dir)
    problems: list[str] = []
    if not any((folder / LAYOUT[name]).is_file() for name in ("recipe", "result")):
        raise RunError(f"{folder} holds neither {LAYOUT['recipe']} nor {LAYOUT['result']}: name the folder of a run")
    text = _text(folder / LAYOUT["recipe"], problems)
    recipe = _recipe(folder / LAYOUT["recipe"], text, problems)
    result, origins, environment, trainable, inputs = (
        _object(folder / LAYOUT[name], problems) for name in ("result", "origins", "environment", "trainable", "inputs")
    )
    metrics, evaluations, samples = (
        _lines(folder / LAYOUT[name], problems) for name in ("metrics", "evaluations", "samples")
    )
    return RunFiles(
        folder, result, recipe, text, origins, environment, trainable, inputs,
        metrics, evaluations, samples, tuple(problems),
    )  # fmt: skip


def evaluations_of(run: RunFiles) -> tuple[Json, ...]:
    """Every evaluation on the held-out rows in order, the untrained model first."""
    before = estimates(run.result.get("before"))
    if not before or any(line.get("step") == 0 for line in run.evaluations):
        return run.evaluations
    return ({"step": 0, "epoch": 0, "metrics": before}, *run.evaluations)


def estimates(metrics: Any) -> dict[str, Json]:
    """`{metric: {value, low, high, n}}`; a plain number becomes a value without interval."""
    found = {}
    for name, entry in metrics.items() if isinstance(metrics, Mapping) else ():
        if isinstance(entry, Mapping) and "value" in entry:
            found[str(name)] = dict(entry)
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            found[str(name)] = {"value": entry}
    return found


def differences(part: Any) -> dict[str, Difference]:
    """Every metric of `part["difference"]` with its verdict, worked out from the interval."""
    if not isinstance(part, Mapping):
        return {}
    before, after = estimates(part.get("before")), estimates(part.get("after"))
    found = {}
    for name, entry in estimates(part.get("difference")).items():
        if name in before and name in after:
            change = estimate(entry)
            values = as_number(before[name]["value"]), as_number(after[name]["value"])
            found[name] = Difference(name, *values, change, judge(name, change))
    return found


def estimate(entry: Mapping[str, Any]) -> Estimate:
    """An `Estimate` from its JSON."""
    low, high = (None if entry.get(k) is None else as_number(entry[k]) for k in ("low", "high"))
    count = entry.get("n")
    return Estimate(as_number(entry.get("value")), low, high, int(count) if isinstance(count, int) else 0)


def as_number(value: Any) -> float:
    """The number that JSON holds; "NaN" and "Infinity" are spelled out there, anything else is NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def best_evaluation(lines: Sequence[Json], metric: str) -> tuple[Json, Json] | None:
    """(the best line, the last line) of the evaluations that have `metric`."""
    held = [(as_number(estimates(line.get("metrics"))[metric]["value"]), line) for line in lines
            if metric in estimates(line.get("metrics"))]  # fmt: skip
    held = [(value, line) for value, line in held if value == value]
    if not held:
        return None
    pick = min if lower_is_better(metric) else max
    return pick(held, key=lambda pair: pair[0])[1], held[-1][1]


def dig(source: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for part in key.split("."):
        if not isinstance(source, Mapping) or part not in source:
            return None
        source = source[part]
    return source


def flat(source: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` keys; what is empty or None is left out."""
    if isinstance(source, Mapping):
        parts = (flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in source.items())
        return {k: v for part in parts for k, v in part.items()}
    if isinstance(source, list) and source and all(not isinstance(v, Mapping | list) for v in source):
        source = ", ".join(str(v) for v in source)
    elif isinstance(source, list):
        parts = (flat(v, f"{prefix}[{i}]") for i, v in enumerate(source))
        return {k: v for part in parts for k, v in part.items()}
    return {} if source in HIDDEN else {prefix: source}


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
        return ""


def _object(path: Path, problems: list[str]) -> Json:
    text = _text(path, problems)
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is damaged: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds a {type(value).__name__}, not an object")
        return {}
    return value


def _lines(path: Path, problems: list[str]) -> tuple[Json, ...]:
    found: list[Json] = []
    for number, line in enumerate(_text(path, problems).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            problems.append(f"{path.name}:{number} is not a JSON object and was passed over")
    return tuple(found)


def _recipe(path: Path, text: str, problems: list[str]) -> Json:
    try:
        value = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problems.append(f"{path.name} is damaged: {str(error).splitlines()[0]}")
        return {}
    return value if isinstance(value, dict) else {}
