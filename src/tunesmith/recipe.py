"""Every knob of a run: what the user writes, checked at once, and where each value came from."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from tunesmith.errors import RecipeError, several
from tunesmith.recipe_data import SOURCE_KEYS, DataSource, DataSpec, MixPart
from tunesmith.recipe_forget import ForgetSpec
from tunesmith.recipe_preflight import PreflightSpec
from tunesmith.recipe_rules import DEFAULTS, OWN_SECTIONS, SCORED, check_together, does_nothing, method_defaults
from tunesmith.recipe_sections import (
    DpoSpec,
    EvaluateSpec,
    GrpoSpec,
    Positive,
    PpoSpec,
    RewardModelSpec,
    RewardSpec,
    SamplingSpec,
    Section,
    StageName,
    TrainSpec,
    TuneSpec,
)
from tunesmith.recipe_yaml import Lines, parse_yaml, read_text, scalar


class Recipe(Section):
    """A whole run."""

    stage: StageName
    """What is trained: the objective and the kind of rows."""
    base: str
    """The pre-trained model: a folder or a hub id, with `@revision` if wanted."""
    data: DataSpec
    """What is read."""
    run: str | None = None
    """Name of the run under ./runs, or a folder; stage and time when not set."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Decides order, splits, new heads, dropout and sampling."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; `auto` takes bfloat16 where it is measurably faster."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first of cuda, mps, cpu."""
    threads: Positive | None = None
    """CPU threads; torch's own choice when not set."""
    trust_remote_code: str | None = None
    """Runs code that comes with a model: must name exactly the base, with its commit."""
    tune: TuneSpec = Field(default_factory=TuneSpec)
    """Which parameters learn."""
    train: TrainSpec = Field(default_factory=TrainSpec)
    """How the loop runs."""
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    """What is measured beside the loss."""
    forget: ForgetSpec | None = None
    """A limit on what is forgotten while the task is learned."""
    preflight: PreflightSpec | None = None
    """What is looked at before the first step."""
    reward_model: RewardModelSpec | None = None
    """How a reward model learns."""
    dpo: DpoSpec | None = None
    """Preference learning without a reward model."""
    reward: RewardSpec | None = None
    """What a completion earns."""
    sampling: SamplingSpec | None = None
    """How rollouts are drawn."""
    ppo: PpoSpec | None = None
    """Proximal policy optimisation."""
    grpo: GrpoSpec | None = None
    """Group-relative policy optimisation."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with all defaults filled in; `origins` maps each dotted key to user, override, extends, default or
    derived."""

    recipe: Recipe
    origins: Mapping[str, str]
    warnings: tuple[str, ...]
    folder: Path

    def to_yaml(self) -> str:
        """The resolved recipe, loadable again with the same result: keys that do nothing for the stage are left out."""
        values = _useful(self.recipe.model_dump(), self.recipe.stage, known_keys())
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _useful(values: Mapping[str, Any], stage: str, defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is worth writing down; a null stays where it is not the default, as in `clip_norm: null`."""
    return {
        name: _useful(value, stage, defaults, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if not does_nothing(prefix + name, stage) and (value is not None or defaults.get(prefix + name) is not None)
    }


@dataclass(frozen=True, slots=True)
class Written:
    """What a user wrote, before any check: values, the line of every path, the origin of every dotted key."""

    values: dict[str, Any]
    lines: Lines
    origins: dict[str, str]
    name: str
    folder: Path


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Resolved:
    """Read, override (`key.path=value`), check and fill in a recipe.

    Raises `RecipeError` that lists every problem with its line and the nearest right name.
    """
    written = read_written(source)
    problems = apply_overrides(written.values, overrides, written.origins)
    unknown = _unsupported(written.values, written.lines, written.name)
    resolved, found = examine(written)
    problems += unknown + [text for key, text in found if key != "stage" or not unknown]
    if problems or resolved is None:
        raise several(problems, RecipeError, headline=f"{written.name} cannot be run:")
    return resolved


def read_written(source: str | Path | Mapping[str, Any]) -> Written:
    """A recipe as it stands, with what it extends; `RecipeError` when it is no YAML or no mapping."""
    if isinstance(source, Mapping):
        raw = _copy(source)
        return Written(raw, {}, dict.fromkeys(leaves(raw), "user"), "recipe", Path.cwd())
    path = Path(source)
    raw, lines, origins = _read_extended(path, ())
    return Written(raw, lines, origins, str(path), path.resolve().parent)


def examine(written: Written) -> tuple[Resolved | None, list[tuple[str, str]]]:
    """The recipe filled in, or None and its problems as (dotted key, what is wrong and where)."""
    raw, lines, name = written.values, written.lines, written.name
    try:
        recipe = Recipe.model_validate(dict(raw))
    except ValidationError as error:
        return None, [_explain(item, lines, name) for item in _meant(error)]
    problems, warnings = check_together(raw, recipe.model_dump())
    if problems:
        return None, [(key, _at(name, lines, key, text)) for key, text in problems]
    return _fill(raw, recipe, written.origins, warnings, written.folder), []


def at_line(written: Written, key: str, text: str) -> str:
    """`text` with the file and the line that `key` stands in."""
    return _at(written.name, written.lines, key, text)


def load_resolved(path: Path) -> Recipe:
    """The recipe a run has saved: complete, so it is only checked for its types."""
    raw, lines = parse_yaml(read_text(path), str(path))
    return _validate(raw, lines, str(path))


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the recipe with its default, for docs and checks."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            keys |= known_keys(inner, f"{prefix}{name}.")
        else:
            keys[prefix + name] = None if field.is_required() else field.get_default(call_default_factory=True)
    return keys


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section) and candidate not in (MixPart, DataSource):
            return candidate
    return None


def _read_extended(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Lines, dict[str, str]]:
    """A recipe and what it extends, the nearer file winning."""
    if path.resolve() in seen:
        raise RecipeError(f"{path} extends itself through {' -> '.join(p.name for p in seen)}")
    raw, lines = parse_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a list of `key: value` lines; found {type(raw).__name__}")
    parent = raw.pop("extends", None)
    origins = dict.fromkeys(leaves(raw), "user")
    if parent is None:
        return raw, lines, origins
    target = (path.parent / str(parent)).resolve()
    if not target.is_relative_to(path.resolve().parent):
        raise RecipeError(f"{path}: `extends: {parent}` leaves the recipe's folder; copy that file beside this one")
    base, base_lines, base_origins = _read_extended(target, (*seen, path.resolve()))
    merge(base, raw)
    shown = path.parent / str(parent)
    placed = {key: line if isinstance(line, str) else f"{shown}:{line}" for key, line in base_lines.items()}
    return base, {**placed, **lines}, {**dict.fromkeys(base_origins, f"extends {parent}"), **origins}


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put `over` into `base`, section by section, `over` winning. A source keeps its path unless `over` names one."""
    _merge(base, over, "")


def _merge(base: dict[str, Any], over: Mapping[str, Any], prefix: str) -> None:
    for key, value in over.items():
        opened = isinstance(value, dict) and f"{prefix}{key}" in SOURCE_KEYS and "path" not in value
        if opened and isinstance(base.get(key), str):
            base[key] = {"path": base[key]}
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, f"{prefix}{key}.")
        else:
            base[key] = value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def leaves(raw: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted key of every value."""
    out: list[str] = []
    for key, value in raw.items():
        out += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return out


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], origins: dict[str, str]) -> list[str]:
    """Write each `key.path=value` into `raw`; what is wrong with those that cannot be."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"`{text}` is not an override; write key.path=value, as in train.learning_rate=1e-4")
            continue
        *parents, last = key.split(".")
        at: Any = raw
        _open_source(raw, ".".join(parents), origins)
        for parent in parents:
            at = at.setdefault(parent, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            problems.append(f"`{text}`: {'.'.join(parents)} holds a value, not a section")
            continue
        at[last] = parse_yaml(value, f"override {key}")[0] if value[:1] in "[{\"'" and value else scalar(value)
        for old in [k for k in origins if k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.")]:
            del origins[old]
        origins |= dict.fromkeys(leaves({key: at[last]}), "override")
    return problems


def _open_source(raw: Mapping[str, Any], key: str, origins: dict[str, str]) -> None:
    """A source that is named by its path alone becomes a section, so that another key can stand beside the path."""
    data, name = raw.get("data"), key.rpartition(".")[2]
    if key in SOURCE_KEYS and isinstance(data, dict) and isinstance(data.get(name), str):
        data[name] = {"path": data[name]}
        if key in origins:
            origins[f"{key}.path"] = origins.pop(key)


def _unsupported(raw: Mapping[str, Any], lines: Lines, name: str) -> list[str]:
    """Stages and options that this version does not have, said plainly."""
    stages = get_args(StageName)
    stage = raw.get("stage")
    if isinstance(stage, str) and stage not in stages:
        near = difflib.get_close_matches(stage, stages, 1, 0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"this version has {', '.join(stages)}"
        return [_at(name, lines, "stage", f"there is no stage `{stage}`; {hint}")]
    return []


def _at(name: str, lines: Lines, key: str, text: str) -> str:
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    while path and path not in lines:
        path = path[:-1]
    if path not in lines or not path:
        return f"{name}: {text}"
    line = lines[path]
    return f"{line}: {text}" if isinstance(line, str) else f"{name}:{line}: {text}"


def _validate(raw: Mapping[str, Any], lines: Lines, name: str) -> Recipe:
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        problems = [_explain(item, lines, name)[1] for item in _meant(error)]
        raise several(problems, RecipeError, headline=f"{name} has {len(problems)} problem(s):") from None


def _meant(error: ValidationError) -> list[Any]:
    """The errors of what was written: of a source, those of the text or those of the section."""
    return [
        item for item in error.errors()
        if not (item["loc"][-1:] == ("str",) and isinstance(item["input"], Mapping) and len(error.errors()) > 1)
        and not (item["loc"][-1:] == (DataSource.__name__,) and item["type"] == "model_type")
    ]  # fmt: skip


def _explain(item: Any, lines: Lines, name: str) -> tuple[str, str]:
    kinds = ("list[", "literal[")
    location = [
        str(part)
        for part in item["loc"]
        if part not in ("str", DataSource.__name__) and not (isinstance(part, str) and part.startswith(kinds))
    ]
    key, kind = ".".join(location), item["type"]
    if kind == "extra_forbidden":
        return key, _at(name, lines, key, f"there is no key `{key}`{_suggest(key)}")
    if kind == "missing":
        return key, _at(name, lines, key, f"`{key}` is missing; {_MISSING.get(key, 'add it')}")
    inside = dict.fromkeys(k[len(key) + 1 :].partition(".")[0] for k in _all_keys() if k.startswith(f"{key}."))
    if kind in ("model_type", "model_attributes_type") and inside:
        text = f"`{key}` is {repr(item['input'])[:60]}, and takes keys of its own: {', '.join(inside)}"
        return key, _at(name, lines, key, text)
    found, said = repr(item["input"])[:60], item["msg"].replace("Input s", "s")
    return key, _at(name, lines, key, f"`{key}` is {found}: {said}{_quoted(item['input'])}")


_MISSING = {
    "stage": f"name one of {', '.join(get_args(StageName))}",
    "base": "name the pre-trained model: a folder or a hub id such as distilbert/distilbert-base-uncased",
    "data": "add a `data:` section with `train: FILE`",
}


def _quoted(value: Any) -> str:
    if isinstance(value, str) and not isinstance(scalar(value), str):
        return f" (it is text because of its quotes; write {value} without them)"
    return ""


@functools.cache
def _all_keys() -> tuple[str, ...]:
    keys = list(known_keys())
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    return (*keys, *sorted(sections), "extends")


def _suggest(key: str) -> str:
    """The nearest key of the same section, else the same word in another section."""
    prefix, _, last = key.rpartition(".")
    inside = [k.removeprefix(f"{prefix}.") for k in _all_keys() if k.rpartition(".")[0] == prefix]
    if prefix.rpartition(".")[0] == "data.mix" or prefix in SOURCE_KEYS:
        inside = list((DataSource if prefix in SOURCE_KEYS else MixPart).model_fields)
    near = difflib.get_close_matches(last, inside, 1, 0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    elsewhere = [k for k in _all_keys() if k.rpartition(".")[2] == last]
    elsewhere += [k for k in _all_keys() if difflib.SequenceMatcher(None, last, k.rpartition(".")[2]).ratio() > 0.8]
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}`?"
    return f"; {'this section' if prefix else 'a recipe'} has {', '.join(sorted(inside)) or 'no keys'}"


def _fill(
    raw: Mapping[str, Any], recipe: Recipe, origins: dict[str, str], warnings: list[str], folder: Path
) -> Resolved:
    """Put in what depends on stage and method, and say where every value came from."""
    opened: dict[str, Any] = {
        name: {}
        for name in OWN_SECTIONS
        if not does_nothing(name, recipe.stage) and not (name == "reward" and recipe.stage in SCORED)
    }
    written = {name: value for name, value in recipe.model_dump().items() if value is not None}
    values = Recipe.model_validate({**opened, **written}).model_dump()
    given = set(leaves(raw))
    derived = method_defaults(recipe.stage, values)
    for key, value in derived.items():
        section, _, name = key.rpartition(".")
        at = values[section] if section else values
        if at[name] is None and key not in given:
            at[name] = value
            origins[key] = "derived"
    final = Recipe.model_validate(values)
    for key in known_keys():
        if not does_nothing(key, recipe.stage) and not any(
            g == key or g.startswith(f"{key}.") or key.startswith(f"{g}.") for g in given
        ):
            origins.setdefault(key, "default")
    return Resolved(final, origins, tuple(warnings), folder)


__all__ = ["DEFAULTS", "DataSpec", "Recipe", "Resolved", "TrainSpec", "TuneSpec", "known_keys", "load_recipe"]
