"""A chain of stages in one recipe: `stages: [{stage: sft, ...}, {stage: reward, ...}, {stage: ppo, ...}]`.

Keys outside the list are shared by all stages, those of a stage win. Two keys exist only in the list: `name` (of the
stage's folder, `2-NAME`) and `from` (an earlier stage, by name or number, or `base`). Everything is checked here, all
stages at once, before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import RecipeError, RunError, several
from tunesmith.recipe import Recipe, Resolved, Written, apply_overrides, at_line, examine, leaves, merge, read_written
from tunesmith.recipe_rules import does_nothing, idle_keys
from tunesmith.recipe_yaml import parse_yaml, read_text
from tunesmith.rundir import NAME

GIVES = {
    "pretrain": "text", "sft": "text", "dpo": "text", "ppo": "text", "grpo": "text", "mlm": "masked",
    "classify": "labels", "reward": "scores",
}  # fmt: skip
"""What a stage's model is good for."""
TAKES = {
    **dict.fromkeys(("pretrain", "sft", "dpo", "ppo", "grpo"), ("text",)), "mlm": ("masked",),
    "classify": ("text", "masked", "labels"), "reward": ("text", "masked"),
}  # fmt: skip
"""What a stage can start from. A reward model is passed over: the next stage starts from the one before it."""
_ONLINE = ("ppo", "grpo")
_OWN_KEYS = ("name", "from")
_EXCLUSIVE = (
    ("train.epochs", "train.steps"), ("train.batch_examples", "train.batch_tokens"), ("data.train", "data.mix"),
    ("data.eval", "data.split"),
)  # fmt: skip
"""Of each pair only one may stand; the stage's own word replaces the shared one."""


@dataclass(frozen=True, slots=True)
class ChainStage:
    """One link. `parent` and `rewards` are indices of earlier stages; `parent` None starts from the plain base."""

    name: str
    resolved: Resolved
    parent: int | None
    rewards: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """All stages in order. `run` is the name that the recipe gives the chain; `folder` is the recipe's."""

    stages: tuple[ChainStage, ...]
    run: str | None
    folder: Path

    def to_yaml(self) -> str:
        """The resolved chain: `load_saved` reads it back, and `tunesmith train` runs it as it stands."""
        base, entries = self.stages[0].resolved.recipe.base, []
        for stage in self.stages:
            values = yaml.safe_load(stage.resolved.to_yaml())
            own = values.pop("base")
            values.pop("run", None)
            place = {"from": "base" if stage.parent is None else self.stages[stage.parent].name}
            if stage.parent is None and own != base:
                place = {"base": own}
            entries.append({"name": stage.name.partition("-")[2], **place, **values})
        top = {"run": self.run} if self.run is not None else {}
        return yaml.safe_dump({**top, "base": base, "stages": entries}, sort_keys=False, allow_unicode=True)

    def ancestors(self, index: int) -> list[int]:
        """The stages whose work stage `index` stands on, oldest first."""
        parent = self.stages[index].parent
        return [] if parent is None else [*self.ancestors(parent), parent]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stage as it was written: its own values, its kind, and how its folder is called."""

    index: int
    own: dict[str, Any]
    kind: str
    name: str
    start: str | None

    @property
    def calls(self) -> tuple[str, ...]:
        """How other keys and overrides may call it: its number, its folder's name, the name alone."""
        return str(self.index + 1), self.name, self.name.partition("-")[2]


def is_chain_recipe(source: str | Path | Mapping[str, Any]) -> bool:
    """True when the recipe has a list of stages; a file that cannot be read is not one (`load_recipe` says why)."""
    if isinstance(source, Mapping):
        return "stages" in source
    try:
        return "stages" in read_written(source).values
    except RecipeError:
        return False


def load_chain(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Chain:
    """Read, override, check and fill in every stage. `stages.2.KEY=VALUE` or `stages.ppo.KEY=VALUE` overrides one
    stage, `KEY=VALUE` what they share.

    Raises `RecipeError` that lists the problems of all stages with their lines: keys, values, an order that cannot
    work, a policy without a reward.
    """
    written = read_written(source)
    entries, problems = _entries(written)
    problems += _override(written, entries, overrides)
    if not entries:
        raise several(problems, RecipeError, headline=f"{written.name} cannot be run:")
    shared = {key: value for key, value in written.values.items() if key not in ("stages", "run")}
    used: set[str] = set()
    stages: list[ChainStage] = []
    for entry in entries:
        stage, found = _stage(written, shared, entry, entries, stages, used)
        problems += found
        stages.append(stage)
    problems += _unused(written, shared, used)
    if problems:
        raise several(list(dict.fromkeys(problems)), RecipeError, headline=f"{written.name} cannot be run:")
    run = written.values.get("run")
    return Chain(tuple(stages), None if run is None else str(run), written.folder)


def load_saved(path: Path, folder: Path) -> Chain:
    """The chain that a chain's folder has saved: complete, so it is only checked for its types.

    Raises `RunError` when it is missing or damaged.
    """
    try:
        raw, _ = parse_yaml(read_text(path), str(path))
        names = [f"{i}-{entry['name']}" for i, entry in enumerate(raw["stages"], 1)]
        stages = tuple(_saved(entry, names, i, raw["base"], folder) for i, entry in enumerate(raw["stages"]))
        return Chain(stages, raw.get("run"), folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a recipe's own errors are ValueErrors
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} is damaged ({why}); run the chain's own recipe again") from None


def _saved(entry: Mapping[str, Any], names: Sequence[str], index: int, base: str, folder: Path) -> ChainStage:
    values = {"base": base, **{key: value for key, value in entry.items() if key not in _OWN_KEYS}}
    recipe = Recipe.model_validate(values)
    start = entry.get("from", "base")
    parent = None if start == "base" else names.index(start)
    rewards = tuple(names.index(part) for part in _reward_runs(values) if part in names)
    return ChainStage(names[index], Resolved(recipe, {}, (), folder), parent, rewards, _notes(recipe, parent))


def _entries(written: Written) -> tuple[list[_Entry], list[str]]:
    """The list's entries, each with kind and name; problems that leave nothing to check."""
    listed = written.values.get("stages")
    if not isinstance(listed, list) or not listed:
        return [], [at_line(written, "stages", "`stages` is a list with one entry a stage: `- {stage: sft, ...}`")]
    entries, problems = [], []
    if "stage" in written.values:
        problems.append(at_line(written, "stage", "`stage` stands in each entry of `stages`, not beside the list"))
    for index, own in enumerate(listed):
        where = f"stages.{index}"
        if not isinstance(own, dict) or not isinstance(own.get("stage"), str):
            problems.append(at_line(written, where, f"entry {index + 1} of `stages` does not name its `stage`"))
            continue
        if own["stage"] not in GIVES:
            near = difflib.get_close_matches(own["stage"], GIVES, 1, 0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"this version has {', '.join(GIVES)}"
            problems.append(at_line(written, f"{where}.stage", f"there is no stage `{own['stage']}`; {hint}"))
            continue
        name, start = own.get("name", own["stage"]), own.get("from")
        if not isinstance(name, str) or not NAME.match(name):
            problems.append(at_line(written, f"{where}.name", f"`{name}` is no name: letters, digits, dots and dashes"))
            continue
        if "run" in own:
            problems.append(at_line(written, f"{where}.run", "`run` names the whole chain; a stage has `name`"))
        values = {key: value for key, value in own.items() if key not in _OWN_KEYS}
        start = None if start is None else str(start)
        entries.append(_Entry(index, values, own["stage"], f"{index + 1}-{name}", start))
    return entries, problems


def _override(written: Written, entries: Sequence[_Entry], overrides: Sequence[str]) -> list[str]:
    """Put every override where it belongs: `stages.CALL.key=value` into its stage, the others beside the list."""
    problems: list[str] = []
    for text in overrides:
        head, _, rest = text.partition(".")
        if head != "stages":
            problems += apply_overrides(written.values, [text], written.origins)
            continue
        call, dot, inside = rest.partition(".")
        meant = [entry for entry in entries if call in entry.calls]
        if not dot or len(meant) != 1:
            known = ", ".join(entry.name for entry in entries)
            what = "two stages are called that" if len(meant) > 1 else "there is no such stage"
            problems.append(f"`{text}`: {what}; write stages.N.key.path=value for one of {known}")
            continue
        problems += apply_overrides(meant[0].own, [inside], {})
    return problems


def _stage(
    written: Written,
    shared: Mapping[str, Any],
    entry: _Entry,
    entries: Sequence[_Entry],
    before: Sequence[ChainStage],
    used: set[str],
) -> tuple[ChainStage, list[str]]:
    """One stage resolved against what is shared, with its place in the chain; what is wrong with it."""
    parent, problems = _parent(written, entry, entries)
    values = _useful(shared, entry)
    merge(values, _deep(entry.own))
    for key in _idle(values, entry):
        _remove(values, key)
    rewards, found = _rewards(written, values, entry, entries)
    origins = {**dict.fromkeys(leaves(values), "shared"), **dict.fromkeys(leaves(entry.own), "user")}
    _inherit(values, entry, parent, before, origins)
    resolved, wrong = examine(replace(written, values=values, lines=_lines(written, entry), origins=origins))
    problems += found + [f"{text} (stage {entry.name})" for _, text in wrong]
    used.update(key for key in leaves(dict(shared)) if _stands(values, key))
    used.update(key for key in leaves(dict(shared)) if _stands(entry.own, key))
    recipe = resolved or Resolved(Recipe.model_construct(), {}, (), written.folder)
    notes = _notes(resolved.recipe, parent) if resolved is not None else ()
    return ChainStage(entry.name, recipe, parent, rewards, notes), problems


def _useful(shared: Mapping[str, Any], entry: _Entry) -> dict[str, Any]:
    """What is shared, without the keys that this stage has no use for or says in another way."""
    values: dict[str, Any] = {}
    merge(values, _deep(shared))
    replaced = {a for pair in _EXCLUSIVE for a in pair for b in pair if a != b and _stands(entry.own, b)}
    for key in leaves(values):
        if does_nothing(key, entry.kind) or any(key == r or key.startswith(f"{r}.") for r in replaced):
            _remove(values, key)
    return values


def _idle(values: Mapping[str, Any], entry: _Entry) -> list[str]:
    """Shared keys that do nothing under this stage's method; the stage's own are a problem that is told."""
    tune = values.get("tune")
    method = tune.get("method", "lora") if isinstance(tune, Mapping) else "lora"
    found = idle_keys(values, {"stage": entry.kind, "tune": {"method": method}})
    return [key for key, _ in found if not _stands(entry.own, key)]


def _parent(written: Written, entry: _Entry, entries: Sequence[_Entry]) -> tuple[int | None, list[str]]:
    """Which earlier stage this one starts from: the one named by `from`, else the nearest that fits."""
    if "base" in entry.own and entry.start is not None:
        return None, [at_line(written, f"stages.{entry.index}.from", "`from` and `base` both say where to start")]
    if "base" in entry.own or entry.start == "base":
        return None, []
    earlier = entries[: entry.index]
    if entry.start is not None:
        meant = [other for other in earlier if entry.start in other.calls]
        if len(meant) != 1:
            known = ", ".join(["base", *(other.name for other in earlier)])
            text = f"`from: {entry.start}` is not one earlier stage; it may be {known}"
            return None, [at_line(written, f"stages.{entry.index}.from", text)]
        earlier = meant
    for other in reversed(earlier):
        if GIVES[other.kind] in TAKES[entry.kind]:
            return other.index, []
        if GIVES[other.kind] != "scores" or entry.start is not None:
            text = (
                f"stage {entry.name} cannot start from {other.name}: a {other.kind} model gives {GIVES[other.kind]}, "
                f"and {entry.kind} starts from a model of {' or '.join(TAKES[entry.kind])}. Change the order, or write "
                "`from: base` or `from:` an earlier stage"
            )
            return None, [at_line(written, f"stages.{entry.index}.stage", text)]
    return None, []


def _rewards(
    written: Written, values: dict[str, Any], entry: _Entry, entries: Sequence[_Entry]
) -> tuple[tuple[int, ...], list[str]]:
    """The reward stages whose runs pay (or, where no reward is needed, judge) this one; a policy without a reward of
    its own is paid by the nearest one earlier."""
    earlier = [other for other in entries[: entry.index] if other.kind == "reward"]
    if not values.get("reward"):
        if entry.kind not in _ONLINE:
            return (), []
        if not earlier:
            text = f"stage {entry.name} has no reward: put a reward stage before it, or write a `reward:` section"
            return (), [at_line(written, f"stages.{entry.index}.stage", text)]
        values["reward"] = {"run": earlier[-1].name}
    found: list[int] = []
    problems: list[str] = []
    parts = []
    for part in _reward_runs(values):
        meant = [other for other in entries if part in other.calls]
        if len(meant) == 1 and meant[0] in earlier:
            found.append(meant[0].index)
            part = meant[0].name
        elif meant:
            text = f"`reward.run: {part}` must be one reward stage before {entry.name}"
            problems.append(at_line(written, f"stages.{entry.index}.reward.run", text))
        parts.append(part)
    if parts and isinstance(values["reward"], dict):
        values["reward"] = {**values["reward"], "run": ",".join(parts)}
    return tuple(found), problems


def _reward_runs(values: Mapping[str, Any]) -> list[str]:
    reward = values.get("reward")
    runs = reward.get("run") if isinstance(reward, Mapping) else None
    return [part.strip() for part in str(runs).split(",") if part.strip()] if runs is not None else []


def _inherit(
    values: dict[str, Any], entry: _Entry, parent: int | None, before: Sequence[ChainStage], origins: dict[str, str]
) -> None:
    """A stage asks as the stage before it asked: the prompt template is handed on unless it names its own."""
    if parent is None or does_nothing("data.template", entry.kind) or _stands(values, "data.template"):
        return
    data = getattr(before[parent].resolved.recipe, "data", None)
    if data is not None and data.template is not None and isinstance(values.get("data"), dict):
        values["data"]["template"] = data.template
        origins["data.template"] = f"from {before[parent].name}"


def _notes(recipe: Recipe, parent: int | None) -> tuple[str, ...]:
    """What a reader of the lineage should know about where the stage begins."""
    if parent is None and recipe.stage in ("reward", "dpo", *_ONLINE):
        return (f"starts from the plain base: no sft stage stands before {recipe.stage}",)
    return ()


def _unused(written: Written, shared: Mapping[str, Any], used: set[str]) -> list[str]:
    """Shared keys that no stage has a use for. Keys with a typo are the stages' own business."""
    idle = [key for key in leaves(dict(shared)) if key not in used]
    return [at_line(written, key, f"`{key}` does nothing in any stage of this chain") for key in idle]


def _lines(written: Written, entry: _Entry) -> dict[tuple[str | int, ...], int | str]:
    """The line of every path of the merged stage: its own where it stands in the list, else the shared one."""
    own = {path[2:]: line for path, line in written.lines.items() if path[:2] == ("stages", entry.index)}
    return {**written.lines, **own}


def _deep(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _walk(values: Any, key: str) -> Iterator[Any]:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return
        values = values[part]
        yield values


def _stands(values: Mapping[str, Any], key: str) -> bool:
    return len(list(_walk(values, key))) == key.count(".") + 1


def _remove(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    at: Any = values
    for parent in parents:
        at = at.get(parent) if isinstance(at, dict) else None
    if isinstance(at, dict):
        at.pop(last, None)
        if parents and not at:
            _remove(values, ".".join(parents))


__all__ = ["Chain", "ChainStage", "is_chain_recipe", "load_chain", "load_saved"]
