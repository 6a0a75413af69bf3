"""What this machine is and can do, measured rather than guessed. torch is imported only inside the functions."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.errors import OutOfMemoryError, lacks_memory

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Matrix products in bfloat16: x86 and, last, ARM. AVX's vector conversions alone bring no speed."""
LIBRARIES = ("tunesmith", "torch", "transformers", "tokenizers", "datasets", "safetensors", "peft", "numpy")


def choose_device(wanted: str = "auto") -> str:
    """`auto` is cuda, then mps, then cpu; anything else is taken at its word. `ValueError` when it is not there."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    kind = wanted.split(":")[0]
    there = {"cpu": True, "cuda": cuda, "mps": mps}
    if kind not in there or not there[kind]:
        have = ", ".join(name for name, ok in there.items() if ok)
        raise ValueError(f"device {wanted} is not here; this machine has {have}")
    return wanted


def choose_precision(wanted: str, device: str) -> str:
    """float32 or bfloat16. `auto` takes bfloat16 where the processor multiplies in it.

    What a CPU says of itself decides, so that a busy machine does not decide otherwise than an idle one; only where it
    says nothing is a matrix product in each type timed.
    """
    if wanted != "auto":
        return wanted
    if device.startswith("cuda"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device != "cpu":
        return "float32"
    flags = cpu_flags()
    fast = bool(flags & BF16_FLAGS) if flags else matmul_rate("bfloat16") > 1.2 * matmul_rate("float32")
    return "bfloat16" if fast else "float32"


def cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """What the first processor says it can do (`flags` on x86, `Features` on ARM); empty where it is not said."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, values = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(values.split())
    except OSError:
        pass
    return frozenset()


def matmul_rate(dtype: str, *, size: int = 256, budget_seconds: float = 0.05) -> float:
    """Floating-point operations a second of a square matrix product on the CPU.

    The fastest of many products: what else runs on the machine must not decide which type is the faster one.
    """
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    (a @ a).sum()
    fastest, products, started = math.inf, 0, time.perf_counter()
    while (before := time.perf_counter()) - started < budget_seconds or products < 20:
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - before)
        products += 1
    return 2.0 * size**3 / fastest


def _own_peak(path: str = "/proc/self/status") -> int | None:
    """This program's own peak on Linux: what `getrusage` says begins with the peak of the one that started it."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most memory this process has held: of the GPU on cuda, else resident memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    if (own := _own_peak()) is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: str = "cpu") -> int:
    """Bytes that a run may still take: of the GPU on cuda, else of memory, or of the limit set on this process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path, marker in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            with open(path, encoding="utf-8") as file:
                line = next((text for text in file if text.startswith(marker)), "")
        except OSError:
            continue
        digits = "".join(c for c in line if c.isdigit())
        if digits:
            found = min(found, int(digits) * (1024 if marker else 1))
    limit = memory_limit()
    return found if limit is None else min(found, limit)


def memory_limit() -> int | None:
    """Bytes that this process may hold by its own limits (`ulimit -v`, `ulimit -d`); None without one."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)


@contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Memory that could not be had inside becomes `OutOfMemoryError`: what was held, the limit, and `advice`."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise OutOfMemoryError(f"{memory_story(error)}; {advice}") from error


def memory_story(error: BaseException) -> str:
    """What is said first when memory ran out: the words of `error`, how much was held at most, under which limit."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).rpartition("DefaultCPUAllocator: ")[2].strip().splitlines()  # torch puts its own place before it
    words = f" ({lines[0].partition('. Error code')[0][:160]})" if lines else ""
    if type(error).__module__.partition(".")[0] == "torch":  # what a GPU's allocator raises; main memory's has no own
        return f"out of memory{words}: at most {peak_memory_bytes('cuda') / 2**20:,.0f} MiB of the GPU were held"
    limit = memory_limit()
    under = "" if limit is None else f" under the limit of {limit / 2**20:,.0f} MiB set on it"
    return f"out of memory{words}: this process held at most {peak_memory_bytes() / 2**20:,.0f} MiB{under}"


def environment(device: str, precision: str, threads: int) -> dict[str, Any]:
    """What the report says about the machine and the libraries: no names, paths or variables."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": device,
        "precision": precision,
        "threads": threads,
        "versions": versions,
    }
