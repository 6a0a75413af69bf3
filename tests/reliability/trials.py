"""Breaks real training processes and counts what does not come back bit for bit. One JSON object on stdout.

    python trials.py kills 50 | calls | strace | planted | signals 50 | order 20 | disk 50

Torch is imported once; every trial is a fork (0.1 s instead of 4 s). `disk` needs `unshare -rm`, `strace` and `order`
need strace. A trial is bad when a resume fails or weights, optimizer or metrics differ from the unbroken run.
"""

from __future__ import annotations

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
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.batch import Batch, Outputs
from tunesmith.engine import checkpoint, fit
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.engine.state import TrainState
from tunesmith.errors import RunError, TunesmithError
from tunesmith.objectives.classify import Classify

BUGS = ("in_place", "no_random_state", "no_optimizer", "no_cursor", "log_not_cut")
HOOKED = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "ftruncate")


class Scorer(nn.Module):
    """A classifier of two layers with dropout and batch norm: random numbers and changing buffers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, batch: Batch) -> Outputs:
        hidden = self.drop(self.norm(self.embed(batch.input_ids[0])))
        pooled = torch.zeros(batch.num_segments, 8).index_add(0, batch.segments[0], hidden)
        return Outputs(scores=self.head(pooled))


class Cursor:
    """A stream: what a step gets depends on where the cursor stands, so it has to be restored."""

    def __init__(self, num_steps: int, pause: float) -> None:
        self.num_steps, self.pause, self.position = num_steps, pause, 0
        self.steps_per_epoch = max(1, num_steps // 2)

    def step_batches(self, step: int) -> list[Batch]:
        time.sleep(self.pause)
        self.position += 1
        generator = torch.Generator().manual_seed(self.position)
        ids = torch.randint(0, 32, (1, 8), generator=generator)
        ones, half = torch.ones(1, 8), torch.arange(8)[None] // 4
        labels = torch.randint(0, 3, (2,), generator=generator)
        return [Batch(ids, ids, ones, torch.arange(8)[None] % 4, half, labels=labels, lengths=(4, 4))]

    def at_boundary(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: Any) -> None:
        self.position = state["position"]


def train(folder: Path, *, num_steps: int = 24, save_every: int = 3, keep: int = 2, pause: float = 0.002) -> None:
    """Start the run in `folder`, or go on with it."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(7)
    model = Scorer()
    torch.random.set_rng_state(generator)
    optim = OptimSpec(0.05, weight_decay=0.01, schedule="cosine", warmup_steps=2)
    source = Cursor(num_steps, pause)
    state = TrainState(0, model, build_optimizer(model, optim), source, identity={"data": "tiny"})
    names = ("metrics", "evaluations", "timings")
    files = fit.Files(*(MetricsLog(folder / f"{name}.jsonl") for name in names), checkpoints=folder / "checkpoints")
    spec = FitSpec(3, optim, save_every=save_every, keep=keep)
    stage = Stage("tiny", model, Classify(), source)
    resumed = fit.resume(state, files, say=print)
    if not resumed:
        files.metrics.cut(0)
    fit.fit(stage, state, spec, files, say=print, show=lambda report: None, resumed=resumed)


def fingerprint(folder: Path) -> str:
    """sha256 over the last checkpoint's tensors (weights, optimizer, random states) and the metrics file."""
    newest = checkpoint.latest_checkpoint(folder / "checkpoints", warn=print, repair=False)
    assert newest is not None
    parts = [
        newest.name.encode(),
        (newest / checkpoint.TENSORS).read_bytes(),
        (folder / "metrics.jsonl").read_bytes(),
    ]
    return sha256(b"|".join(parts)).hexdigest()


def spawn(job: Callable[[], None]) -> int:
    """Fork; the child runs `job` and leaves with the exit code the program would have. Returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
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


def finish(pid: int) -> int:
    """Wait; the exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def lines(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


@contextlib.contextmanager
def scratch():
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-trial-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unbroken(**settings: Any) -> str:
    with scratch() as folder:
        assert finish(spawn(lambda: train(folder, **settings))) == 0
        return fingerprint(folder)


def comes_back(folder: Path, wanted: str, **settings: Any) -> str:
    """Resume until the end; "" when all is equal to the unbroken run, else what is wrong."""
    code = finish(spawn(lambda: train(folder, **settings)))
    if code != 0:
        return f"resume ended with {code}"
    try:
        return "" if fingerprint(folder) == wanted else "differs from the unbroken run"
    except RunError as error:
        return str(error)


def kills(trials: int, seed: int = 0) -> dict[str, Any]:
    """R1: SIGKILL 0-12 ms after a random line of the metrics file appeared; then resume."""
    wanted, draw = unbroken(), random.Random(seed)
    bad, lost, done = [], 0, 0
    while done < trials:
        with scratch() as folder:
            pid = spawn(lambda folder=folder: train(folder))
            target = draw.randrange(0, 24)
            while lines(folder) < target and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.012))
            os.kill(pid, signal.SIGKILL)
            if finish(pid) != -signal.SIGKILL:
                continue  # it had ended already: this proves nothing
            done += 1
            before = lines(folder)
            steps = checkpoint.saved_steps(folder / "checkpoints")
            lost = max(lost, before - max(steps, default=0))
            if problem := comes_back(folder, wanted):
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
    settings = {"num_steps": 6, "save_every": 2, "keep": 1, "pause": 0.0}
    wanted = unbroken(**settings)
    bad, at, ended = [], 1, False

    def job(folder: Path, at: int) -> None:
        _plant(bug)
        _arm(at, half=at % 2 == 0)
        train(folder, **settings)

    while not ended:
        with scratch() as folder:
            code = finish(spawn(lambda folder=folder, at=at: job(folder, at)))
            ended = code == 0
            if not ended:
                assert code == -signal.SIGKILL, code
                if problem := comes_back(folder, wanted, **settings):
                    bad.append(f"call {at}: {problem}")
        at += stride
    return {"points": (at - 1) // stride - 1, "bad": bad}


def _trace(job: Callable[[], None], options: list[str]) -> int:
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


def strace(stride: int = 1) -> dict[str, Any]:
    """R2 by the kernel: strace injects SIGKILL at the i-th system call of every kind that changes the disk."""
    settings = {"num_steps": 4, "save_every": 2, "keep": 1, "pause": 0.0}
    wanted, names = (
        unbroken(**settings),
        "mkdir,openat,write,fsync,rename,unlink,unlinkat,rmdir,ftruncate,close",
    )
    bad, points, killed = [], {}, 0
    with scratch() as folder:
        log = folder / "log"
        _trace(lambda: train(folder / "run", **settings), ["-o", str(log), "-e", f"trace={names}"])
        text = log.read_text()
    for name in names.split(","):
        points[name] = len(re.findall(rf"^\d+ +{name}\(", text, re.M))
        for at in range(1, points[name] + 1, stride):
            with scratch() as folder:
                rule = [
                    "-o",
                    os.devnull,
                    "-e",
                    f"trace={name}",
                    "-e",
                    f"inject={name}:signal=SIGKILL:when={at}",
                ]
                code = _trace(lambda folder=folder: train(folder, **settings), rule)
                killed += code == -signal.SIGKILL
                if problem := comes_back(folder, wanted, **settings):
                    bad.append(f"{name} {at}: {problem}")
    return {"points": points, "total": sum(points.values()), "killed": killed, "bad": bad}


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
    return {bug: len(_in_fork(lambda bug=bug: _with_bug(bug, stride))["bad"]) for bug in only or BUGS}


def _with_bug(bug: str, stride: int) -> dict[str, Any]:
    if bug == "in_place":
        return calls(1, bug)
    _plant(bug)
    return calls(stride)


def _in_fork(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with scratch() as folder:
        answer = folder / "answer"
        assert finish(spawn(lambda: answer.write_text(json.dumps(job())) and None)) == 0
        return json.loads(answer.read_text())


def signals(trials: int, seed: int = 1) -> dict[str, Any]:
    """R8: a stop signal at a random moment: exit code, no step lost, equal after the resume."""
    wanted, draw, bad, slowest = unbroken(), random.Random(seed), [], 0.0
    kinds = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 143}
    done = 0
    while done < trials:
        number = list(kinds)[done % 4]
        with scratch() as folder:
            pid = spawn(lambda folder=folder: train(folder))
            target = draw.randrange(1, 22)
            while lines(folder) < target:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.006))
            sent = time.perf_counter()
            os.kill(pid, number)
            code = finish(pid)
            if code == 0:
                continue  # it came in the last step
            done += 1
            slowest = max(slowest, time.perf_counter() - sent)
            last = max(checkpoint.saved_steps(folder / "checkpoints"), default=-1)
            problem = "" if code == kinds[number] else f"exit code {code}"
            problem = problem or ("" if last == lines(folder) else f"{lines(folder)} steps done, {last} saved")
            if problem := problem or comes_back(folder, wanted):
                bad.append(f"{number.name} at {target}: {problem}")
    return {"trials": done, "bad": bad, "slowest_seconds": round(slowest, 3)}


def order(saves: int, bug: str = "") -> dict[str, Any]:
    """R4: in a trace, every file is flushed after its last write and before the rename; then the parent folder."""
    with scratch() as folder:
        log = folder / "log"

        def job() -> None:
            _plant(bug)
            for step in range(1, saves + 1):
                checkpoint.save_checkpoint(folder / "run", step, {"x": torch.full((100,), step)}, {"step": step})

        _trace(job, ["-y", "-s", "0", "-o", str(log), "-e", "trace=write,fsync,rename"])
        return _unflushed(log.read_text(), str(folder / "run"))


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


def disk(sizes: int) -> dict[str, Any]:
    """R5: the run on `sizes` file systems that are too small; then they grow and it resumes. Needs `unshare -rm`."""
    wanted, bad, stopped, messages = unbroken(pause=0.0), [], 0, set()
    with scratch() as folder:
        for index in range(sizes):
            kilobytes = 16 + 4 * index
            mount = folder / f"disk{index}"
            mount.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", mount], check=True)
            error = folder / f"error{index}"

            def job(mount: Path = mount, error: Path = error) -> None:
                os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
                train(mount / "run", pause=0.0)

            code = finish(spawn(job))
            said = error.read_text()
            stopped += code != 0
            root = mount / "run" / "checkpoints"
            broken = [s for s in checkpoint.saved_steps(root) if checkpoint.verify_checkpoint(root / f"step_{s:06d}")]
            if broken:
                bad.append(f"{kilobytes} kB: broken checkpoints {broken}")
            if code not in (0, 74) or (code == 74 and "disk full" not in said):
                bad.append(f"{kilobytes} kB: exit code {code}: {said[-300:]}")
            messages |= {re.sub(r"\d+", "N", said.strip())[-160:]} if code else set()
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            if problem := comes_back(mount / "run", wanted, pause=0.0):
                bad.append(f"{kilobytes} kB: {problem}")
            subprocess.run(["umount", mount], check=True)
    return {"sizes": sizes, "stopped": stopped, "bad": bad, "kinds_of_message": len(messages)}


def main() -> None:
    torch.set_num_threads(1)
    verb, *numbers = sys.argv[1:]
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        function.__name__: function for function in (kills, calls, strace, planted, signals, order, disk)
    }
    arguments: list[Any] = [int(text) if text.isdigit() else text for text in numbers]
    # Torch imports much on the first optimizer step: here once, not in every fork.
    with scratch() as folder, contextlib.redirect_stdout(sys.stderr):
        train(folder, num_steps=2, pause=0.0)
    started = time.perf_counter()
    result = verbs[verb](*arguments)
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
