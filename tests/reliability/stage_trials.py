"""Trials that need a whole run, from recipe to report: named moments, two starts at once, exports cut off."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.reliability.harness import (
    Subject,
    comes_back,
    die,
    disk_calls,
    ended,
    finish,
    kill_at_call,
    lines,
    scratch,
    spawn,
    unbroken,
    wait_for_line,
)

from tunesmith import api
from tunesmith.engine import fit
from tunesmith.stages import running


def _before(module: Any, name: str, due: Callable[..., bool]) -> None:
    """In a forked child: SIGKILL when `module.name` is called and `due(*arguments)` says so."""
    real = getattr(module, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        if due(*arguments, **settings):
            die()
        return real(*arguments, **settings)

    setattr(module, name, call)


def _in_second_micro_batch(step: int) -> None:
    real = fit.train_step

    def train_step(stage: Any, optimizer: Any, spec: Any, at: int) -> Any:
        if at == step:
            assert len(stage.source.step_batches(at)) > 1, "this step has one micro-batch only"
            seen: list[int] = []
            stage.model.register_forward_pre_hook(lambda *_: seen.append(1) if not seen else die())
        return real(stage, optimizer, spec, at)

    fit.train_step = train_step


def _moments(subject: Subject) -> dict[str, Callable[[], None]]:
    """Name -> what to arm in the child so that it dies at that moment. R10; an epoch has 6 steps."""
    last = subject.num_steps

    def at_step(step: int) -> Callable[[], None]:
        return lambda: _before(fit, "train_step", lambda stage, optimizer, spec, at: at == step)

    def at_save(step: int) -> Callable[[], None]:
        return lambda: _before(fit, "save", lambda stage, state, *rest: state.step == step)

    return {
        "before the first step": at_step(1),
        "in the middle of the second epoch": at_step(9),
        "in the second micro-batch of a step": lambda: _in_second_micro_batch(8),
        "at the end of an epoch, evaluated and not saved": at_save(12),
        "in an evaluation": lambda: _before(fit, "_evaluate", lambda stage, state, *rest: state.step == 12),
        "after the last step, not saved": at_save(last),
        "after the last checkpoint": lambda: _before(fit, "load_best", lambda *rest: True),
        "measured again, no result yet": lambda: _before(running, "_publish", lambda *rest: True),
        "with a result, no report yet": lambda: _before(running, "write_report", lambda *rest: True),
    }


def moments(subject: Subject) -> dict[str, Any]:
    """R10: killed at named moments, killed twice, and a finished run started again; all equal to the unbroken run."""
    wanted, bad = unbroken(subject), []
    for name, arm in _moments(subject).items():
        with scratch() as folder:
            if _killed(subject, folder, arm) and (problem := comes_back(folder, subject, wanted)):
                bad.append(f"{name}: {problem}")
    with scratch() as folder:
        arms = list(_moments(subject).values())
        _killed(subject, folder, arms[1])
        _killed(subject, folder, arms[4])
        if problem := comes_back(folder, subject, wanted):
            bad.append(f"killed twice: {problem}")
        before = _contents(folder)
        if (problem := comes_back(folder, subject, wanted)) or _contents(folder) != before:
            bad.append(f"a finished run started again: {problem or 'files have changed'}")
    return {"trials": len(_moments(subject)) + 2, "bad": bad}


def _killed(subject: Subject, folder: Path, arm: Callable[[], None]) -> bool:
    def job() -> None:
        arm()
        subject.train(folder)

    code = finish(spawn(job))
    assert code == -signal.SIGKILL, f"this moment never came: exit code {code}"
    return True


def _contents(folder: Path) -> dict[str, str]:
    """Hash of every file under `folder` but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def starts(subject: Subject, pairs: int, seed: int = 2) -> dict[str, Any]:
    """R9: two starts on one folder, 0-200 ms apart; the owner is killed and a new start goes on without unlocking."""
    wanted, draw, bad, slowest = unbroken(subject), random.Random(seed), [], 0.0
    for number in range(1, pairs + 1):
        with scratch() as folder:
            first = spawn(lambda folder=folder: subject.train(folder))
            time.sleep(draw.uniform(0, 0.2))
            said = folder.parent / "said"
            began = time.perf_counter()
            second = spawn(lambda folder=folder, said=said: _saying(said, lambda: subject.train(folder)))
            loser = _first_to_end(first, second)
            slowest = max(slowest, time.perf_counter() - began)
            problem = _refusal(finish(loser), said.read_text() if said.exists() else "", loser == second)
            owner = first if loser == second else second
            wait_for_line(folder, owner, draw.randrange(1, subject.num_steps - 4))
            os.kill(owner, signal.SIGKILL)
            finish(owner)
            if lines(folder) and (problem := problem or comes_back(folder, subject, wanted)):
                bad.append(f"pair {number}: {problem}")
    return {"pairs": pairs, "bad": bad, "slowest_refusal_seconds": round(slowest, 2)}


def _saying(file: Path, job: Callable[[], Any]) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    job()


def _first_to_end(*pids: int) -> int:
    while True:
        for pid in pids:
            if ended(pid):
                return pid
        time.sleep(0.001)


def _refusal(code: int, said: str, heard: bool) -> str:
    if code != 2:
        return f"the start that lost ended with {code}: {said[-200:]}"
    names_owner = re.search(r"process \d+ on \S+ since \d{4}-", said)
    return "" if names_owner or not heard else f"the owner is not named: {said[-200:]}"


def exports(subject: Subject, stride: int = 1) -> dict[str, Any]:
    """R2 for exports: SIGKILL at each system call that changes the target's folder; it is whole, or not there."""
    bad, killed, tried = [], 0, 0
    with _finished(subject) as run:
        formats = ("adapter", "merged")
        for form in formats:

            def job(folder: Path, form: str = form) -> None:
                api.export(run, folder / "out", form)

            with scratch() as folder:
                assert finish(spawn(lambda folder=folder, job=job: job(folder))) == 0
                wanted = _contents(folder / "out")
            for name, numbers in disk_calls(job).items():
                for at in numbers[::stride]:
                    with scratch() as folder:
                        tried += 1
                        killed += kill_at_call(job, folder, name, at)
                        there = (folder / "out").exists()
                        if not there:
                            assert finish(spawn(lambda folder=folder, job=job: job(folder))) == 0
                        if _contents(folder / "out") != wanted:
                            bad.append(f"{form}, {name} {at}: {'published half' if there else 'the next differs'}")
    return {"tried": tried, "killed": killed, "bad": bad}


@contextmanager
def _finished(subject: Subject) -> Iterator[Path]:
    with scratch() as folder:
        assert finish(spawn(lambda: subject.train(folder))) == 0
        yield folder
