"""The generated pages are what their generator writes today."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from typing import Any

import pytest
from tests.docs.blocks import ROOT

from tunesmith.recipe_sections import Section
from tunesmith.rundir import LAYOUT


@pytest.fixture(scope="module")
def generator() -> Mapping[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "make_reference.py"), run_name="generator")


@pytest.mark.parametrize(("name", "function"), [("recipe.md", "recipe_page"), ("cli.md", "cli_page")])
def test_the_page_is_current(name: str, function: str, generator: Mapping[str, Any]) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == generator[function](), f"docs/{name} is out of date: run `python docs/make_reference.py`"


class _Described(Section):
    known: int = 1
    """What it means."""
    silent: int = 2


def test_a_key_without_a_description_stops_the_generator(generator: Mapping[str, Any]) -> None:
    assert generator["descriptions"](_Described) == {"known": "What it means."}
    with pytest.raises(SystemExit, match="silent has no description"):
        generator["_section"]("", _Described)


def test_every_file_of_a_run_is_on_the_page_of_formats() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    missing = [name for name in LAYOUT.values() if name not in text]
    assert not missing, f"docs/formats.md does not say what {', '.join(missing)} is"
