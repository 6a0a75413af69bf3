"""A folder per saved step that is either whole and sound or not there: atomic save, verified load, retention.

`checkpoints/step_000400/` holds `tensors.safetensors`, `meta.json` and `manifest.json` (name, size, sha256 of
each). The manifest is written last, everything is flushed, and the folder is renamed from a hidden name: a
checkpoint exists when its manifest does. Nothing is pickled. Only the owner of the run's lock may save, repair
or prune.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.engine import durable
from tunesmith.errors import DiskError, NonFiniteError, RunError, several

FORMAT = 1
TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
_STEP = re.compile(r"step_(\d{6,})\Z")
_CHUNK = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def step_folder(root: Path, step: int) -> Path:
    """The name of the checkpoint of `step`: `root/step_000400`."""
    return Path(root) / f"step_{step:06d}"


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    protect: Collection[int] = frozenset(),
) -> Path:
    """Save `tensors` and `meta` (plain JSON values) as the checkpoint of `step`, prune, and return its folder.

    `keep` newest checkpoints stay, and the steps in `protect` (the best one) whatever their age. An unsound folder
    in the way is moved aside. Raises `NonFiniteError` before anything is written when a tensor holds NaN (or
    infinity, outside `buffer.*`), `DiskError` when the disk is full or failing, `RunError` when the folder is not
    writable; in every case the checkpoints that were there stay as they were.
    """
    root = Path(root)
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must be >= 0 and keep {keep} must be >= 1")
    _refuse_non_finite(tensors, step)
    needed = checkpoint_bytes(tensors, meta)
    target = step_folder(root, step)
    with durable.disk_errors(target, needed):
        durable.make_folder(root)
        _clean(root)
        temporary = root / f".tmp-{target.name}-{os.getpid()}"
        try:
            _fill(temporary, step, tensors, meta)
            _publish(temporary, target)
        except BaseException:
            durable.remove_folder(temporary)
            raise
    prune_checkpoints(root, keep=keep, protect=protect, sound=frozenset({step}))
    return target


def latest_checkpoint(root: Path, *, warn: Callable[[str], None], repair: bool = True) -> Path | None:
    """The newest sound checkpoint under `root`, or None when nothing was ever saved there.

    Unsound ones are named through `warn` and, with `repair` (for the run's owner only), moved aside once a sound
    one is found. When there are checkpoints and none is sound this raises `RunError`: never a silent fresh start.
    """
    root = Path(root)
    if not root.is_dir():
        return None
    if repair:
        with durable.disk_errors(root):
            _clean(root)
    damaged: list[tuple[Path, list[str]]] = []
    for step in reversed(saved_steps(root)):
        path = step_folder(root, step)
        problems = verify_checkpoint(path)
        if not problems:
            _report(damaged, path, warn, repair)
            return path
        damaged.append((path, problems))
    if not damaged:
        return None
    problems = [f"{path}: {problem}" for path, found in damaged for problem in found]
    advice = "restore one from a backup, or start a new run under another name"
    raise several(problems, RunError, headline=f"no sound checkpoint in {root}; {advice}:")


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of the checkpoint at `path`, verified first; `RunError` lists the damage."""
    path = Path(path)
    if problems := verify_checkpoint(path):
        raise several(problems, RunError, headline=f"{path} is damaged; resume from another checkpoint:")
    try:
        tensors = load_file(path / TENSORS)
        meta = json.loads((path / META).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); resume from another checkpoint") from error
    return tensors, meta


def verify_checkpoint(path: Path) -> list[str]:
    """Everything wrong with the checkpoint at `path`, as sentences; empty when it is sound. Reads every byte."""
    return _verify(Path(path), contents=True)


def saved_steps(root: Path) -> list[int]:
    """The steps that have a checkpoint folder under `root`, ascending; sound or not."""
    try:
        names = os.listdir(root)
    except OSError:
        return []
    steps = {name: int(match[1]) for name in names if (match := _STEP.match(name))}
    return sorted(step for name, step in steps.items() if name == step_folder(root, step).name)


def prune_checkpoints(
    root: Path, *, keep: int, protect: Collection[int] = frozenset(), sound: Collection[int] = frozenset()
) -> list[int]:
    """Remove all but the `keep` newest whole checkpoints and those in `protect`; returns the removed steps.

    Nothing is removed unless a checkpoint that stays is sound: one named in `sound` (just written) or one whose
    checksums hold when read here. Each goes by a rename first, so that no half-deleted one is ever seen.
    """
    root, steps = Path(root), saved_steps(root)
    whole = [s for s in steps if s in sound or not _verify(step_folder(root, s), contents=False)]
    stays = set(whole[-keep:]) | (set(steps) & set(protect)) | set(sound)
    doomed = [step for step in whole if step not in stays]
    safe = set(sound) & set(steps)
    if not doomed or not (safe or any(_is_sound(root, step) for step in sorted(stays, reverse=True))):
        return []
    with durable.disk_errors(root):
        hidden = [root / f".old-{step_folder(root, step).name}" for step in doomed]
        for step, name in zip(doomed, hidden, strict=True):
            durable.remove_folder(name)
            os.rename(step_folder(root, step), name)
        durable.fsync_folder(root)
    for name in hidden:
        durable.remove_folder(name)
    return doomed


def checkpoint_bytes(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
    """Bytes a checkpoint of these takes on disk: exact for tensors and `meta`, about 500 for the manifest."""
    header = len(_header(_in_order(tensors)))
    return header + sum(_size(t) for t in tensors.values()) + len(_json(meta or {})) + 500


def check_free_space(root: Path, bytes_needed: int) -> None:
    """Raise `DiskError` unless `bytes_needed` bytes are free on the file system that will hold `root`."""
    free = durable.free_bytes(Path(root))
    if free < bytes_needed:
        raise DiskError(
            f"{root}: {bytes_needed} bytes are needed for checkpoints, {free} bytes are free; "
            "make room, or choose a run folder on another disk"
        )


def check_writable(root: Path) -> None:
    """Create `root` and prove that a file can be made, flushed and removed in it; else `RunError` or `DiskError`."""
    root = Path(root)
    with durable.disk_errors(root):
        durable.make_folder(root)
        probe = root / f".tmp-probe-{os.getpid()}"
        probe.unlink(missing_ok=True)
        try:
            durable.write_chunks(probe, [b"probe"])
        finally:
            probe.unlink(missing_ok=True)


def _refuse_non_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    bad = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        # A mask buffer may hold -inf by design; NaN is wrong everywhere.
        wrong = torch.isnan(tensor) if name.startswith("buffer.") else ~torch.isfinite(tensor)
        if bool(wrong.any()):
            bad.append(f"{name} ({int(wrong.sum())} of {tensor.numel()} values)")
    if bad:
        shown = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        found = f"NaN or infinity in {shown}"
        raise NonFiniteError(f"step {step} is not saved: {found}; the last checkpoint is intact")


def _fill(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write and flush the three files into the new `folder`, the manifest last, and flush the folder."""
    folder.mkdir()
    contents = {TENSORS: _safetensors(tensors), META: iter([_json(meta)])}
    files = []
    for name, chunks in contents.items():
        size, digest = durable.write_chunks(folder / name, chunks)
        files.append({"name": name, "size": size, "sha256": digest})
    durable.write_chunks(folder / MANIFEST, [_manifest(step, files)])
    durable.fsync_folder(folder)


def _publish(temporary: Path, target: Path) -> None:
    """Give the finished folder its name; an unsound one in the way is moved aside, a sound one replaced."""
    if not os.path.lexists(target):
        durable.publish(temporary, target)
        return
    if verify_checkpoint(target):
        _move_aside(target)
        durable.publish(temporary, target)
        return
    # Between the two renames the old one has a hidden name; `_clean` gives it back after a crash there.
    old = target.with_name(f".replaced-{target.name}")
    os.rename(target, old)
    durable.publish(temporary, target)
    durable.remove_folder(old)


def _clean(root: Path) -> None:
    """Undo what a crash left: give a checkpoint whose replacement never came its name back, remove the rest."""
    for path in root.iterdir():
        if path.name.startswith(".replaced-step_"):
            target = root / path.name.removeprefix(".replaced-")
            if not os.path.lexists(target):
                durable.publish(path, target)
                continue
        if path.name.startswith((".replaced-step_", ".old-step_", ".tmp-step_")):
            durable.remove_folder(path)


def _move_aside(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    durable.publish(path, aside)
    return aside


def _report(damaged: list[tuple[Path, list[str]]], good: Path, warn: Callable[[str], None], repair: bool) -> None:
    for path, problems in damaged:
        where = path
        if repair:
            with durable.disk_errors(path):
                where = _move_aside(path)
        moved = f", moved to {where.name}" if repair else ""
        warn(f"{path} is damaged ({'; '.join(problems)}){moved}; using {good.name} instead")


def _is_sound(root: Path, step: int) -> bool:
    return not verify_checkpoint(step_folder(root, step))


def _verify(path: Path, *, contents: bool) -> list[str]:
    """Problems of the checkpoint at `path`; sizes only unless `contents`."""
    match = _STEP.match(path.name)
    if match is None:
        return [f"{path.name} is not the name of a checkpoint (step_000400)"]
    try:
        manifest = _read_manifest(path, int(match[1]))
        found = [_check_file(path, entry, contents) for entry in manifest]
    except (OSError, ValueError) as error:
        return [str(error)]
    return [problem for problem in found if problem]


def _read_manifest(folder: Path, step: int) -> list[dict[str, Any]]:
    """The entries of the manifest; `ValueError` unless it is byte for byte what is written here for `step`."""
    _require_plain_file(folder / MANIFEST)
    raw = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        kinds = {"name": str, "size": int, "sha256": str}
        files = [{key: kind(entry[key]) for key, kind in kinds.items()} for entry in manifest["files"]]
        version, written_step = manifest["format"], manifest["step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is not readable ({type(error).__name__})") from error
    if version != FORMAT:
        raise ValueError(f"{MANIFEST} has format {version!r}, this version reads format {FORMAT}")
    if written_step != step:
        raise ValueError(f"{MANIFEST} is of step {written_step!r}, the folder says {step}")
    if raw != _manifest(step, files) or {f["name"] for f in files} != {TENSORS, META}:
        raise ValueError(f"{MANIFEST} has been altered")
    return files


def _check_file(folder: Path, entry: Mapping[str, Any], contents: bool) -> str:
    path = folder / entry["name"]
    size = _require_plain_file(path)
    if size != entry["size"]:
        return f"{entry['name']} has {size} bytes instead of {entry['size']}"
    if contents and durable.file_sha256(path) != entry["sha256"]:
        return f"{entry['name']} does not match its sha256"
    return ""


def _require_plain_file(path: Path) -> int:
    """Its size; `ValueError` when it is missing or a link, pipe or folder: those are never followed."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a plain file")
    return status.st_size


def _manifest(step: int, files: list[dict[str, Any]]) -> bytes:
    body = {"format": FORMAT, "step": step, "files": files}
    return _json({**body, "sha256": sha256(_json(body)).hexdigest()})


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest element first, then by name: every tensor is aligned, and equal contents give equal files."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has type {tensor.dtype}, which checkpoints do not hold")
        end = offset + _size(tensor)
        kind, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, one tensor on the CPU at a time: its own writer does not flush to disk."""
    ordered = _in_order(tensors)
    yield _header(ordered)
    for _, tensor in ordered:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        view = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]
