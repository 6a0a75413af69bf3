"""A metric of the user's own: a function of one held-out row that gives one number; reported as a mean over rows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.engine.durable import file_sha256
from tunesmith.errors import MetricError, RecipeError, TunesmithError
from tunesmith.evaluate.intervals import Estimate, Statistic, bootstrap, mean_statistic, wilson
from tunesmith.rollout.function import load_function
from tunesmith.rollout.rewards import described

_SHOWN = 160


@dataclass(frozen=True, slots=True)
class OwnMetric:
    """`name` in results, `where` it is for messages, `content` of its file, `wanted` what it asks for by name."""

    name: str
    function: Callable[..., Any]
    where: str
    content: str
    wanted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One held-out row as a metric sees it: values by name, and where the row stands."""

    values: Mapping[str, Any]
    origin: str

    def place(self) -> str:
        """Which row, for messages, with what was judged."""
        name = "completion" if "completion" in self.values else "predicted"
        said = str(self.values.get(name, ""))
        shown = said if len(said) <= _SHOWN else said[:_SHOWN] + "..."
        return f"the row {self.origin} ({name} {shown!r})"


def read_metric(path: Path, name: str, given: Sequence[str], *, where: str, key: str) -> OwnMetric:
    """The function `name` of the Python file `path`, which is run. `given` are the names it may ask for.

    Raises `RecipeError`, whose message begins with `key`, when the file or the function is not there, cannot be
    loaded, or asks for something else.
    """
    content = f"{file_sha256(path)}:{name}" if path.is_file() else ""
    function = load_function(path, name, key)
    return OwnMetric(name, function, where, content, _wanted(function, given, f"{key}: {where}"))


def metric_of(function: Callable[..., Any], given: Sequence[str]) -> OwnMetric:
    """A function at hand as a metric of its own name; `RecipeError` for one without (a lambda)."""
    name = str(getattr(function, "__name__", ""))
    if not name.isidentifier():
        raise RecipeError(f"metrics: {function!r} has no name to stand in the result; give a function made with def")
    where = f"{getattr(function, '__module__', '')}.{name}"
    return OwnMetric(name, function, where, where, _wanted(function, given, f"metrics: {where}"))


def _wanted(function: Callable[..., Any], given: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of `given` that are the function's parameters, all for one that takes `**`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise RecipeError(f"{where} does not say what it takes; give a function made with def") from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return tuple(given)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    bare = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    unknown = [p.name for p in named if p.name not in given and p.default is p.empty] + bare
    if unknown:
        raise RecipeError(f"{where} asks for {', '.join(unknown)}; by the names of its parameters it can have "
                          f"{', '.join(given)}")  # fmt: skip
    return tuple(p.name for p in named if p.name in given)


def own_statistic(metric: OwnMetric, cases: Sequence[Case]) -> Statistic:
    """The metric of every row, in their order.

    Raises `MetricError` that names the row when the function raises or gives something that is no finite number.
    """
    return mean_statistic(metric.name, [_judged(metric, case) for case in cases])


def own_estimate(statistic: Statistic, *, seed: int) -> Estimate:
    """The mean with its 95 % interval: Wilson's for values of 0 and 1 alone, else bootstrap over rows."""
    values = statistic.rows[:, 0]
    if len(values) and set(values.tolist()) <= {0.0, 1.0}:
        return wilson(int(values.sum()), len(values))
    return bootstrap(statistic, seed=seed)


def _judged(metric: OwnMetric, case: Case) -> float:
    try:
        found = metric.function(**{name: case.values[name] for name in metric.wanted})
    except TunesmithError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise MetricError(f"metric {metric.where} raised {described(error)}, on {case.place()}") from error
    if not isinstance(found, Real | np.bool_):
        raise MetricError(f"metric {metric.where} returned {found!r:.80} for {case.place()}; it must return a number")
    if not math.isfinite(float(found)):
        raise MetricError(f"metric {metric.where} returned {float(found)} for {case.place()}; it must return a finite "
                          "number")  # fmt: skip
    return float(found)
