"""Python that a recipe names - metrics and reward functions of the user's: what it was when a run began, and whose
naming lets it run. Files are hashed before they run, and one that is another does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tunesmith.engine.durable import file_sha256
from tunesmith.errors import RecipeError, RunError
from tunesmith.recipe import Recipe
from tunesmith.recipe_metrics import named
from tunesmith.rundir import RunDir
from tunesmith.stages.sets import locate

ONLINE = ("ppo", "grpo")
KINDS = {"metrics": "metric", "rewards": "reward function"}
"""Kinds of functions by their name in `inputs.json`, and what one of them is called."""


def contents(recipe: Recipe, folder: Path) -> dict[str, dict[str, str]]:
    """`{metrics: {file.py:name: sha256:name}, rewards: {...}}` of what the recipe names; kinds without any left out."""
    found: dict[str, dict[str, str]] = {}
    for kind, text in _asked(recipe):
        file, _, name = text.partition(".py:")
        path = Path(locate(f"{file}.py", folder))
        found.setdefault(kind, {})[text] = f"{file_sha256(path)}:{name}" if path.is_file() else "no file"
    return found


def _asked(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from (("metrics", text) for text in named(recipe.evaluate.metrics))
    yield from (("rewards", text) for text in reward_functions(recipe))


def reward_functions(recipe: Recipe) -> list[str]:
    """The functions of the recipe's reward, `file.py:name`."""
    return [] if recipe.reward is None else named(recipe.reward.function)


def refuse_changed(run: RunDir, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """`RunError` unless every file of metrics is the one that the run began with; nothing of it has run then.

    A reward that raised is mended in its file, so a changed one is said and goes on.
    """
    began = run.read_json("inputs")
    for kind, now in contents(recipe, folder).items():
        changed = [text for text, content in now.items() if began.get(kind, {}).get(text) != content]
        if not changed:
            continue
        what = f"{KINDS[kind]} {', '.join(changed)} has changed since the run began"
        if kind == "metrics":
            raise RunError(
                f"{what} and was not run; a run goes on with what it began with: put that file back, or begin another "
                "run"
            )
        say(f"{what}: rewards from here on are those of the file as it is now")


def located(texts: Sequence[str], folder: Path) -> list[str]:
    """`file.py:name` with each file as it stands beside the recipe in `folder`."""
    return [f"{locate(f'{file}.py', folder)}:{name}" for file, _, name in (text.partition(".py:") for text in texts)]


def with_rewards(recipe: Recipe, given: Sequence[str]) -> Recipe:
    """A run's recipe with the reward functions `given` here in place of those it names, which do not run.

    Of ppo and grpo the reward is the task itself: `RecipeError` unless each of its functions is given by its name. The
    other stages are measured without a reward.
    """
    if recipe.stage not in ONLINE:
        if given:
            raise RecipeError(f"--reward is for runs of {' and '.join(ONLINE)}; this one is of stage {recipe.stage}")
        return recipe.model_copy(update={"reward": None})
    asked = {text.rpartition(":")[2]: text for text in reward_functions(recipe)}
    here = {text.rpartition(":")[2]: text for text in given}
    if unknown := [text for name, text in here.items() if name not in asked]:
        known = ", ".join(asked) or "none"
        raise RecipeError(f"--reward {unknown[0]}: the run's reward has no function of that name; it has {known}")
    if missing := [text for name, text in asked.items() if name not in here]:
        raise RecipeError("the run's reward is Python that its recipe names, which does not run for that: read it, and "
                          f"add {' '.join(f'--reward {text}' for text in missing)}")  # fmt: skip
    if recipe.reward is None or not asked:
        return recipe
    paths = [str(Path(here[name]).expanduser().absolute()) for name in asked]
    return recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"function": paths})})
