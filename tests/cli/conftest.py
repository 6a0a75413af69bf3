"""A tiny base of each kind and a data file for each stage, in a folder of its own; commands run in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tests.tiny import save_tiny, tiny_causal, tiny_masked

from tunesmith.cli import main

NOUNS = ("cat", "dog", "mat", "sun", "tree", "book", "film", "road", "fish", "lamp")
GOOD, BAD = ("good", "fine", "great"), ("bad", "dull", "poor")


class Done(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON document it must be."""
        return json.loads(self.out)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(count: int, start: int = 0) -> list[dict[str, Any]]:
    rows = []
    for i in range(start, start + count):
        word = (GOOD if i % 2 else BAD)[i % 3]
        rows.append({"text": f"the {NOUNS[i % 10]} {i} was {word}", "label": "yes" if i % 2 else "no"})
    return rows


def answered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"what is {i} plus 1?", "completion": f"it is {i + 1}"} for i in range(start, start + count)]


def texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"the {NOUNS[i % 10]} sat on the mat number {i}"} for i in range(start, start + count)]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llama` and `bert`."""
    folder = tmp_path_factory.mktemp("bases")
    save_tiny(tiny_causal("llama"), folder / "llama")
    save_tiny(tiny_masked("bert"), folder / "bert")
    return folder


@pytest.fixture
def work(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: data for every stage, bases linked, an own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    for name in ("llama", "bert"):
        (tmp_path / name).symlink_to(bases / name)
    for name, make in (("labels", labelled), ("pairs", answered), ("texts", texts)):
        write_rows(tmp_path / f"{name}.jsonl", make(24))
        write_rows(tmp_path / f"{name}-eval.jsonl", make(8, 100))
    return tmp_path


DATA = {"classify": "labels", "sft": "pairs", "pretrain": "texts", "mlm": "texts"}


def recipe_for(stage: str, **sections: Any) -> dict[str, Any]:
    """A recipe of a few steps; `sections` go over it, section by section."""
    name = DATA[stage]
    recipe: dict[str, Any] = {
        "stage": stage,
        "base": "bert" if stage in ("classify", "mlm") else "llama",
        "precision": "float32",
        "data": {"train": f"{name}.jsonl", "eval": f"{name}-eval.jsonl"},
        "tune": {"method": "lora", "rank": 2},
        "train": {"epochs": 1, "batch_examples": 8, "learning_rate": 1e-3},
        "evaluate": {"samples": 0},
    }
    for key, value in sections.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe


@pytest.fixture
def write(work: Path) -> Callable[..., str]:
    """write("sft", tune={...}) -> the recipe's file name."""

    def written(stage: str, /, name: str = "recipe.yaml", **sections: Any) -> str:
        (work / name).write_text(yaml.safe_dump(recipe_for(stage, **sections), sort_keys=False), encoding="utf-8")
        return name

    return written


@pytest.fixture
def run(work: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """run("train", "recipe.yaml", ...) -> exit code, stdout, stderr, as the file descriptors got them."""

    def command(*args: str) -> Done:
        capfd.readouterr()
        code = main(list(args))
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return command
