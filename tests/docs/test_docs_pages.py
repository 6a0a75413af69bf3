"""Every command, script, recipe and row in README and docs does what the page says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, Block, anchors, blocks, links, pages
from tests.docs.running import BlockError, run_block

from tunesmith.errors import DataError, RecipeError


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)], ids=_name)
def test_every_block_of_the_page_runs(page: Path, workspace: Path) -> None:
    for block in blocks(page):
        run_block(block, workspace)


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_every_link_of_the_page_leads_somewhere(page: Path) -> None:
    problems = []
    for line, target in links(page):
        name, _, anchor = target.partition("#")
        if name.startswith(("https://", "http://", "mailto:")):
            continue
        other = (page.parent / name).resolve() if name else page
        if not other.exists():
            problems.append(f"{_name(page)}:{line}: {target} does not exist")
        elif anchor and other.suffix == ".md" and anchor not in anchors(other):
            problems.append(f"{_name(page)}:{line}: {other.name} has no heading for #{anchor}")
    assert not problems, "\n".join(problems)


def test_every_page_of_docs_is_reached_from_the_index() -> None:
    reached, todo = set(), [ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        todo += [
            other
            for _, target in links(page)
            if (other := (page.parent / target.partition("#")[0]).resolve()).suffix == ".md" and other.exists()
        ]
    left = [_name(page) for page in sorted((ROOT / "docs").rglob("*.md")) if page not in reached]
    assert not left, f"no link leads to {', '.join(left)}"


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("bash", "tunesmith train nowhere.yaml", BlockError),
        ("bash", "make no-such-target", BlockError),
        ("bash", "curl example.org", BlockError),
        ("bash", "cat no-such-file", subprocess.CalledProcessError),
        ("yaml", "train: {epochz: 3}", RecipeError),
        ("jsonl sft", '{"question": "One?"}', DataError),
        ("python", "import tunesmith\ntunesmith.no_such_verb()", AttributeError),
        ("prose", "no language is called so", BlockError),
    ],
)
def test_a_block_that_does_not_work_is_found(language: str, text: str, error: type[Exception], workspace: Path) -> None:
    block = Block(workspace / "page.md", 1, tuple(language.split()), text)
    with pytest.raises(error):
        run_block(block, workspace)


def test_a_fence_that_is_never_closed_is_found() -> None:
    with pytest.raises(ValueError, match="never closed"):
        blocks(Path("page.md"), "text\n```bash\nls\n")
