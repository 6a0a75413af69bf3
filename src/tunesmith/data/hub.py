"""Data sets from the hub, kept as Parquet beside the program's other cached files."""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")


def cache_folder() -> Path:
    """Where encoded samples and fetched data sets are kept: `TUNESMITH_CACHE`, or `~/.cache/tunesmith`."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def fetch(spec: str) -> Path:
    """A hub id with an optional `:split` (train by default) -> a Parquet file. `DataError` with the way out."""
    if not _ID.match(spec) or spec.startswith(("/", ".")) or Path(spec).suffix in (".jsonl", ".json", ".csv", ".txt", ".gz"):
        raise DataError(f"there is no file, folder or glob {spec}; paths are looked up beside the recipe and from {Path.cwd()}")
    name, _, part = spec.partition(":")
    target = cache_folder() / "hub" / f"{sha256(spec.encode()).hexdigest()[:24]}.parquet"
    if not target.is_file():
        _download(name, part or "train", spec, target)
    return target


def _download(name: str, part: str, spec: str, target: Path) -> None:
    import datasets

    try:
        found: Any = datasets.load_dataset(name, split=part)
    except Exception as error:  # the hub client raises many kinds, and each means: not to be had
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"{spec} is neither a file here nor to be had from the hub ({type(error).__name__}: {reason}). "
            "Check the name and the network, or download it and give the file"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".tmp-{os.getpid()}")
    found.to_parquet(str(temporary))
    os.replace(temporary, target)
