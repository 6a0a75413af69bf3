"""Every example runs from its own folder, shortened to two steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs.blocks import ROOT
from tests.tiny import save_tiny, tiny_masked

from tunesmith import api

FETCHED = {"imdb_lora"}
"""Needs a data set of the hub; only read here."""


def _names() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "examples").glob("*/recipe.yaml"))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, with a tiny encoder where the mlm example looks for its base."""
    folder = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(ROOT / "examples", folder)
    save_tiny(tiny_masked("distilbert"), folder / "mlm" / "distilbert" / "distilbert-base-uncased")
    return folder


def _shortened(path: Path) -> list[str]:
    """Overrides that leave two steps and little to generate."""
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = raw.get("stages") or [raw]
    found: list[str] = []
    for number, stage in enumerate(own, 1):
        prefix = f"stages.{number}." if "stages" in raw else ""
        found += [f"{prefix}train.epochs=null", f"{prefix}train.steps=2"]
        found += [f"{prefix}sampling.max_tokens=4"] if "sampling" in stage else []
        found += [f"{prefix}evaluate.generate.max_tokens=4"] if "generate" in stage.get("evaluate", {}) else []
    return found


@pytest.mark.parametrize("name", [name for name in _names() if name not in FETCHED])
def test_the_example_runs(name: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    recipe = copied / name / "recipe.yaml"
    result = api.train(recipe, _shortened(recipe), run=str(tmp_path / "run"))
    assert result["run"] == "run"
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8")) == result


def test_every_example_is_in_the_table_of_the_readme() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    missing = [name for name in _names() if f"({name}/recipe.yaml)" not in text]
    assert not missing, f"examples/README.md does not name {', '.join(missing)}"
