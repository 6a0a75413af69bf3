"""Writes `recipe.md` and `cli.md` out of the recipe's classes and the command line: `python docs/make_reference.py`.

The suite fails while a page is not what this would write.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import typer.main
from pydantic.fields import FieldInfo

from tunesmith import cli, recipe, recipe_rules, recipe_sections
from tunesmith.recipe_data import SOURCE_KEYS, DataSource
from tunesmith.recipe_sections import Section

HERE = Path(__file__).parent
STAGES = get_args(recipe_sections.StageName)
METHODS = tuple(recipe_rules.DEFAULTS)
_MARK = "<!-- written by docs/make_reference.py; edit the docstrings beside the keys instead -->"


def recipe_page() -> str:
    """The whole of recipe.md."""
    parts = [_RECIPE_HEAD, _section("", recipe.Recipe)]
    for name, field in recipe.Recipe.model_fields.items():
        if inner := _inner(field.annotation):
            parts += list(_sections(name, inner))
    parts += [_rates(), _derived()]
    return _MARK + "\n\n" + "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """The whole of cli.md."""
    root = typer.main.get_command(cli.app)
    parts = [_CLI_HEAD]
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        parts.append(_command(f"tunesmith {name}", command))
        parts += [_command(f"tunesmith {name} {sub}", c) for sub, c in getattr(command, "commands", {}).items()]
    return _MARK + "\n\n" + "\n\n".join(parts) + "\n"


def descriptions(section: type[Section]) -> dict[str, str]:
    """The text that stands below each key of a section in its source."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for key, text in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and is_text:
            found[key.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


def _sections(prefix: str, section: type[Section]) -> Iterator[str]:
    yield _section(prefix, section)
    for name, field in section.model_fields.items():
        inner = _inner(field.annotation)
        if inner is not None and (inner is not DataSource or f"{prefix}.{name}" == SOURCE_KEYS[0]):
            yield from _sections(f"{prefix}.{name}", inner)


def _section(prefix: str, section: type[Section]) -> str:
    title = f"## `{prefix}`" if prefix else "## Top level"
    title = f"## {', '.join(f'`{key}`' for key in SOURCE_KEYS)}" if section is DataSource else title
    said = descriptions(section)
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in said:
            raise SystemExit(f"{key} has no description; write one below it in {inspect.getsourcefile(section)}")
        cells = (f"`{name}`", _values(field), _default(field, key), said[name] + _only_for(key))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = (section.__doc__ or "").strip()
    return "\n".join([title, "", " ".join(head.split()) + _section_for(prefix), "", *rows])


def _inner(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
        if get_origin(candidate) is list and (inner := _inner(get_args(candidate)[0])):
            return inner
    return None


def _values(field: FieldInfo) -> str:
    return _type(field.annotation, tuple(field.metadata))


def _type(annotation: Any, bounds: tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0], annotation.__metadata__)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a, bounds) for a in arguments if a is not type(None)))
    if origin is Literal:
        return " ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section"
    if origin is list:
        return f"list of {_type(arguments[0]).replace('a section', 'sections')}"
    names = {str: "text", bool: "`true` `false`", int: "whole number", float: "number", dict: "mapping"}
    return names.get(origin or annotation, str(annotation)) + _bounds(bounds)


def _bounds(metadata: tuple[Any, ...]) -> str:
    signs = {annotated_types.Gt: ("gt", ">"), annotated_types.Ge: ("ge", "≥"), annotated_types.Lt: ("lt", "<"),
             annotated_types.Le: ("le", "≤")}  # fmt: skip
    flat = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [f"{signs[type(m)][1]} {getattr(m, signs[type(m)][0]):g}" for m in flat if type(m) in signs]
    return f" {', '.join(found)}" if found else ""


def _default(field: FieldInfo, key: str) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if key in _derived_keys():
        return "derived"
    if value is None or isinstance(value, Section) or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _only_for(key: str) -> str:
    stages = [stage for stage in STAGES if not recipe_rules.does_nothing(key, stage)]
    methods = recipe_rules.METHOD_KEYS.get(key.removeprefix("tune.")) if key.startswith("tune.") else None
    notes = []
    outer = key.rpartition(".")[0]
    if outer and stages != [stage for stage in STAGES if not recipe_rules.does_nothing(outer, stage)]:
        notes.append(f"{'Stage' if len(stages) == 1 else 'Stages'} {', '.join(stages)}.")
    if methods:
        notes.append(f"{'Method' if len(methods) == 1 else 'Methods'} {', '.join(sorted(methods))}.")
    return "".join(f" {note}" for note in notes)


def _section_for(prefix: str) -> str:
    if not prefix or "." in prefix:
        return ""
    stages = [stage for stage in STAGES if not recipe_rules.does_nothing(prefix, stage)]
    return "" if len(stages) == len(STAGES) else f" For {', '.join(stages)}."


def _minimal(stage: str, method: str = "lora") -> dict[str, Any]:
    values: dict[str, Any] = {"stage": stage, "base": "base", "data": {"train": "train.jsonl", "eval": "eval.jsonl"}}
    values["tune"] = {"method": method} | ({"peft": {"peft_type": "IA3"}} if method == "peft" else {})
    if stage in ("ppo", "grpo"):
        values["reward"] = {"contains": "word"}
    return values


def _resolved(stage: str, method: str = "lora") -> dict[str, Any]:
    """Dotted key -> value of everything that stage and method decide."""
    found = recipe.load_recipe(_minimal(stage, method))
    flat: dict[str, Any] = {}
    for key, origin in found.origins.items():
        if origin == "derived":
            at: Any = found.recipe
            for part in key.split("."):
                at = getattr(at, part)
            flat[key] = at
    return flat


def _derived_keys() -> frozenset[str]:
    keys = {key for stage in STAGES for key in _resolved(stage)}
    return frozenset(keys | set(_resolved("sft", "last_layers")))


def _rates() -> str:
    rows = ["| stage | " + " | ".join(METHODS) + " |", "|---|" + "---:|" * len(METHODS)]
    for stage in STAGES:
        cells = []
        for method in METHODS:
            has_head = method != "head" or stage in ("classify", "reward")
            cells.append(_rate(recipe_rules.default_rate(stage, method)) if has_head else "")
        rows.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(["## Learning rate when none is named", "", _RATES_SOURCE, "", *rows])


def _rate(value: float) -> str:
    """`2e-4`, `2.3e-5`."""
    number, exponent = f"{value:.1e}".split("e")
    return f"{float(number):g}e{int(exponent)}"


def _derived() -> str:
    found = {stage: _resolved(stage) for stage in STAGES}
    shared = {k: v for k, v in found["sft"].items() if all(k in f and f[k] == v for f in found.values())}
    rows = ["| stage | keys |", "|---|---|", f"| all, method lora | {_pairs(shared)} |"]
    for stage in STAGES:
        own = {k: v for k, v in found[stage].items() if k not in shared and k != "train.learning_rate"}
        rows.append(f"| {stage} | {_pairs(own)} |")
    return "\n".join(["## Other derived values", "", _DERIVED_HEAD, "", *rows])


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"`{k}: {str(v).lower() if isinstance(v, bool) else v}`" for k, v in values.items())


def _command(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([path, *(_metavar(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## `{path}`", "", " ".join((command.help or "").split()), "", "```text", usage, "```"]
    rows = [(f"`{_metavar(p)}`", p.help or "") for p in arguments if getattr(p, "help", None)]
    rows += [(f"`{_option(p)}`", f"{p.help or ''}{_option_default(p)}".strip()) for p in options]
    if rows:
        lines += ["", "| argument or option | meaning |", "|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or (parameter.name or "").upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _option(parameter: Any) -> str:
    names = ", ".join(parameter.opts)
    if parameter.is_flag:
        return names
    kind = "NUMBER" if isinstance(parameter.default, int | float) else "TEXT"
    return f"{names} {parameter.metavar or kind}"


def _option_default(parameter: Any) -> str:
    default = parameter.default
    if parameter.is_flag or default is None or callable(default) or "UNSET" in repr(default).upper():
        return " Required." if parameter.required else ""
    return f" Default: {default}."


_RECIPE_HEAD = """# Recipe reference

A recipe is YAML. Unknown keys are refused with the nearest right name, keys that would do nothing for the stage or the
method too, all problems at once and with their lines. `1e-4` is a number, `no` is text, a key written twice is an
error. Every key can be given on the command line as `key.path=value`.

A value comes from the recipe (`user`), the command line (`override`), a file it extends (`extends FILE`), a fixed
`default`, or is `derived` from stage and method; `origins.json` in the run says which. `extends: other.yaml` takes the
keys of another recipe beside this one; the nearer file wins. `stages:` makes a recipe a [chain](chain.md): a list of
recipes, in which each entry may also have `name` and `from`.

Paths are looked for beside the recipe first, then from the working directory."""

_RATES_SOURCE = """Whatever starts at zero, such as an adapter or a new head, wants a higher rate than trained weights:
LoRA (2106.09685, appendix D) uses 5e-6 for all of GPT-3 and 2e-4 for its adapter. A recipe whose rate belongs to the
other kind is warned about. Rates of full runs: reward from InstructGPT (2203.02155, appendix C.2), dpo from 2305.18290,
appendix B, grpo from 2402.03300, 4.2."""

_DERIVED_HEAD = "What stage and method decide when held-out rows are named and the recipe says nothing else."

_CLI_HEAD = """# Command line

Results go to stdout, talk and progress to stderr. `--json` prints one JSON document on one line. On a terminal a live
line shows step, loss, rate, tokens a second and time left; elsewhere a plain line every ten seconds.

A RUN is a folder, or a name under `./runs`. Exit codes are in [formats](formats.md#exit-codes)."""


if __name__ == "__main__":
    (HERE / "recipe.md").write_text(recipe_page(), encoding="utf-8")
    (HERE / "cli.md").write_text(cli_page(), encoding="utf-8")
