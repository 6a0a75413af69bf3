"""Fenced blocks, headings and links of Markdown pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`]*)$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the words after its fence, its text, and where it begins."""

    page: Path
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        """The first word after the fence, or nothing."""
        return self.words[0] if self.words else ""

    @property
    def where(self) -> str:
        """`docs/data.md:12`."""
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The name in a first line like `# tune.yaml`: what the reader is told to call the file."""
        first = self.text.splitlines()[0] if self.text else ""
        found = re.fullmatch(r"# ([\w./-]+\.(?:yaml|py))", first)
        return found[1] if found else None


def pages() -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG, and every page under docs and examples."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return top + sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page in order; ValueError for a fence that is never closed."""
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    found: list[Block] = []
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if match is None:
            continue
        if opened is None:
            opened = (number, match)
        elif match["fence"] == opened[1]["fence"] and not match["info"].strip():
            start, fence = opened
            inside = [part.removeprefix(fence["indent"]) for part in lines[start : number - 1]]
            found.append(Block(page, start, tuple(fence["info"].split()), "\n".join(inside)))
            opened = None
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: this fence is never closed")
    return found


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page outside its fenced blocks, with their numbers."""
    fence: str | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if match is not None and fence is None:
            fence = match["fence"]
        elif match is not None and match["fence"] == fence:
            fence = None
        elif fence is None:
            yield number, line


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of every link and picture outside fenced blocks."""
    return [
        (number, found[1] or found[2])
        for number, line in prose(page)
        for found in _LINK.finditer(re.sub(r"`[^`]*`", "", line))
    ]


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings as GitHub spells them, and explicit `<a id>`s."""
    found: set[str] = set()
    for _, line in prose(page):
        found.update(re.findall(r'<a id="([^"]+)"', line))
        if match := re.match(r"#+ (.+)$", line):
            plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found
