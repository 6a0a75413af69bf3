"""The command runs in a process whose heap does not fall to pieces, and only when it is a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tunesmith import __main__ as command

pytestmark = pytest.mark.skipif(not command.has_glibc(), reason="this C library is not GNU's")


def became(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    """What the process would become, None when it stays; `cli.main` is not run."""
    found: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        found.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "tunesmith", "--help"])
    monkeypatch.setattr("tunesmith.cli.main", lambda: 0)
    try:
        command.main()
    except SystemExit:
        return found[0]
    return None


def test_the_process_becomes_one_with_a_steady_heap_once(monkeypatch):
    environment: dict[str, str] = {}
    assert became(environment, monkeypatch) == [sys.executable, "-m", "tunesmith", "--help"]
    assert environment[command.TUNABLES] == command.STEADY
    assert became(environment, monkeypatch) is None


ROUNDS = """
import resource

def round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(25 << 20) for _ in range(3)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([round() for _ in range(5)][-1])
"""


@pytest.mark.parametrize(("tunables", "faults"), [(command.STEADY, range(100)), ("", range(1000, 10**6))])
def test_what_was_freed_is_there_again_without_page_faults(tunables, faults):
    """Without the tunables, the control, the heap's end is given back and taken anew at every round."""
    environment = {**os.environ, command.TUNABLES: tunables}
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) in faults


def test_what_the_user_set_stands(monkeypatch):
    environment = {command.TUNABLES: "glibc.malloc.arena_max=1"}
    assert became(environment, monkeypatch) is None
    assert environment[command.TUNABLES] == "glibc.malloc.arena_max=1"


def test_the_command_still_answers():
    given = {name: value for name, value in os.environ.items() if name != command.TUNABLES}
    done = subprocess.run([sys.executable, "-m", "tunesmith", "--help"], capture_output=True, text=True, env=given)
    assert done.returncode == 0 and "train" in done.stdout
