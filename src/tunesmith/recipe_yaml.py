"""YAML without its traps: `1e-4` is a number, `no` is text, a key written twice is an error, every value has a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import RecipeError

Path_ = tuple[str | int, ...]
Lines = dict[Path_, int]

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*)?\.?[0-9]+([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*\.([eE][-+]?[0-9]+)?$")
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "~": None, "": None}


def scalar(text: str) -> Any:
    """The value of an unquoted word: number, true/false, null, otherwise the text itself."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    return text


def parse_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """`(value, line of every path)`; `RecipeError` names file and line of a syntax error or a key written twice."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{where}: this is not YAML: {problem}. Check indentation, colons and quotes") from None
    except ValueError as error:
        raise RecipeError(f"{name}: this is not YAML: {error}") from None
    lines: Lines = {}
    problems: list[str] = []
    value = _value(node, (), lines, problems, name) if node is not None else None
    if problems:
        raise RecipeError("\n".join(problems))
    return value, lines


def _value(node: yaml.Node, path: Path_, lines: Lines, problems: list[str], name: str) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, i), lines, problems, name) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{name}:{line}: a key must be a plain word")
            continue
        key = key_node.value
        if key in result:
            problems.append(f"{name}:{line}: `{key}` is written twice (first in line {lines[(*path, key)]}); keep one")
            continue
        result[key] = _value(value_node, (*path, key), lines, problems, name)
        lines[(*path, key)] = line
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
