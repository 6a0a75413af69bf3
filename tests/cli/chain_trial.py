"""Kills a real chain twice with SIGKILL, resumes it, and compares it with one left alone. One JSON object on stdout.

    python chain_trial.py FOLDER

Torch is imported once; every attempt is a fork of this process, which has no threads of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chains import chain, make_files

from tunesmith import api

STAGES = ("1-pretrain", "2-sft", "3-classify")


def spawn(job: Callable[[], Any]) -> int:
    """Fork; the child runs `job`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_in(stage: Path, job: Callable[[], Any]) -> int:
    """SIGKILL the job as soon as the stage has made three steps; its exit code."""
    pid, metrics = spawn(job), stage / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return finish(pid)


def contents(run: Path) -> dict[str, str]:
    """Final weights, metric files and what the lineage says each stage gives."""
    lineage = json.loads((run / "lineage.json").read_text())
    found = {stage["name"]: stage["gives"] for stage in lineage["stages"]} | {"problems": str(lineage["problems"])}
    for name in STAGES:
        found[f"{name} weights"] = next((run / name / "final").glob("step_*/tensors.safetensors")).read_bytes().hex()
        found[f"{name} metrics"] = (run / name / "metrics.jsonl").read_text()
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = make_files(Path(sys.argv[1]))
    os.chdir(folder)
    recipe = chain(train={"steps": 12, "save_every": 2, "batch_examples": 8, "learning_rate": 5e-3})
    cut, said = folder / "runs/cut", folder / "said.txt"

    def resume() -> None:
        with said.open("a") as file:
            api.resume("cut", say=lambda text: print(text, file=file, flush=True))

    codes = [kill_in(cut / "1-pretrain", lambda: api.train(recipe, run="cut"))]
    begun = [name for name in STAGES if (cut / name).exists()]
    codes += [kill_in(cut / "2-sft", resume), finish(spawn(resume))]
    codes.append(finish(spawn(lambda: api.train(recipe, run="whole"))))
    ours, theirs = contents(cut), contents(folder / "runs/whole")
    different = sorted(name for name in theirs if ours[name] != theirs[name])
    print(json.dumps({"codes": codes, "begun": begun, "different": different, "said": said.read_text()}))


if __name__ == "__main__":
    main()
