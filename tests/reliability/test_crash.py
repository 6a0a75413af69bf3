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
from tests.reliability.subjects import ONLINE, STAGES

import tunesmith.errors

TRIALS = Path(__file__).with_name("trials.py")
PATHS = (Path(tunesmith.errors.__file__).parents[1], TRIALS.parents[2])


def trials(*arguments: object, subject: str = "loop", within: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON answer of one batch of trials, run by its own process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    command = [*within, sys.executable, "-W", "error", str(TRIALS), "--subject", subject, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=7200)
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
evidence = functools.partial(pytest.param, marks=pytest.mark.evidence)


@pytest.mark.parametrize(
    ("subject", "count"),
    [("loop", 6), ("sft", 2), ("ppo", 2), ("grpo", 2), *(evidence(stage, 12) for stage in (*STAGES, *ONLINE))],
)
def test_a_killed_run_resumes_to_the_same_bytes(subject, count):
    result = trials("kills", count, subject=subject)
    assert result["trials"] == count and result["bad"] == []
    assert result["most_steps_lost"] <= 3 + 1  # the save interval, and the step whose checkpoint was being written


@pytest.mark.parametrize("stride", [7, evidence(1)])
def test_a_kill_at_every_call_that_changes_the_disk_loses_nothing(stride):
    result = trials("calls", stride)
    assert result["points"] > 150 // stride and result["bad"] == []


@pytest.mark.evidence
@needs_strace
@pytest.mark.parametrize(("subject", "stride"), [("loop", 1), ("classify", 5)])
def test_a_kill_at_every_system_call_that_changes_the_run_loses_nothing(subject, stride):
    result = trials("strace", stride, subject=subject)
    assert result["killed"] > 60 and result["killed"] >= 0.95 * result["tried"] and result["bad"] == []


@needs_strace
@pytest.mark.parametrize("stride", [25, evidence(1)])
def test_an_export_cut_off_anywhere_is_whole_or_not_there(stride):
    result = trials("exports", stride, subject="sft")
    assert result["killed"] >= 0.9 * result["tried"] > 0 and result["bad"] == []


@needs_strace
def test_files_and_folders_are_flushed_before_and_after_the_rename():
    result = trials("order", 20)
    assert result["published"] == 20 and result["bad"] == []
    assert trials("order", 5, "no_folder_fsync")["bad"]  # control


@pytest.mark.parametrize(("subject", "count"), [("loop", 4), evidence("loop", 50), evidence("sft", 20)])
def test_stop_signals_lose_no_step(subject, count):
    result = trials("signals", count, subject=subject)
    assert result["trials"] == count and result["bad"] == [] and result["slowest_seconds"] < 30


@pytest.mark.parametrize("subject", ["mlm", *map(evidence, ("pretrain", "sft", "classify"))])
def test_a_run_killed_at_any_named_moment_ends_with_the_same_bytes(subject):
    result = trials("moments", subject=subject)
    assert result["trials"] == 11 and result["bad"] == []


@pytest.mark.parametrize("pairs", [3, evidence(50)])
def test_of_two_starts_on_one_folder_one_runs_and_the_other_names_it(pairs):
    result = trials("starts", pairs, subject="pretrain")
    assert result["pairs"] == pairs and result["bad"] == []


@needs_mount
@pytest.mark.parametrize(("subject", "sizes"), [("loop", (8,)), evidence("loop", (50,)), evidence("sft", (50, 40, 12))])
def test_a_full_disk_shows_no_broken_checkpoint_and_the_run_goes_on_when_there_is_room(subject, sizes):
    result = trials("disk", *sizes, subject=subject, within=("unshare", "-rm"))
    assert result["stopped"] >= min(sizes[0], 8) and result["bad"] == []


@pytest.mark.parametrize("arguments", [(25, "no_cursor", "log_not_cut"), evidence((5,))])
def test_every_planted_bug_is_caught(arguments):
    found = trials("planted", *arguments)
    assert len(found) - 1 == (len(arguments) - 1 or 5)
    assert all(caught > 0 for name, caught in found.items() if name != "seconds"), found
