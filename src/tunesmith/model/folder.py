"""A base as a folder of plain files: found or downloaded, and checked before anything in it is opened."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from tunesmith.embedded import base_folder
from tunesmith.errors import ModelError, TunesmithError, several

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
_DOWNLOADED: tuple[str, ...] = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and warnings, through its own switches, put back afterwards."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def explained(base: str | Path, what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one ModelError that names the base."""
    try:
        yield
    except (TunesmithError, KeyboardInterrupt):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ModelError(f"{base}: cannot load the {what}: {lines[0] if lines else type(error).__name__}") from error


def resolve(base: str | Path, *, trust: str | None = None) -> Path:
    """The folder of `base`: itself, the embedded base, or a hub id's downloaded snapshot (`owner/name[@revision]`)."""
    text = str(base)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        hint = (
            " GGUF files are for inference: name the folder of the original weights" if text.endswith(".gguf") else ""
        )
        raise ModelError(f"{text} is a file, not a folder with config.json and *.safetensors.{hint}")
    embedded = base_folder(text)
    if embedded is not None:
        return embedded
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"{text} does not exist.{_near(folder)} Name a folder with a model, or a hub id (owner/name)")
    name, _, revision = text.partition("@")
    if is_trusted(text, trust) and not revision:
        raise ModelError(
            f"trust_remote_code: {text} must name a revision (owner/name@commit), so that the code cannot change later"
        )
    return _download(name, revision or None, with_code=is_trusted(text, trust))


def _near(folder: Path) -> str:
    try:
        names = [path.name for path in folder.parent.iterdir()]
    except OSError:
        return f" Its parent {folder.parent} does not exist either."
    near = difflib.get_close_matches(folder.name, names, 1)
    return f" Did you mean {folder.parent / near[0]}?" if near else ""


@lru_cache(maxsize=32)
def _download(name: str, revision: str | None, *, with_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns: list[str] = [*_DOWNLOADED, *(["*.py"] if with_code else [])]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=5
            )
        )  # fmt: skip
    except Exception as error:
        kind = type(error).__name__
        if "NotFound" in kind and "Local" not in kind:
            raise ModelError(f"{name} is neither a folder here nor a model on the hub (or it is private)") from error
        if "Gated" in kind:
            raise ModelError(f"{name} is gated: accept its licence on the hub and log in (hf auth login)") from error
        raise ModelError(
            f"{name} is not a folder here and the hub cannot be reached ({kind}). Connect to the network, or fetch it "
            f"on another machine (hf download {name} --local-dir FOLDER) and write the folder as base"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises ModelError naming the file when it is missing or broken."""
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}: this is not a model folder of transformers")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged: it holds a {type(found).__name__}, not an object")
    return found


def is_trusted(base: str | Path, trust: str | None) -> bool:
    """True when `trust` names exactly this base: the same text, or the same folder."""
    if trust is None:
        return False
    return trust == str(base) or (Path(base).is_dir() and Path(trust).resolve() == Path(base).resolve())


def check_code(folder: Path, base: str | Path, trust: str | None, known_type: bool) -> bool:
    """True when code from the folder may run: only if the recipe names exactly this base, and it is needed."""
    config = read_json(folder / "config.json")
    wants = bool(config.get("auto_map")) and not known_type
    if not wants:
        return False
    if is_trusted(base, trust):
        return True
    raise ModelError(
        f"{base} (model type {config.get('model_type')!r}) needs Python code from its own folder; nothing of it ran. "
        f"Read that code, and if you trust it write `trust_remote_code: {base}` in the recipe"
    )


def check_weights(folder: Path, base: str | Path) -> list[Path]:
    """The safetensors files that make up the weights, all there and inside the folder. Pickles are refused."""
    single, index = folder / "model.safetensors", folder / INDEX
    if index.is_file():
        return _shards(folder, base, index)
    if single.is_file():
        return [single]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ModelError(
            f"{base} holds its weights only as {', '.join(pickled[:3])}: a pickle can run any code when opened, so it "
            "is refused. Convert it once where you trust it: model = AutoModel.from_pretrained(FOLDER); "
            "model.save_pretrained(NEW_FOLDER), which writes safetensors"
        )
    other = sorted(path.name for path in folder.iterdir() if path.suffix in (".gguf", ".h5", ".msgpack", ".onnx"))
    found = f"; {other[0]} is of another program" if other else ""
    if single.exists() or index.exists():
        found = "; what stands there is not a plain file"
    raise ModelError(f"{base} has no model.safetensors{found}. Name a folder with the original weights as safetensors")


def _shards(folder: Path, base: str | Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} is damaged: it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    problems = []
    for name in names:
        if name != Path(name).name or name in (".", "..") or "\\" in name or "\0" in name:
            problems.append(f"{index.name} points outside the folder: {name!r}")
        elif not name.endswith(".safetensors"):
            problems.append(f"{index.name} names {name!r}, which is not a safetensors file")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing: fetch the folder again")
    if problems:
        raise several(problems, ModelError, headline=f"{base}: the weights are not complete or not safe:")
    return [folder / name for name in names]
