"""Which device a run takes by itself, and what is said of one that is not here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tunesmith.plan.hardware import choose_device, peak_memory_bytes


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
