"""Which device a run takes by itself, and what is said of one that is not here."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import pytest
import torch

from tunesmith.errors import ModelError, OutOfMemoryError
from tunesmith.plan.hardware import available_memory, choose_device, memory_explained, peak_memory_bytes


@pytest.mark.parametrize(
    ("cuda", "mps", "found"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_cuda_comes_first_then_mps_then_the_processor(cuda: bool, mps: bool, found: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == found and choose_device("cpu") == "cpu"


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for wanted in ("cuda:1", "mps", "tpu"):
        with pytest.raises(ValueError, match=f"device {wanted} is not here; this machine has cpu"):
            choose_device(wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_a_program_s_peak_is_its_own_and_not_that_of_the_one_that_started_it():
    held = bytearray(200 << 20)  # this process is large, and has been so before the other one starts
    held[::4096] = b"x" * len(held[::4096])
    said = "from tunesmith.plan.hardware import peak_memory_bytes; print(peak_memory_bytes())"
    found = int(subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout)
    assert 4 << 20 < found < 150 << 20 < peak_memory_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are kept by Linux alone")
@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_set_on_the_process_is_what_there_is(kind):
    said = (
        f"import resource; resource.setrlimit({kind}, (512 << 20, 512 << 20));"
        "from tunesmith.plan.hardware import available_memory; print(available_memory())"
    )
    found = int(subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout)
    assert found == 512 << 20 < available_memory()


def _raised_from(cause):
    error = ModelError("base: cannot load the weights")
    error.__cause__ = cause
    return error


LACKS = (
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes."),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    _raised_from(RuntimeError("can't start new thread")),
)


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
def test_memory_that_cannot_be_had_is_one_error_with_advice(error):
    with (
        pytest.raises(OutOfMemoryError, match=r"out of memory.*MiB.*; take less") as caught,
        memory_explained("take less"),
    ):
        raise error
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ModelError("no such base"), ValueError("memory")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, memory_explained("take less"):
        raise error
    assert caught.value is error
