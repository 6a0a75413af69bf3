"""The verbs about trust, before a run and after it: selftest, plan, compare, rows. `tunesmith.api` has them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.recipe import Resolved, load_recipe
from tunesmith.rundir import write_whole

if TYPE_CHECKING:
    from tunesmith.stages.selftest import Check

Say = Callable[[str], None]
RecipeLike = str | Path | Mapping[str, Any] | Resolved
SELFTEST_RECIPE = {
    "stage": "sft",
    "base": "tunesmith/reviews-1m",
    "data": {"train": "embedded:instructions/train"},
}
"""What `selftest` tries when no recipe is named: the embedded base and data."""


def _silent(_: Any) -> None:
    return None


def _resolved(recipe: RecipeLike, overrides: Sequence[str]) -> Resolved:
    return recipe if isinstance(recipe, Resolved) else load_recipe(recipe, overrides)


def selftest(recipe: RecipeLike | None = None, overrides: Sequence[str] = (), *, say: Say = _silent) -> dict[str, Any]:
    """Try the program's laws on a recipe's own model, data and machine: `{passed, checks: [{name, error, limit}]}`.

    Packed is one by one, accumulated is one batch, merged is unmerged, sampled is trained, fp32 and bf16 are near
    float64, resumed is undisturbed. Nothing is left behind. Raises what the recipe would raise.
    """
    from tunesmith.stages import selftest as trials

    checks = trials.selftest(_resolved(SELFTEST_RECIPE if recipe is None else recipe, overrides), say=say)
    return {"passed": all(check.passed for check in checks), "checks": [_as_json(check) for check in checks]}


def plan(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    on: str | None = None,
    price: float | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """What a run will take before a weight is loaded: bytes by line and peak, operations, seconds, other methods.

    `on` is a device of the table (docs/plan.md) instead of this machine; `price` is what an hour of it costs.
    """
    from tunesmith.stages import planning

    return planning.plan(_resolved(recipe, overrides), on=on, price=price, say=say)


def compare(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    tune: Sequence[str] = (),
    bases: Sequence[str] = (),
    grid: Sequence[str] = (),
    seeds: int = 1,
    untuned: Sequence[str] = (),
    budget: str | None = None,
    to: str | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """Train a recipe in several ways and set them side by side: `{rows, best, recommendation, left_out, test, page}`.

    `tune` holds methods (`full`, `last_layers=1`, `lora:rank=4`), `bases` models, `grid` `key.path=value,value`; every
    combination is a run under runs/`to`, judged on the held-out rows. `budget` (`10m`) bounds the time of all runs. The
    same call again goes on where it stopped. The test rows are measured once, with the winner. `untuned` are models
    that are only asked, by a prompt with and without examples, and set against the winner (`found["untuned"]`).
    """
    from tunesmith.evaluate.compare_page import render_comparison
    from tunesmith.stages import comparing
    from tunesmith.stages.untuned import measure_untuned

    trials = comparing.trials_of(str(recipe), overrides, tune=tune, bases=bases, grid=grid, seeds=seeds)
    folder = Path("runs") / (to or f"compare-{Path(recipe).stem}")
    limit = None if budget is None else comparing.seconds_of(budget)
    files = {base: folder / f"untuned-{comparing.file_name(base)}.json" for base in untuned}
    found = comparing.compare(trials, folder, budget_seconds=limit, say=say)
    asked = [measure_untuned(str(recipe), overrides, base, file, say) for base, file in files.items()]
    test = comparing.on_test(found, trials, folder)
    found["test"] = test and {name: test[name] for name in ("best", "metrics", "looks")}
    if asked:
        found["untuned"] = comparing.beside_untuned(found, asked, test, folder)
    write_whole(folder / "comparison.json", json.dumps(found, indent=1) + "\n")
    write_whole(folder / "comparison.html", render_comparison(found, folder.name))
    return found | {"page": str(folder / "comparison.html")}


def _as_json(check: Check) -> dict[str, Any]:
    return {**asdict(check), "passed": check.passed}
