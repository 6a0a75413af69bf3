"""A run is a folder: the names in it, who may write to it, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DiskError, RunError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}$")
LAYOUT = {
    "recipe": "recipe.yaml",
    "origins": "origins.json",
    "environment": "environment.json",
    "inputs": "inputs.json",
    "bad_rows": "bad_rows.jsonl",
    "preflight": "preflight.json",
    "trainable": "trainable.json",
    "metrics": "metrics.jsonl",
    "evaluations": "evaluations.jsonl",
    "timings": "timings.jsonl",
    "before": "before.json",
    "baselines": "baselines.json",
    "after": "after.json",
    "forget": "forget.json",
    "train_rows": "train_rows.jsonl",
    "eval_rows": "eval_rows.jsonl",
    "final_rows": "final_rows.jsonl",
    "samples": "samples.jsonl",
    "rollouts": "rollouts.jsonl",
    "result": "result.json",
    "report": "report.html",
    "card": "model_card.md",
    "checkpoints": "checkpoints",
    "final": "final",
    "lock": ".lock",
    "chain": "chain.json",
    "handoff": "handoff.json",
    "earlier": "earlier_tasks.json",
    "lineage": "lineage.json",
}
_BEGINNINGS = ("environment", "train_rows", "eval_rows", "rollouts")


@dataclass(slots=True)
class RunDir:
    """One run's folder. `run.file("metrics")` is the path of a known file; the table is `LAYOUT`."""

    path: Path
    _lock: int = -1

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def file(self, name: str) -> Path:
        """Path of a file of the layout."""
        return self.path / LAYOUT[name]

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the layout, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the layout, whole or not at all."""
        write_whole(self.file(name), text)

    def read_json(self, name: str) -> Any:
        """A JSON file of the layout; `RunError` when it is missing or damaged."""
        try:
            return json.loads(self.file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{self.path} has no {LAYOUT[name]}; is it a run folder, and did the run get that far?"
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.file(name)} is damaged: {error}") from None

    def lock(self) -> RunDir:
        """Become the one writer; `RunError` names who writes here already. The lock ends with the process."""
        self._lock = self._locked_file()
        os.ftruncate(self._lock, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)
        return self

    def _locked_file(self) -> int:
        """The lock file, open and locked; another one when the file it was is no longer in the folder."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)  # a start that was refused may just have removed it
            descriptor = os.open(self.file("lock"), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(self.file("lock"))):
                    return descriptor
            except BlockingIOError:
                owner = _owner(descriptor)
                os.close(descriptor)
                raise _busy(self.path, owner) from None
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def unlock(self) -> None:
        """Let others write."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Remove the folder of a run that never began: only what a run's start itself has put there."""
        if not self.file("recipe").exists():
            for name in ("lock", "origins", "inputs", "bad_rows", "preflight", "trainable", *_BEGINNINGS):
                self.file(name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    @property
    def locked(self) -> bool:
        """True when this object holds the lock."""
        return self._lock >= 0

    @property
    def finished(self) -> bool:
        """True when the run has its result."""
        return self.file("result").is_file()


def _busy(path: Path, owner: str) -> RunError:
    return RunError(f"{path} is being written by {owner}; wait for it, or give this run another name")


def _refuse_busy(path: Path) -> None:
    """`RunError` that names the process which writes to the folder now."""
    try:
        descriptor = os.open(path / LAYOUT["lock"], os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path, _owner(descriptor)) from None
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Who holds the lock, from the lock file; waits a moment for an owner that has not written its name yet."""
    for _ in range(20):
        if name := os.pread(descriptor, 500, 0).decode(errors="replace").strip():
            return name
        time.sleep(0.01)
    return "another process"


def write_whole(path: Path, text: str) -> None:
    """Write beside, fsync, rename."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{path}: disk full; make room, then go on: nothing saved before is lost") from None
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def create_run(name: str | None, *, stage: str, root: Path | str = "runs") -> RunDir:
    """A new run folder under `root`, or at `name` when that is a path. `RunError` when it already holds a run."""
    path = _place(name, root) if name else _fresh(Path(root), stage)
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; name a folder for the run")
        _refuse_busy(path)
        refuse_taken(path)
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"cannot write to {path}: {error.strerror}; choose a folder you may write to with --run"
        ) from None
    return RunDir(path)


def refuse_outside(name: str) -> None:
    """`RunError` for a recipe's own `run` that leads out of this folder; where else to write is for --run to say."""
    if "\0" not in name and not Path(name).resolve().is_relative_to(Path.cwd()):
        raise RunError(f"the recipe's `run: {name[:60]}` leads out of this folder; name a run, or give --run FOLDER")


def refuse_taken(path: Path) -> None:
    """`RunError` when there is a run in the folder already."""
    if (path / LAYOUT["recipe"]).exists():
        raise RunError(
            f"{path} already holds a run; go on with `tunesmith train --resume {path}`, or take another name"
        )


def chain_run(name: str | None, *, root: Path | str = "runs") -> RunDir:
    """The folder of a chain: the one that this name has already, whose stages are taken over, or a new one."""
    if name and is_chain(RunDir(_place(name, root))):
        return RunDir(_place(name, root))
    return create_run(name, stage="chain", root=root)


def open_run(name: str | Path, *, root: Path | str = "runs") -> RunDir:
    """An existing run, by folder or by its name under `root`."""
    for candidate in (Path(name), Path(root) / str(name)):
        if (candidate / LAYOUT["recipe"]).is_file():
            return RunDir(candidate)
    known = [run.name for run in list_runs(root)]
    hint = f"; the runs in {root}/ are {', '.join(known[-8:])}" if known else f"; there are no runs in {root}/"
    raise RunError(f"there is no run {name}{hint}")


def is_chain(run: RunDir) -> bool:
    """True for the folder of a chain, whose stages are run folders inside it."""
    return run.file("chain").is_file()


def model_run(run: RunDir) -> RunDir:
    """The run whose model is meant: the run itself, or the stage that a chain's model comes from."""
    if not is_chain(run):
        return run
    model = run.read_json("chain").get("model")
    if not isinstance(model, str) or model != Path(model).name:
        raise RunError(f"{run.file('chain')} is damaged: it does not name the stage that gives the chain's model")
    return RunDir(run.path / model)


def installed_version() -> str:
    """The version of this program as it is installed, else as its source says."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tunesmith")
    except PackageNotFoundError:
        return "0+source"


def list_runs(root: Path | str = "runs") -> list[RunDir]:
    """All runs under `root`, oldest first."""
    found = [path.parent for path in Path(root).glob(f"*/{LAYOUT['recipe']}")]
    return [RunDir(path) for path in sorted(found, key=lambda p: (p / LAYOUT["recipe"]).stat().st_mtime)]


def _place(name: str, root: Path | str) -> Path:
    if "\0" in name:
        raise RunError("a run's name cannot hold a NUL byte")
    if os.sep in name or name in (".", ".."):
        return Path(name)
    if not NAME.match(name):
        raise RunError(f"`{name[:60]}` is no name for a run: letters, digits, dots, dashes, at most 120 of them")
    return Path(root) / name


def _fresh(root: Path, stage: str) -> Path:
    stem = f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        path = root / (stem if number == 0 else f"{stem}-{number}")
        if not path.exists():
            return path
    raise RunError(f"too many runs named {stem} in {root}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a last line still being written is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line.strip()]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
