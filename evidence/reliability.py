"""Gates 1-6 of reliability: real processes really killed, disks really full, files really damaged.

The trials are those of tests/reliability, with the full counts. Each batch is kept in its own JSON file, so that an
interrupted part goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, place, table, write

STAGES = ("pretrain", "mlm", "sft", "classify")
TRIALS = ROOT / "tests" / "reliability" / "trials.py"
MOUNTED = ("unshare", "-rm")


def main() -> None:
    where, _ = place("reliability")
    where.runs.mkdir(parents=True, exist_ok=True)

    def trials(name: str, *arguments: object, subject: str = "loop", within: tuple[str, ...] = ()) -> dict[str, Any]:
        return _once(where.runs / f"{name}.json", arguments, subject, within)

    kills = {
        stage: trials(f"kills-{stage}", "kills", count, subject=stage)
        for stage, count in zip(STAGES, (13, 13, 12, 12), strict=True)
    }
    rows = [_kills(kills)]
    rows += [
        _row("R1, the loop alone, 50 kills", trials("kills-loop", "kills", 50), "trials"),
        _row("R2, every call that changes the disk, in process", trials("calls", "calls", 1), "points"),
        _row("R2, every system call that changes the run, by strace", trials("strace-loop", "strace", 1), "killed"),
        _row(
            "R2, a whole classify run, every fifth call",
            trials("strace-stage", "strace", 5, subject="classify"),
            "killed",
        ),
        _row(
            "R2, exports (adapter and merged), every third call",
            trials("exports", "exports", 3, subject="sft"),
            "killed",
        ),
        _row("R4, order of flushes over 20 saves", trials("order", "order", 20), "published"),
        _row("R5, 50 disks too small, the loop", trials("disk-loop", "disk", 50, within=MOUNTED), "sizes"),
        _row(
            "R5, 50 disks too small, sft",
            trials("disk-sft", "disk", 50, 40, 12, subject="sft", within=MOUNTED),
            "sizes",
        ),
        _row("R8, SIGINT, SIGTERM, SIGHUP, SIGUSR1", trials("signals", "signals", 50), "trials"),
        _row("R9, two starts on one folder", trials("starts", "starts", 50, subject="pretrain"), "pairs"),
        *(_row(f"R10, named moments, {s}", trials(f"moments-{s}", "moments", subject=s), "trials") for s in STAGES),
    ]
    planted = trials("planted", "planted", 5)
    unordered = trials("order-planted", "order", 5, "no_folder_fsync")
    tests = _tests(where.runs / "tests.json")
    write(
        "reliability", "Reliability: what was broken, and what did not come back",
        "A trial is bad when a resume fails, or when weights, optimizer, metrics, evaluations, final weights or result "
        "differ in one bit from the run that nothing happened to. Dropout is on; all on tiny models.",
        table(("what", "trials", "bad", "seconds"), rows),
        "## Planted bugs\n\n" + _planted(planted, unordered), "## In the suite\n\n" + tests,
    )  # fmt: skip


def _once(file: Path, arguments: tuple[object, ...], subject: str, within: tuple[str, ...]) -> dict[str, Any]:
    """The answer of one batch of trials, from its file when it was made before; why not, when it cannot be made."""
    if not file.is_file():
        command = [*within, sys.executable, str(TRIALS), "--subject", subject, *map(str, arguments)]
        print(" ".join(command[len(within) + 1 :]), file=sys.stderr, flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed; are unshare and strace here?\n{done.stderr[-2000:]}")
        file.write_text(done.stdout.splitlines()[-1])
    return json.loads(file.read_text())


def _row(what: str, answer: dict[str, Any], count: str) -> tuple[Any, ...]:
    return (what, answer[count], len(answer["bad"]), f"{answer['seconds']:.0f}")


def _kills(answers: dict[str, dict[str, Any]]) -> tuple[Any, ...]:
    done = sum(answer["trials"] for answer in answers.values())
    bad = sum(len(answer["bad"]) for answer in answers.values())
    seconds = sum(answer["seconds"] for answer in answers.values())
    lost = max(answer["most_steps_lost"] for answer in answers.values())
    return (f"R1, kills over {', '.join(answers)}; at most {lost} steps lost", done, bad, f"{seconds:.0f}")


def _planted(found: dict[str, Any], unordered: dict[str, Any]) -> str:
    rows = [(name.replace("_", " "), count) for name, count in found.items() if name != "seconds"]
    rows.append(("no folder fsync", len(unordered["bad"])))
    return "Each is put into the program on purpose; 0 would mean that these trials cannot see it.\n\n" + table(
        ("bug", "times caught"), rows
    )


def _tests(file: Path) -> str:
    """The tests of damage, NaN and folders, run here."""
    if not file.is_file():
        names = [
            "tests/unit/test_checkpoint.py",
            "tests/reliability/test_nonfinite.py",
            "tests/reliability/test_folders.py",
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *names]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        file.write_text(json.dumps({"last": done.stdout.strip().splitlines()[-1], "code": done.returncode}))
    found = json.loads(file.read_text())
    return (
        "1,000 corruptions of a checkpoint (tests/unit/test_checkpoint.py), NaN and infinity in 42 combinations of "
        "place, value and moment (test_nonfinite.py), folders that cannot be used (test_folders.py): "
        f"`{found['last']}`"
    )


if __name__ == "__main__":
    main()
