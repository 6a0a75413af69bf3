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


def test_what_the_user_set_stands(monkeypatch):
    environment = {command.TUNABLES: "glibc.malloc.arena_max=1"}
    assert became(environment, monkeypatch) is None
    assert environment[command.TUNABLES] == "glibc.malloc.arena_max=1"


def test_the_command_still_answers():
    given = {name: value for name, value in os.environ.items() if name != command.TUNABLES}
    done = subprocess.run([sys.executable, "-m", "tunesmith", "--help"], capture_output=True, text=True, env=given)
    assert done.returncode == 0 and "train" in done.stdout
