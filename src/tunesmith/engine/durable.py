"""Files and folders that survive a crash: written, flushed and renamed in an order a power cut cannot break.

`rename` is atomic, but says nothing about contents: without `fsync` of the file before and of the folder after
it, a power cut may leave a new name on an empty file (Pillai et al., OSDI 2014). Every helper turns the operating
system's error into one that names the path, what was needed and what is free.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from tunesmith.errors import DiskError, RunError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the disk that holds `path` (which need not exist yet)."""
    folder = Path(os.path.abspath(path))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def disk_errors(path: Path, bytes_needed: int | None = None) -> Iterator[None]:
    """Turn an `OSError` inside the block into `DiskError` (disk full or failing) or `RunError` (the rest)."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, bytes_needed) from error


def explain(error: OSError, path: Path, bytes_needed: int | None = None) -> RunError:
    """The error to raise for `error` while writing `path`: what was found, where, and what to do."""
    try:
        free = f"{free_bytes(path)} bytes are free"
    except OSError:
        free = "the free space cannot be read"
    needed = "" if bytes_needed is None else f"{bytes_needed} bytes are needed, "
    if error.errno in _FULL:
        return DiskError(f"{path}: disk full ({needed}{free}); make room, then resume: nothing saved before is lost")
    if error.errno == errno.EIO:
        return DiskError(f"{path}: the disk reports an I/O error ({needed}{free}); check the disk, then resume")
    reason = error.strerror or str(error)
    return RunError(f"{path}: cannot be written ({reason}); choose a folder that you can write to")


def fsync_folder(folder: Path) -> None:
    """Put the names inside `folder` on the disk: new, renamed and removed entries."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and missing parents, each on the disk before this returns. A present folder is left alone."""
    folder = Path(os.path.abspath(folder))
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file stands where a folder is needed", str(folder))
    fsync_folder(folder.parent)


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file from `chunks` and flush it to the disk; returns its size in bytes and its sha256 (hex).

    The digest is of the bytes handed in, not of what was read back. `FileExistsError` when `path` exists.
    """
    digest, size = sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def publish(source: Path, target: Path) -> None:
    """Rename `source` (already flushed) to `target` and put the rename on the disk."""
    os.rename(source, target)
    fsync_folder(target.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment it holds the old or the new bytes whole."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}"[:255])
    with disk_errors(path, len(data)):
        temporary.unlink(missing_ok=True)
        try:
            write_chunks(temporary, [data])
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete `folder` with everything in it; failures are left for the next clean-up (the folder has a hidden name)."""
    shutil.rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of the file's bytes, read in pieces."""
    with path.open("rb", buffering=0) as file:
        return _digest(file.fileno())


def _digest(descriptor: int) -> str:
    digest = sha256()
    while chunk := os.read(descriptor, 1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
