"""Commented recipes, one a stage, that run as they stand on the embedded base and data; new files, never over old."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from tunesmith.embedded import BASE, SETS, SPLITS, data_file
from tunesmith.errors import RecipeError, RunError

STAGES = ("classify", "sft", "pretrain", "reward", "dpo", "ppo", "grpo", "chain")
"""Stages that have a recipe here, in the order in which a newcomer meets them."""
_RATE = re.compile(r"^\s*learning_rate:.*\n|, learning_rate: [\d.e-]+", re.MULTILINE)

_FULL = re.compile(r"tune: \{method: full\}( +#.*)?")


def recipe_text(stage: str, base: str | None = None) -> str:
    """The stage's recipe. With another base, without learning rate and full tuning, which suit a tiny one."""
    if stage not in STAGES:
        raise RecipeError(_unknown(stage))
    text = files("tunesmith.start").joinpath("recipes", f"{stage}.yaml").read_text(encoding="utf-8")
    if base is None or base == BASE:
        return text
    text = re.sub(r"^base: \S+( +#.*)?$", lambda _: f"base: {quoted(base)}", text, flags=re.MULTILINE)
    return _RATE.sub("", _FULL.sub("tune: {method: lora, rank: 16}", text))


def _unknown(stage: str) -> str:
    if stage == "mlm":
        return ("stage mlm needs a masked base, and none comes with the program; write one for yours with "
                "`tunesmith init mlm --data FILE --base BASE`")  # fmt: skip
    near = difflib.get_close_matches(stage, STAGES, 1)
    return f"there is no stage `{stage}`" + (f"; did you mean {near[0]}?" if near else f"; take {', '.join(STAGES)}")


def with_own_data(text: str, folder: Path) -> str:
    """The recipe with its embedded data as files beside it: copied to `folder`, what is there already is kept."""
    for group in SETS:
        for split in SPLITS:
            name = f"embedded:{group}/{split}"
            if re.search(rf"{re.escape(name)}\b", text):
                source = data_file(name)
                assert source is not None, "the names come from the embedded package itself"
                write_new(folder / group / f"{split}.jsonl", source.read_text(encoding="utf-8"), keep=True)
                text = re.sub(rf"{re.escape(name)}( *)", lambda m, g=group, s=split: _padded(g, s, m), text)
    return text


def _padded(group: str, split: str, match: re.Match[str]) -> str:
    """The file's name, as wide as what it stands for, so that comments stay in their column."""
    file = f"{group}/{split}.jsonl"
    return file + match[1] + " " * (len(match[0]) - len(match[1]) - len(file)) if match[1] else file


def write_new(path: Path, text: str, *, keep: bool = False) -> None:
    """Write a file that is not there yet. One that is there is kept (`keep`) or a `RecipeError`, never replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        if not keep or not path.is_file():
            raise RecipeError(f"{path} is there already and is left as it is; name another file with --to") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from None


def quoted(value: str) -> str:
    """A YAML scalar: plain where that is safe, else in double quotes."""
    if re.fullmatch(r"[A-Za-z/~.][\w./@~+-]*", value) and value.lower() not in ("null", "true", "false", "yes", "no"):
        return value
    return '"' + "".join(_ESCAPED.get(c, c) for c in value) + '"'


_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
