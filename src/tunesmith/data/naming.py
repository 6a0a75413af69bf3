"""How files are called in what a run writes: shortly, and without this machine's folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath


def told_apart(paths: Sequence[str]) -> dict[str, str]:
    """Each path by its last part, or by as many as tell them apart: no folder of this machine that is not needed."""
    parts = {path: PurePath(path).parts for path in paths}
    names: dict[str, str] = {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(found[-depth:]) for path, found in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Short names of the absolute ones of `paths`; what was written relative, or stands on the hub, is short enough."""
    return told_apart([path for path in dict.fromkeys(paths) if PurePath(path).is_absolute()])


def place(origin: str, names: Mapping[str, str]) -> str:
    """An origin, `file:line`, with its file called by `names`."""
    name, colon, line = origin.rpartition(":")
    return names.get(name, name) + colon + line


def shortened(text: str, names: Mapping[str, str]) -> str:
    """`text` with each path of `names` by its short name: `/home/me/rows.jsonl:17` is `rows.jsonl:17`."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text
