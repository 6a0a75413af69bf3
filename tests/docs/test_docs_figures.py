"""Figures in the pages are those of the evidence they link to; the page about Python names all that is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"evidence/results/(\w+\.md)")
_FIGURE = re.compile(r"(?<![\w.])\d+\.\d{3}(?![\w.])")


def wrong_figures(page: str, results: dict[str, str]) -> list[str]:
    """Figures with three decimals in a row or paragraph with a link, which none of the linked results has."""
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[|-])", page):
        linked = [results.get(name, "") for name in _LINK.findall(block)]
        if linked:
            found += [figure for figure in _FIGURE.findall(block) if not any(figure in text for text in linked)]
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "evidence/results").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_figures_are_those_of_the_results_they_link_to(page: Path, results: dict[str, str]) -> None:
    assert wrong_figures(page.read_text(encoding="utf-8"), results) == []


def test_control_a_figure_that_was_not_measured_is_found() -> None:
    results = {"x.md": "0.123 and 4.567"}
    page = (
        "[one](evidence/results/x.md) gave 0.123\n\nnothing linked 9.999\n\n| 0.124 | [x](../evidence/results/x.md) |"
    )
    assert wrong_figures(page, results) == ["0.124"]
    assert wrong_figures(page.replace("0.124", "4.567"), results) == []


def test_pages_do_link_to_results() -> None:
    """Else the test above would say nothing."""
    linked = [page for page in PAGES if _LINK.search(page.read_text(encoding="utf-8"))]
    assert len(linked) >= 5


def test_the_page_about_python_names_everything_that_is_public() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    public = set(tunesmith.__all__) - {"__version__"}
    assert not [name for name in sorted(public) if not re.search(rf"`[^`\n]*\b{name}\b|\btunesmith\.{name}\b", page)]
