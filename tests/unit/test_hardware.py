"""Which device a run takes by itself, and what is said of one that is not here."""

from __future__ import annotations

import pytest
import torch

from tunesmith.plan.hardware import choose_device


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
