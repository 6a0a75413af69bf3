"""YAML without its traps: `1e-4` is a number, `no` is text, a key written twice is an error, every value has a line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import RecipeError

Path_ = tuple[str | int, ...]
Lines = dict[Path_, int | str]
"""The line of every path; `file:line` where another file says it."""

MAX_NODES = 100_000
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "~": None, "": None}
_MAX_DIGITS = 300
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in (
    "str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge", "value"
)}  # fmt: skip


def scalar(text: str) -> Any:
    """The value of an unquoted word: number, true/false, null, otherwise the text itself.

    `1e-4` is a number; `no`, `0123`, `0x10` and `12:30` are text, whatever YAML 1.1 makes of them.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > _MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


def parse_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """`(value, line of every path)`; `RecipeError` names file and line of a syntax error or a key written twice.

    Anchors that hold themselves or multiply beyond 100,000 values, and tags, are refused: a recipe needs neither.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}: this is not YAML: {problem}. Check indentation, colons and quotes") from None
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{name}: this is not YAML: {problem}. Check brackets and quotes") from None
    reading = _Reading(name)
    value = _value(node, (), reading) if node is not None else None
    if reading.problems:
        raise RecipeError("\n".join(reading.problems))
    return value, reading.lines


@dataclass(slots=True)
class _Reading:
    """What is gathered on the way through a document. `inside` are the collections around a node."""

    name: str
    lines: Lines = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    inside: list[yaml.Node] = field(default_factory=list)
    num_nodes: int = 0


def _value(node: yaml.Node, path: Path_, reading: _Reading) -> Any:
    line = node.start_mark.line + 1
    reading.lines[path] = line
    reading.num_nodes += 1
    if reading.num_nodes > MAX_NODES or node in reading.inside or len(reading.inside) > 50:
        raise RecipeError(f"{reading.name}:{line}: too large, too deep, or an anchor that repeats itself; write it out")
    if node.tag not in _TAGS:
        reading.problems.append(
            f"{reading.name}:{line}: the tag `{node.tag[:60]}` means nothing in a recipe; leave it out"
        )
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    reading.inside.append(node)
    if isinstance(node, yaml.SequenceNode):
        value: Any = [_value(item, (*path, i), reading) for i, item in enumerate(node.value)]
    else:
        assert isinstance(node, yaml.MappingNode)
        value = _mapping(node, path, reading)
    reading.inside.pop()
    return value


def _mapping(node: yaml.MappingNode, path: Path_, reading: _Reading) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            reading.problems.append(f"{reading.name}:{line}: a key must be a plain word")
            continue
        key = key_node.value
        if key in result:
            first = reading.lines[(*path, key)]
            reading.problems.append(
                f"{reading.name}:{line}: `{key}` is written twice (first in line {first}); keep one"
            )
            continue
        result[key] = _value(value_node, (*path, key), reading)
        reading.lines[(*path, key)] = line
    return result


def read_text(path: Path) -> str:
    """A recipe's text; `RecipeError` when it is missing, a folder, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; examples/ has one for each stage") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; name the recipe file inside it") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
