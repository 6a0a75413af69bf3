"""Real processes, really killed: see `trials.py`. The quick part runs in the suite, the full counts are evidence."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tunesmith.errors

TRIALS = Path(__file__).with_name("trials.py")
SOURCES = Path(tunesmith.errors.__file__).parents[1]


def trials(*arguments: object, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON answer of one batch of trials, run by its own process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES)}
    command = [*within, sys.executable, "-W", "error", str(TRIALS), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def namespaces() -> bool:
    """Whether a user may mount a small file system of his own."""
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=16k tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@functools.cache
def tracing() -> bool:
    """Whether strace is here and may trace."""
    return (
        shutil.which("strace") is not None and subprocess.run(["strace", "true"], capture_output=True).returncode == 0
    )


needs_mount = pytest.mark.skipif(not namespaces(), reason="unshare -rm cannot mount a tmpfs here")
needs_strace = pytest.mark.skipif(not tracing(), reason="strace is missing or may not trace here")


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.evidence)])
def test_a_killed_run_resumes_to_the_same_bytes(count):
    result = trials("kills", count)
    assert result["trials"] == count and result["bad"] == []
    assert result["most_steps_lost"] <= 3 + 1  # the save interval, and the step whose checkpoint was being written


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.evidence)])
def test_a_kill_at_every_call_that_changes_the_disk_loses_nothing(stride):
    result = trials("calls", stride)
    assert result["points"] > 150 // stride and result["bad"] == []


@pytest.mark.evidence
@needs_strace
def test_a_kill_at_every_system_call_loses_nothing():
    result = trials("strace", 1)
    assert result["killed"] > 100 and result["killed"] >= 0.95 * result["total"] and result["bad"] == []


@needs_strace
def test_files_and_folders_are_flushed_before_and_after_the_rename():
    result = trials("order", 20)
    assert result["published"] == 20 and result["bad"] == []
    assert trials("order", 5, "no_folder_fsync")["bad"]  # control


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.evidence)])
def test_stop_signals_lose_no_step(count):
    result = trials("signals", count)
    assert result["trials"] == count and result["bad"] == [] and result["slowest_seconds"] < 5


@needs_mount
@pytest.mark.parametrize("sizes", [8, pytest.param(50, marks=pytest.mark.evidence)])
def test_a_full_disk_shows_no_broken_checkpoint_and_the_run_goes_on_when_there_is_room(sizes):
    result = trials("disk", sizes, within=("unshare", "-rm"))
    assert result["stopped"] >= min(sizes, 8) and result["bad"] == []


@pytest.mark.parametrize(
    "arguments", [(25, "no_cursor", "log_not_cut"), pytest.param((5,), marks=pytest.mark.evidence)]
)
def test_every_planted_bug_is_caught(arguments):
    found = trials("planted", *arguments)
    assert len(found) - 1 == (len(arguments) - 1 or 5)
    assert all(caught > 0 for name, caught in found.items() if name != "seconds"), found
