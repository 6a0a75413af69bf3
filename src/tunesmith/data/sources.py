"""What the user named -> files to read: a file, folder, glob, list of these, or a hub data set."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.data.files import DataFile
from tunesmith.data.readers import KINDS
from tunesmith.data.rows import BadRow, Row
from tunesmith.embedded import data_file
from tunesmith.errors import DataError, several

Spec = str | Path | Sequence["str | Path"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+%\[\]:-]+)?")
_FOREIGN = (
    ".py", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".arrow", ".xlsx", ".xls", ".zip", ".tar", ".xml",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """Files in reading order, the hub data sets, and what the user should be told."""

    files: tuple[DataFile, ...]
    hub: tuple[str, ...]
    notes: tuple[str, ...]


def find(spec: Spec) -> Found:
    """Every file that `spec` names; DataError listing everything that is not there."""
    parts = [spec] if isinstance(spec, str | Path) else list(spec)
    files: list[DataFile] = []
    hub: list[str] = []
    notes: list[str] = []
    problems: list[str] = []
    for part in parts:
        try:
            paths = _paths(part, notes)
            if paths is None:
                hub.append(str(part))
            else:
                named = {} if data_file(str(part)) is None else {"name": str(part)}
                files += [replace(DataFile.at(path), **named) for path in paths]
        except DataError as error:
            problems.append(str(error))
    if not parts:
        problems.append("no data is named; give a file, a folder, a glob or a hub id")
    if problems:
        raise several(problems, DataError)
    return Found(tuple(files), tuple(hub), tuple(notes))


def _paths(part: str | Path, notes: list[str]) -> list[Path] | None:
    """Paths, or None for a hub id."""
    text = str(part)
    if not text.strip() or "\x00" in text:
        raise DataError(f"data: {text!r} is no path; give a file, a folder, a glob or a hub id")
    path = data_file(text) or Path(text).expanduser()
    if path.is_dir():
        return _folder(path, None, notes)
    if path.exists():
        return [path]
    if any(char in text for char in "*?["):
        matches = sorted(glob.glob(str(path), recursive=True))
        found = [Path(match) for match in matches if Path(match).is_file()]
        if found:
            return found
    folder, colon, split = text.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _folder(Path(folder).expanduser(), split, notes)
    if HUB_ID.fullmatch(text) and not _looks_like_file(path):
        return None
    raise DataError(_missing(text, path))


def _looks_like_file(path: Path) -> bool:
    if path.is_absolute() or path.parts[0] in (".", "..") or len(path.parts) > 2:
        return True
    return path.name.lower().removesuffix(".gz").endswith((*KINDS, *_FOREIGN))


def _missing(text: str, path: Path) -> str:
    if any(char in text for char in "*?["):
        return f"{text}: no file matches; check the pattern and the folder it is tried from"
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        names = [entry.name for entry in parent.iterdir()] if parent == path.parent else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else f" (the nearest folder that exists is {parent})"
    return f"{text}: there is no such file, folder or data set{hint}; a hub id is owner/name or owner/name:split"


def _folder(folder: Path, split: str | None, notes: list[str]) -> list[Path]:
    """Data files in a folder, sorted; READMEs and the like are passed over aloud when there are tables beside them."""
    inside = folder.resolve()
    every = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    outside = [path for path in every if not path.resolve().is_relative_to(inside)]
    known = [path for path in every if _kind(path) and path not in outside]
    if split is not None:
        known = [path for path in known if split in re.split(r"[^A-Za-z0-9]+", str(path.relative_to(folder)))]
    tables = [path for path in known if _kind(path) != "text"]
    chosen = tables or known
    left = [path.name for path in every if path not in chosen] if split is None else []
    if not chosen:
        wanted = f" with {split!r} in the name" if split is not None else ""
        kinds = f"{', '.join(KINDS)}, each also with .gz"
        raise DataError(f"{folder}: no data files in this folder{wanted}; known are {kinds}")
    if left:
        notes.append(f"{folder}: passed over {', '.join(left[:5])}{' and others' if len(left) > 5 else ''}")
    if outside:
        notes.append(f"{folder}: {len(outside)} links that lead out of the folder were not followed")
    return chosen


def _kind(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return KINDS.get(name.suffix.lower())


class HubRows:
    """Rows of a hub data set, one split; class indices become their names."""

    def __init__(self, name: str) -> None:
        self.name = name
        repo, colon, split = name.partition(":")
        self._data = _load(repo, split if colon else None, name)
        self._names = {
            column: feature.names for column, feature in self._data.features.items() if hasattr(feature, "names")
        }

    def __iter__(self) -> Iterator[Row | BadRow]:
        for number, values in enumerate(self._data, start=1):
            yield Row({key: self._named(key, value) for key, value in values.items()}, f"{self.name}:{number}")

    def _named(self, column: str, value: object) -> object:
        names = self._names.get(column)
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value

    def content(self) -> Iterator[bytes]:
        """Every row as canonical JSON, for the fingerprint."""
        for row in self:
            assert isinstance(row, Row)
            yield json.dumps(dict(row.values), sort_keys=True, default=str).encode()


def _load(repo: str, split: str | None, name: str) -> Any:
    import datasets

    config = datasets.DownloadConfig(max_retries=1)
    try:
        _knock(repo)
        loaded: Any = datasets.load_dataset(repo, split=split, download_config=config)
    except Exception as error:  # the hub client raises many kinds
        raise _unreachable(name, error) from None
    if isinstance(loaded, Mapping):
        if len(loaded) == 1:
            return next(iter(loaded.values()))
        names = ", ".join(map(str, loaded))
        raise DataError(f"{name}: which split? There are {names}; write for example {repo}:{next(iter(loaded))}")
    return loaded


def _knock(repo: str) -> None:
    """One request without retries: `load_dataset` would try for half a minute before it says that there is no network.

    In the hub client's own offline mode (HF_HUB_OFFLINE) nothing is asked, and the local cache answers.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        HfApi().dataset_info(repo, timeout=5)
    except OfflineModeIsEnabled:
        return


def _unreachable(name: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return DataError(
        f"{name}: is no file here, and as a hub data set it cannot be loaded ({reason}). Check the spelling and the "
        "split; without a network, fetch it where there is one (hf download --repo-type dataset "
        f"{name.partition(':')[0]} --local-dir DIR) and name the folder or its files instead"
    )
