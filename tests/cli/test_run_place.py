"""A place that cannot hold a run, a run that is in use, a disk that is full: said at once, and nothing is lost."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from tests.cli.bad_recipes import put

from tunesmith.rundir import RunDir


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(work, run):
    put(work, "sft")
    (work / "locked").mkdir()
    (work / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = run("train", "recipe.yaml", "--run", str(work / "locked" / "run"))
    assert done.code == 2 and "locked" in done.err and "--run" in done.err


@pytest.mark.parametrize("place", ["/proc/never", "file/run", "na\tme"])
def test_a_place_that_cannot_hold_a_run(place, work, run):
    put(work, "sft")
    (work / "file").write_text("")
    done = run("train", "recipe.yaml", "--run", place)
    assert done.code == 2 and "Traceback" not in done.err
    assert place.rpartition("/")[0] in done.err and place.partition("/")[2] in done.err


def test_a_second_run_in_the_same_folder_names_the_first(work, run):
    put(work, "sft")
    holder = RunDir(work / "runs" / "busy")
    holder.path.mkdir(parents=True)
    holder.lock()
    done = run("train", "recipe.yaml", "--run", "busy")
    holder.unlock()
    assert done.code == 2 and f"process {os.getpid()} on" in done.err and "another name" in done.err
    assert run("train", "recipe.yaml", "--run", "busy").code == 0, "the lock ends with its owner"
    again = run("train", "recipe.yaml", "--run", "busy")
    assert again.code == 2 and "already holds a run" in again.err and "--resume" in again.err


def test_two_real_processes_at_once_make_one_run(work):
    put(work, "pretrain", train={"epochs": None, "steps": 40})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tunesmith", "train", "recipe.yaml", "--run", "one"]
    both = [
        subprocess.Popen(
            command, cwd=work, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], messages
    assert (work / "runs" / "one" / "result.json").is_file()


def test_a_full_disk_is_said_before_the_first_step(work, run, monkeypatch):
    from tunesmith.engine import durable

    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    put(work, "sft")
    done = run("train", "recipe.yaml", "--run", "full")
    assert done.code == 74 and "1000 bytes are free" in done.err and "Traceback" not in done.err
