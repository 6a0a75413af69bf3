"""Folders that cannot hold a run are refused before anything is read; one writer, under any name of the folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.reliability.harness import finish, spawn

from tunesmith import api
from tunesmith.errors import DiskError, RunError
from tunesmith.rundir import RunDir, create_run

RECIPE = {"stage": "pretrain", "base": "nowhere", "data": {"train": "nothing.jsonl"}}
NOBODY = 65534


def refused(run: Path, error: Path) -> int:
    """Exit code of a start in `run` by a user whom permissions bind; what it says goes to the open file `error`."""

    def job() -> None:
        os.dup2(os.open(error, os.O_WRONLY | os.O_TRUNC), 2)
        if os.geteuid() == 0:
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        api.train(RECIPE, run=str(run))

    return finish(spawn(job))


@pytest.mark.parametrize("what", ["read-only", "no entry", "a file", "a file above", "a name too long"])
def test_a_folder_that_cannot_hold_a_run_is_refused_at_once(what, tmp_path):
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)  # pytest's own folders are closed to the other user
    home, error = tmp_path / "home", tmp_path / "error"
    error.touch()
    home.mkdir()
    (home / "file").write_text("mine")
    home.chmod({"read-only": 0o555, "no entry": 0o000}.get(what, 0o777))
    name = {"a file": "file", "a file above": "file/run", "a name too long": "n" * 256}.get(what, "run")
    code, said = refused(home / name, error), error.read_text()
    home.chmod(0o777)
    assert code == 2 and str(home) in said and "folder" in said, said
    assert said.count("\n") == 1, "one message, no traceback"
    assert sorted(path.name for path in home.iterdir()) == ["file"] and (home / "file").read_text() == "mine"


def test_the_folder_that_can_hold_a_run_is_not_what_is_refused(tmp_path):
    """Control: in a good folder the same start is let in."""
    assert create_run(str(tmp_path / "run"), stage="pretrain").lock().locked


def test_a_link_to_the_folder_is_the_same_run(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    held = create_run(str(tmp_path / "link"), stage="sft").lock()
    with pytest.raises(RunError, match=rf"process {os.getpid()} on \S+ since"):
        create_run(str(tmp_path / "real"), stage="sft").lock()
    held.unlock()
    create_run(str(tmp_path / "real"), stage="sft").lock().unlock()


def test_a_lock_on_a_file_that_was_removed_is_no_lock(tmp_path):
    first = RunDir(tmp_path / "run").lock()
    late = os.open(tmp_path / "run" / ".lock", os.O_RDWR)  # a start that opened the file just before it went
    first.discard()
    first.unlock()
    second = RunDir(tmp_path / "run").lock()
    assert os.fstat(late).st_nlink == 0
    with pytest.raises(RunError, match="is being written by process"):
        RunDir(tmp_path / "run").lock()
    second.unlock()
    os.close(late)


def test_a_full_disk_is_called_one_and_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_json("result", {"loss": 1.0})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="disk full; make room"):
        run.write_json("result", {"loss": 2.0})
    assert run.read_json("result") == {"loss": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
