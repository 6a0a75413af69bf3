"""Imports go down only, torch is loaded late, files stay small: read from the source, so nothing is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tunesmith"
ROWS = [
    ("__main__",),
    ("cli",),
    ("api", "__init__"),
    ("start",),
    ("stages",),
    ("evaluate", "export", "serve", "dashboard"),
    ("engine", "rollout", "plan"),
    ("data", "model", "objectives"),
    ("batch", "ops", "recipe", "rundir", "errors", "embedded"),
]
"""Upper rows may import lower ones and their own; a file such as `recipe_yaml` or `cli_output` belongs to the part that
its name begins with."""
ALONE = {
    "engine": {"engine", "batch", "ops", "recipe", "rundir", "errors"},
    "objectives": {"objectives", "batch", "ops", "errors"},
    "data": {"data", "batch", "ops", "errors", "embedded"},
    "model": {"model", "batch", "ops", "errors", "embedded"},
}
"""Parts that may import only these."""
LIGHT = re.compile(r"^(recipe\w*|errors|rundir|cli\w*|api\w*|__init__|__main__|plan/hardware|dashboard/\w+)\.py$")
HEAVY = {"torch", "transformers", "datasets", "peft", "matplotlib", "sklearn", "pyarrow"}


def part_of(module: str) -> str:
    """`tunesmith.recipe_yaml` -> recipe, `tunesmith.data.mix` -> data."""
    name = module.removeprefix("tunesmith").lstrip(".").partition(".")[0] or "__init__"
    head = name.partition("_")[0]
    return head if head in ("recipe", "ops", "cli", "api") else name


def imports_of(tree: ast.AST, *, late: bool = True) -> list[tuple[str, int]]:
    """(module, line) of every import that runs; without `late` only those at the top of the module."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
        if not late and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped |= {id(inner) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            deeper = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "tunesmith" else []
            found += [(name, node.lineno) for name in deeper or [str(node.module)]]
    return found


def upward(module: str, text: str) -> list[str]:
    """Every import of the source `text` that a module of that name may not have."""
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    mine, found = part_of(module), []
    for name, line in imports_of(ast.parse(text)):
        if name.partition(".")[0] != "tunesmith" or name == "tunesmith":
            continue
        other = part_of(name)
        if other not in row or row[other] < row[mine] or (mine in ALONE and other not in ALONE[mine]):
            found.append(f"{module}:{line} ({mine}) imports {name} ({other})")
    return found


def modules() -> dict[str, Path]:
    return {
        ".".join(["tunesmith", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sorted(SOURCE.rglob("*.py"))
    }


def test_imports_go_down_only():
    problems = [p for name, path in modules().items() for p in upward(name, path.read_text())]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tunesmith.engine.fit", "from tunesmith.stages import sft"),
        ("tunesmith.engine.fit", "def f():\n    import tunesmith.data.batches"),
        ("tunesmith.data.mix", "from tunesmith.recipe import Recipe"),
        ("tunesmith.data.mix", "from tunesmith.model.load import load_config"),
        ("tunesmith.objectives.dpo", "from tunesmith.model.language import LanguageModel"),
        ("tunesmith.ops", "from tunesmith import api"),
        ("tunesmith.evaluate.report", "from tunesmith.stages.job import Job"),
    ],
)
def test_control_a_planted_import_upwards_is_found(module, line):
    assert upward(module, line)


def test_light_modules_load_nothing_heavy():
    problems = []
    for path in modules().values():
        if LIGHT.match(str(path.relative_to(SOURCE))):
            heavy = [
                (n, at) for n, at in imports_of(ast.parse(path.read_text()), late=False) if n.split(".")[0] in HEAVY
            ]
            problems += [f"{path.name}:{at} imports {name}" for name, at in heavy]
    assert not problems, "\n".join(problems)


def test_objectives_hold_no_module():
    for path in (SOURCE / "objectives").glob("*.py"):
        assert "nn.Module" not in path.read_text().replace("no nn.Module", ""), path.name


MANY_SETTINGS = {"OfflineSource.__init__", "Sampler.sample", "OnlineSource.__init__"}
"""Settings of one thing, all by name; a record to hold them would only move the list."""


def test_files_and_functions_stay_small():
    """400 lines a file, 100 a function; 8 parameters but for verbs, whose parameters are the user's options."""
    problems = []
    for path in modules().values():
        text = path.read_text()
        if (size := text.count("\n")) > 400:
            problems.append(f"{path.name}: {size} lines")
        verbs = path.name.startswith(("api", "cli"))
        for owner, node in functions(ast.parse(text)):
            lines, parameters = node.end_lineno - node.lineno + 1, parameters_of(node)
            if lines > 100:
                problems.append(f"{path.name}:{node.lineno} {owner} has {lines} lines")
            if parameters > 8 and not verbs and owner not in MANY_SETTINGS:
                problems.append(f"{path.name}:{node.lineno} {owner} has {parameters} parameters")
    assert not problems, "\n".join(problems)


def functions(tree):
    for node in ast.walk(tree):
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for inner in getattr(node, "body", []) if isinstance(node, (ast.ClassDef, ast.Module)) else []:
            if isinstance(inner, ast.FunctionDef):
                yield owner + inner.name, inner


def parameters_of(node):
    named = node.args.posonlyargs + node.args.args
    return len(named + node.args.kwonlyargs) - (bool(named) and named[0].arg in ("self", "cls"))
