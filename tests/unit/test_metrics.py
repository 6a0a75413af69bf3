"""Sums are divided once; a log is cut to the byte."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tunesmith.engine.metrics import Accumulator, MetricsLog
from tunesmith.errors import RunError


def test_a_mean_is_sum_over_count_not_a_mean_of_means():
    metrics = Accumulator()
    metrics.add({"loss": (6.0, 3), "right": (torch.tensor(1), 2.0)})
    metrics.add({"loss": (torch.tensor(2.0), torch.tensor(1))})
    assert metrics.means() == {"loss": 2.0, "right": 0.5}
    assert metrics.means()["loss"] != (6 / 3 + 2 / 1) / 3  # control: another way of adding gives another number
    metrics.add({"none": (0.0, 0)})
    assert "none" not in metrics.means() and metrics.totals()["none"] == (0.0, 0.0)
    metrics.clear()
    assert metrics.means() == {}


def test_tensor_sums_are_kept_in_float64():
    metrics = Accumulator()
    for _ in range(1000):
        metrics.add({"x": (torch.tensor(0.1, dtype=torch.float64) + 1e8, 1)})
    assert metrics.totals()["x"][0] == pytest.approx(1000 * (0.1 + 1e8), rel=1e-12)


def test_a_log_is_json_lines_and_is_cut_to_the_byte(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": 0.1 + 0.2})
        log.sync()
        size = log.size()
        log.append({"step": 2, "loss": math.nan, "grad_norm": math.inf, "x": torch.tensor(2.0)})
        assert json.loads(path.read_text().splitlines()[1]) == {
            "step": 2, "loss": "NaN", "grad_norm": "Infinity", "x": 2.0,
        }  # fmt: skip
        log.cut(size)
        log.append({"step": 2, "loss": 1.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1.0}]
    log.close()


def test_another_runs_log_is_refused(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1})
        with pytest.raises(RunError, match="was saved at 999"):
            log.cut(999)
        with pytest.raises(RunError, match="does not end a line"):
            log.cut(3)
        assert log.size() == len('{"step": 1}\n')
