"""Gates 1-6 of reliability: real processes really killed, disks really full, files really damaged.

The trials are those of tests/reliability, with the full counts. The answer of each batch is kept in a JSON file and the
result is written anew after each, so that an interrupted part goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from common import ROOT, place, table, write

STAGES = ("pretrain", "mlm", "sft", "classify")
ONLINE = ("ppo", "grpo")
TRIALS = ROOT / "tests" / "reliability" / "trials.py"
MOUNTED = ("unshare", "-rm")
TESTS = ("tests/unit/test_checkpoint.py", "tests/reliability/test_nonfinite.py", "tests/reliability/test_folders.py")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some trials: what they show, their command line, and which number of the answer counts them."""

    name: str
    what: str
    arguments: tuple[object, ...]
    count: str
    subject: str = "loop"
    within: tuple[str, ...] = ()


BATCHES = (
    *(
        Batch(f"kills-{s}", f"R1, killed at random moments, {s}", ("kills", n), "trials", s)
        for s, n in zip(STAGES, (13, 13, 12, 12), strict=True)
    ),
    *(Batch(f"kills-{s}", f"R1, killed at random moments, {s}", ("kills", 12), "trials", s) for s in ONLINE),
    Batch("kills-loop", "R1, the loop alone", ("kills", 50), "trials"),
    Batch("calls", "R2, killed at every call that changes the disk, in process", ("calls", 1), "points"),
    Batch("order-planted", "R3, planted: no flush of the folder", ("order", 5, "no_folder_fsync"), ""),
    Batch("order", "R4, order of flushes over 20 saves", ("order", 20), "published"),
    Batch("disk-loop", "R5, disks of 50 sizes, the loop", ("disk", 50), "sizes", within=MOUNTED),
    Batch("signals", "R8, SIGINT, SIGTERM, SIGHUP, SIGUSR1", ("signals", 50), "trials"),
    Batch("signals-sft", "R8, the same, whole sft runs", ("signals", 20), "trials", "sft"),
    *(Batch(f"moments-{s}", f"R10, named moments, {s}", ("moments",), "trials", s) for s in STAGES),
    Batch("starts", "R9, two starts on one folder", ("starts", 50), "pairs", "pretrain"),
    Batch("planted", "R3, planted bugs", ("planted", 5), ""),
    Batch("strace-loop", "R2, every system call that changes the run, the loop", ("strace", 1), "killed"),
    Batch("exports", "R2, exports (adapter and merged), every call", ("exports", 1), "killed", "sft"),
    Batch("disk-sft", "R5, disks of 50 sizes, sft", ("disk", 50, 40, 12), "sizes", "sft", MOUNTED),
    Batch("strace-classify", "R2, a whole classify run, every fifth call", ("strace", 5), "killed", "classify"),
)


def main() -> None:
    where, _ = place("reliability")
    where.runs.mkdir(parents=True, exist_ok=True)
    for batch in BATCHES:
        _trials(where.runs / f"{batch.name}.json", batch)
        _write(where.runs)
    _tests(where.runs / "tests.json")
    _write(where.runs)


def _trials(file: Path, batch: Batch) -> None:
    """Make the answer of one batch unless it is there."""
    if file.is_file():
        return
    command = [*batch.within, sys.executable, str(TRIALS), "--subject", batch.subject, *map(str, batch.arguments)]
    print(" ".join(command[len(batch.within) + 1 :]), file=sys.stderr, flush=True)
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])
    changed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **changed})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed; are unshare and strace here?\n{done.stderr[-2000:]}")
    file.write_text(json.dumps({"on": str(date.today()), **json.loads(done.stdout.splitlines()[-1])}))


def _tests(file: Path) -> None:
    """Run the tests of damage, NaN and folders unless that was done."""
    if not file.is_file():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *TESTS]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        file.write_text(json.dumps({"last": done.stdout.strip().splitlines()[-1]}))


def _write(folder: Path) -> None:
    """The result from the answers that are there."""
    answers = {b.name: json.loads((folder / f"{b.name}.json").read_text()) for b in BATCHES if _done(folder, b)}
    missing = [batch.what for batch in BATCHES if batch.name not in answers]
    sections = [
        "A trial is bad when a resume fails, or when weights, optimizer, metrics, evaluations, final weights or result "
        "differ in one bit from the run that nothing happened to. Dropout is on, models are tiny, each stage runs from "
        "recipe to report; the loop alone stands for what is too slow to enumerate with a whole run. Seconds are those "
        "of a machine that others used too.",
        table(("what", "trials", "bad", "seconds", "on"), _rows(answers)),
        _lost(answers), _planted(answers),
        "## In the suite\n\n1,000 corruptions of a checkpoint, NaN and infinity in 42 combinations of place, value and "
        f"moment, folders that cannot be used ({', '.join(TESTS)}): {_last(folder)}.",
        f"Not run yet: {'; '.join(missing)}." if missing else "",
    ]  # fmt: skip
    write("reliability", "Reliability: what was broken, and what did not come back", *filter(None, sections))


def _done(folder: Path, batch: Batch) -> bool:
    return (folder / f"{batch.name}.json").is_file()


def _rows(answers: dict[str, Any]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for batch in BATCHES:
        if batch.count and batch.name in answers:
            answer = answers[batch.name]
            small = f" ({answer['stopped']} of them too small)" if "stopped" in answer else ""
            bad, seconds = len(answer["bad"]), f"{answer['seconds']:.0f}"
            rows.append((batch.what + small, answer[batch.count], bad, seconds, answer["on"]))
    return rows


def _lost(answers: dict[str, Any]) -> str:
    kills = [answer for name, answer in answers.items() if name.startswith("kills-")]
    if not kills:
        return ""
    return f"A kill lost {max(a['most_steps_lost'] for a in kills)} steps at most; a checkpoint is saved every 3."


def _planted(answers: dict[str, Any]) -> str:
    if not {"planted", "order-planted"} <= answers.keys():
        return ""
    rows = [
        (name.replace("_", " "), count) for name, count in answers["planted"].items() if name not in ("seconds", "on")
    ]
    rows.append(("no folder fsync", len(answers["order-planted"]["bad"])))
    note = "Each is put into the program on purpose; 0 would mean that these trials cannot see it."
    return f"## Planted bugs\n\n{note}\n\n{table(('bug', 'times caught'), rows)}"


def _last(folder: Path) -> str:
    file = folder / "tests.json"
    return f"`{json.loads(file.read_text())['last']}`" if file.is_file() else "not run yet"


if __name__ == "__main__":
    main()
