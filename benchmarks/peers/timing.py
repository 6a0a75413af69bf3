"""What every peer's script shares: what it is asked, a clock, and its answer of one JSON line."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch


class Times:
    """Seconds and losses of every step, and when the first ended (seconds since 1970; 0: not known)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.first = 0.0


def read_spec() -> dict:
    """What the process is asked to do; the threads are set."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    return spec


def seconds_now() -> float:
    """A clock that waits for the GPU's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def answer(times: Times, tokens: list[int]) -> None:
    """The JSON line."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = {
        "seconds": times.seconds, "tokens": tokens, "losses": times.losses,
        "peak_memory_bytes": on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_step_seconds": times.first - started_at() if times.first else 0.0,
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def started_at() -> float:
    """When this process began, seconds since 1970."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    booted = next(float(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    return booted + ticks / os.sysconf("SC_CLK_TCK")
