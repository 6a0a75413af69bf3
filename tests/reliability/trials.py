"""Breaks real training processes and counts what does not come back bit for bit. One JSON object on stdout.

    python trials.py [--subject loop|pretrain|mlm|sft|classify|ppo|grpo] kills 50 | calls | strace | planted
        | signals 50 | order 20 | disk 50 | moments | starts 50 | exports

Torch is imported once; every trial is a fork (0.1 s instead of 4 s). `disk` needs `unshare -rm`; `strace`, `order` and
`exports` need strace. A trial is bad when a resume fails or weights, optimizer or metrics differ from the unbroken run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.reliability import stage_trials
from tests.reliability.harness import (
    Subject,
    comes_back,
    disk_calls,
    finish,
    in_fork,
    kill_at_call,
    lines,
    scratch,
    spawn,
    traced,
    unbroken,
    wait_for_line,
)
from tests.reliability.subjects import ONLINE, STAGES, Cursor, loop, staged

from tunesmith.engine import checkpoint, fit
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.state import TrainState

BUGS = ("in_place", "no_random_state", "no_optimizer", "no_cursor", "log_not_cut")
HOOKED = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "ftruncate")


def kills(subject: Subject, trials: int, seed: int = 0) -> dict[str, Any]:
    """R1: SIGKILL 0-12 ms after a random line of the metrics file appeared, or around the first and last; resume."""
    wanted, draw = unbroken(subject), random.Random(seed)
    bad, lost, done = [], 0, 0
    while done < trials:
        with scratch() as folder:
            pid = spawn(lambda folder=folder: subject.train(folder))
            target = draw.randrange(0, subject.num_steps + 1)
            wait_for_line(folder, pid, target)
            time.sleep(draw.uniform(0, {0: subject.head, subject.num_steps: subject.tail}.get(target, 0.0) or 0.012))
            os.kill(pid, signal.SIGKILL)
            if finish(pid) != -signal.SIGKILL:
                continue  # it had ended already: this proves nothing
            done += 1
            before = lines(folder)
            steps = checkpoint.saved_steps(folder / "checkpoints")
            lost = max(lost, before - max(steps, default=0))
            if problem := comes_back(folder, subject, wanted):
                bad.append(f"trial {done}, line {target}: {problem}")
    return {"trials": done, "bad": bad, "most_steps_lost": lost}


def _arm(at: int, *, half: bool) -> None:
    """In a forked child: SIGKILL at the `at`-th call that changes the disk (after half of a `write`, with `half`)."""
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                if half and name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **settings)

        return call

    for name in HOOKED:
        setattr(os, name, wrap(name))


def calls(stride: int = 1, bug: str = "") -> dict[str, Any]:
    """R2 in process: SIGKILL at every call that changes the disk, saves, pruning and log included; then resume."""
    subject = loop(6, 2, 1, 0.0)
    wanted = unbroken(subject)
    bad, at, over = [], 1, False

    def job(folder: Path, at: int) -> None:
        _plant(bug)
        _arm(at, half=at % 2 == 0)
        subject.train(folder)

    while not over:
        with scratch() as folder:
            code = finish(spawn(lambda folder=folder, at=at: job(folder, at)))
            over = code == 0
            if not over:
                assert code == -signal.SIGKILL, code
                if problem := comes_back(folder, subject, wanted):
                    bad.append(f"call {at}: {problem}")
        at += stride
    return {"points": (at - 1) // stride - 1, "bad": bad}


def strace(subject: Subject, stride: int = 1) -> dict[str, Any]:
    """R2 by the kernel: strace injects SIGKILL at each system call that changes the run folder; then resume."""
    wanted, points = unbroken(subject), disk_calls(subject.train)
    bad, killed, tried = [], 0, 0
    for name, numbers in points.items():
        for at in numbers[::stride]:
            with scratch() as folder:
                tried += 1
                killed += kill_at_call(subject.train, folder, name, at)
                if problem := comes_back(folder, subject, wanted):
                    bad.append(f"{name} {at}: {problem}")
    found = {name: len(numbers) for name, numbers in points.items()}
    return {"points": found, "total": sum(found.values()), "tried": tried, "killed": killed, "bad": bad}


def _plant(bug: str) -> None:
    """Make the program wrong in one way, in this process only."""
    if bug == "in_place":

        def fill(folder: Path, step: int, tensors: Any, meta: Any, real: Any = checkpoint._fill) -> None:
            real(checkpoint.step_folder(folder.parent, step), step, tensors, meta)

        checkpoint._fill, checkpoint._publish = fill, lambda temporary, target: None
    elif bug == "no_random_state":
        fit.step_randomness = lambda seed, step, device: contextlib.nullcontext()
        TrainState._restore_random = lambda self, tensors: None
    elif bug == "no_optimizer":
        TrainState._restore_optimizer = lambda self, tensors, meta: None
    elif bug == "no_cursor":
        Cursor.restore = lambda self, state: None
    elif bug == "log_not_cut":
        MetricsLog.cut = lambda self, size: None
    elif bug == "no_folder_fsync":
        checkpoint.durable.fsync_folder = lambda folder: None


def planted(stride: int = 5, *only: str) -> dict[str, Any]:
    """R3: how many kill points each planted bug fails; 0 would mean that these tests cannot see it."""
    return {bug: len(in_fork(lambda bug=bug: _with_bug(bug, stride))["bad"]) for bug in only or BUGS}


def _with_bug(bug: str, stride: int) -> dict[str, Any]:
    if bug == "in_place":
        return calls(1, bug)
    _plant(bug)
    return calls(stride)


def signals(subject: Subject, trials: int, seed: int = 1) -> dict[str, Any]:
    """R8: a stop signal at a random moment: exit code, no step lost, equal after the resume."""
    wanted, draw, bad, slowest = unbroken(subject), random.Random(seed), [], 0.0
    kinds = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 143}
    done = 0
    while done < trials:
        number = list(kinds)[done % 4]
        with scratch() as folder:
            pid = spawn(lambda folder=folder: subject.train(folder))
            target = draw.randrange(1, subject.num_steps - 2)
            wait_for_line(folder, pid, target)
            time.sleep(draw.uniform(0, 0.006))
            sent = time.perf_counter()
            os.kill(pid, number)
            code = finish(pid)
            if code == 0 or (code == -number and lines(folder) == subject.num_steps):
                continue  # it came after the last step
            done += 1
            slowest = max(slowest, time.perf_counter() - sent)
            last = max(checkpoint.saved_steps(folder / "checkpoints"), default=-1)
            problem = "" if code == kinds[number] else f"exit code {code}"
            problem = problem or ("" if last == lines(folder) else f"{lines(folder)} steps done, {last} saved")
            if problem := problem or comes_back(folder, subject, wanted):
                bad.append(f"{number.name} at {target}: {problem}")
    return {"trials": done, "bad": bad, "slowest_seconds": round(slowest, 3)}


def order(saves: int, bug: str = "") -> dict[str, Any]:
    """R4: in a trace, every file is flushed after its last write and before the rename; then the parent folder."""
    with scratch() as folder:
        log = folder.parent / "log"

        def job() -> None:
            _plant(bug)
            for step in range(1, saves + 1):
                checkpoint.save_checkpoint(folder, step, {"x": torch.full((100,), step)}, {"step": step})

        traced(job, ["-y", "-s", "0", "-o", str(log), "-e", "trace=write,fsync,rename"])
        return _unflushed(log.read_text(), str(folder))


def _unflushed(text: str, root: str) -> dict[str, Any]:
    written, dirty_names, bad, published = set(), set(), [], 0
    for line in text.splitlines():
        if match := re.search(r"write\(\d+<(.+?)>", line):
            if published and dirty_names:
                bad.append(f"{sorted(dirty_names)} was not flushed before {match[1]} was written")
                dirty_names.clear()
            if match[1].startswith(root):
                written.add(match[1])
                written.add(str(Path(match[1]).parent))
        elif match := re.search(r"fsync\(\d+<(.+?)>", line):
            written.discard(match[1])
            if match[1] == root:
                dirty_names.clear()
        elif match := re.search(r'rename\("(.+?)", "(.+?)"\)', line):
            if "/.old-" in match[2]:
                continue
            published += 1
            bad += [f"{name} was renamed unflushed" for name in sorted(written) if name.startswith(match[1])]
            dirty_names.add(match[2])
    if dirty_names:
        bad.append(f"{sorted(dirty_names)} was never flushed")
    return {"published": published, "bad": bad}


def disk(subject: Subject, sizes: int, first: int = 16, step: int = 4) -> dict[str, Any]:
    """R5: the run on `sizes` file systems of `first`, `first + step`, ... kB, too small; then they grow and it resumes.

    Needs `unshare -rm`.
    """
    wanted, bad, stopped, messages = unbroken(subject), [], 0, set()
    with scratch() as parent:
        for kilobytes in range(first, first + step * sizes, step):
            mount = parent / f"disk{kilobytes}"
            mount.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", mount], check=True)
            error = parent / f"error{kilobytes}"

            def job(mount: Path = mount, error: Path = error) -> None:
                os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
                subject.train(mount / "run")

            code = finish(spawn(job))
            said = error.read_text()
            stopped += code != 0
            root = mount / "run" / "checkpoints"
            broken = [s for s in checkpoint.saved_steps(root) if checkpoint.verify_checkpoint(root / f"step_{s:06d}")]
            if broken:
                bad.append(f"{kilobytes} kB: broken checkpoints {broken}")
            if code not in (0, 74) or (code == 74 and not re.search("disk full|bytes are free", said)):
                bad.append(f"{kilobytes} kB: exit code {code}: {said[-300:]}")
            messages |= {re.sub(r"\d+", "N", said.strip().splitlines()[-1])[-160:]} if code and said.strip() else set()
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            if problem := comes_back(mount / "run", subject, wanted):
                bad.append(f"{kilobytes} kB: {problem}")
            subprocess.run(["umount", mount], check=True)
    return {"sizes": sizes, "stopped": stopped, "bad": bad, "kinds_of_message": len(messages)}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=("loop", *STAGES, *ONLINE), default="loop")
    parser.add_argument("verb")
    parser.add_argument("numbers", nargs="*")
    options = parser.parse_args()
    arguments: list[Any] = [int(text) if text.isdigit() else text for text in options.numbers]
    home = Path(tempfile.mkdtemp(prefix="tunesmith-trials-"))
    os.environ["TUNESMITH_CACHE"] = str(home / "cache")
    try:
        # Torch imports much on the first optimizer step: here once, not in every fork.
        with contextlib.redirect_stdout(sys.stderr):
            subject, short = _subjects(options.subject, home)
        started = time.perf_counter()
        result = _run(options.verb, arguments, subject, short)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started, 1)}))


def _subjects(name: str, home: Path) -> tuple[Subject, Subject]:
    """The subject and a shorter run of it, for trials that enumerate."""
    pair = (loop(), loop(4, 2, 1, 0.0)) if name == "loop" else (staged(name, home), staged(name, home, epochs=1))
    with scratch() as folder:
        pair[1].train(folder)
    return pair


def _run(verb: str, arguments: list[Any], subject: Subject, short: Subject) -> dict[str, Any]:
    alone = {function.__name__: function for function in (calls, planted, order)}
    if verb in alone:
        return alone[verb](*arguments)
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "kills": kills, "signals": signals, "disk": disk, "moments": stage_trials.moments,
        "starts": stage_trials.starts, "exports": stage_trials.exports, "strace": strace,
    }  # fmt: skip
    return verbs[verb](short if verb in ("strace", "exports") else subject, *arguments)


if __name__ == "__main__":
    main()
