"""What every trial is made of: a fork that trains, a kill that is really a kill, and a comparison byte by byte."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError


@dataclass(frozen=True, slots=True)
class Subject:
    """What is broken: `train(folder)` starts the run in `folder` or goes on with it; `fingerprint(folder)` is a hash
    of all that has to come back. `head` and `tail` are the seconds before the first and after the last step."""

    train: Callable[[Path], None]
    fingerprint: Callable[[Path], str]
    num_steps: int
    save_every: int
    head: float = 0.0
    tail: float = 0.012


def spawn(job: Callable[[], Any]) -> int:
    """Fork; the child runs `job` and leaves with the exit code the program would have. Returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _ordinary_signals()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        job()
        code = 0
    except TunesmithError as error:
        code = error.exit_code
        os.write(2, f"{error}\n".encode())
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ordinary_signals() -> None:
    """Handlers as in a foreground process: what is started in the background has some of them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def finish(pid: int) -> int:
    """Wait; the exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(pid: int) -> bool:
    """Whether the child has ended; it is still to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def die() -> None:
    """SIGKILL to this very process."""
    os.kill(os.getpid(), signal.SIGKILL)


def lines(folder: Path) -> int:
    """Steps in the metrics file of the run in `folder`."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def wait_for_line(folder: Path, pid: int, target: int) -> None:
    """Return when `target` steps are in the metrics file, or when the child has ended."""
    while lines(folder) < target and not ended(pid):
        time.sleep(0.0005)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder name that does not exist yet, for one run."""
    parent = Path(tempfile.mkdtemp(prefix="tunesmith-trial-"))
    try:
        yield parent / "run"
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def unbroken(subject: Subject) -> str:
    """The fingerprint of the run that nothing happened to."""
    with scratch() as folder:
        assert finish(spawn(lambda: subject.train(folder))) == 0
        return subject.fingerprint(folder)


def comes_back(folder: Path, subject: Subject, wanted: str) -> str:
    """Resume until the end; "" when all is equal to the unbroken run, else what is wrong."""
    code = finish(spawn(lambda: subject.train(folder)))
    if code != 0:
        return f"resume ended with {code}"
    try:
        return "" if subject.fingerprint(folder) == wanted else "differs from the unbroken run"
    except (TunesmithError, OSError) as error:
        return str(error)


def in_fork(job: Callable[[], Any]) -> Any:
    """What `job` returns, computed in a fork, so that what it changes in the program is gone afterwards."""
    with scratch() as folder:
        answer = folder.parent / "answer"
        assert finish(spawn(lambda: answer.write_text(json.dumps(job())))) == 0
        return json.loads(answer.read_text())


def traced(job: Callable[[], Any], options: list[str]) -> int:
    """Fork a stopped child, attach strace to it, let it go; its exit code."""

    def stopped() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        job()

    pid = spawn(stopped)
    os.waitpid(pid, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if "attached" not in first:
        os.kill(pid, signal.SIGKILL)
        raise RuntimeError(f"strace cannot attach: {first}")
    os.kill(pid, signal.SIGCONT)
    code = finish(pid)
    tracer.communicate()
    return code


CHANGES = ("mkdir", "openat", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir", "ftruncate", "close")


def disk_calls(job: Callable[[Path], Any]) -> dict[str, list[int]]:
    """`name -> which of its calls` (from 1) touch the run folder, from the trace of an undisturbed `job(folder)`."""
    with scratch() as folder:
        log = folder.parent / "log"
        assert traced(lambda: job(folder), ["-y", "-o", str(log), "-e", f"trace={','.join(CHANGES)}"]) == 0
        found: dict[str, list[int]] = {name: [] for name in CHANGES}
        seen = dict.fromkeys(CHANGES, 0)
        main = log.read_text().split(maxsplit=1)[0]  # strace counts the calls of each thread by itself
        for line in log.read_text().splitlines():
            match = re.match(rf"{main} +(\w+)\(", line)
            if match is None or match[1] not in seen:
                continue
            seen[match[1]] += 1
            reads = match[1] == "openat" and "O_CREAT" not in line
            if str(folder) in line and not reads:
                found[match[1]].append(seen[match[1]])
    return found


def kill_at_call(job: Callable[[Path], Any], folder: Path, name: str, at: int) -> bool:
    """Run `job(folder)` under strace, which sends SIGKILL at the `at`-th `name` call; whether that killed it."""
    rule = ["-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={at}"]
    return traced(lambda: job(folder), rule) == -signal.SIGKILL
