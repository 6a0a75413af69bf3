"""The content of a base as one hash: of its safetensors files, or of the parameters of a model made in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of the safetensors files in `folder`."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        total.update(
            f"{path.name}:{_file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)}\n".encode()
        )
    return total.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int, inode: int) -> str:
    """Read once per process while the file stays the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sums(backbone: Any) -> dict[str, int]:
    """Of every parameter, the sum of its bits read as integers: in one pass over memory, enough to tell change."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(parameter.detach().contiguous().view(whole[parameter.element_size()]).sum(dtype=torch.int64))
        for name, parameter in backbone.named_parameters()
    }


def backbone_hash(backbone: Any, *, skip: Iterable[str] = ()) -> str | None:
    """The hash of the folder that `backbone` came from; else of its parameters outside the modules `skip`.

    None on the meta device, where there is no content.
    """
    folder = Path(getattr(backbone, "name_or_path", "") or "/nonexistent")
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        return weights_hash(folder)
    return parameters_hash(backbone, skip=skip)


def parameters_hash(backbone: Any, *, skip: Iterable[str] = ()) -> str | None:
    """The hash of the parameters in memory outside the modules `skip`; None on the meta device."""
    skip = tuple(f"{name}." for name in skip)
    total = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        if parameter.is_meta:
            return None
        if not name.startswith(skip):
            total.update(name.encode() + str(parameter.dtype).encode())
            total.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
