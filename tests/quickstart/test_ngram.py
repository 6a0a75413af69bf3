"""The counting model that the embedded base is compared with is a proper one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def ngram() -> ModuleType:
    path = Path(__file__).parents[2] / "evidence/ngram.py"
    spec = importlib.util.spec_from_file_location("evidence_ngram", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence_ngram"] = module
    spec.loader.exec_module(module)
    return module


def test_its_probabilities_sum_to_one_in_every_context(ngram: ModuleType) -> None:
    draws = np.random.default_rng(0)
    model = ngram.train_ngram([draws.integers(0, 4, 40) for _ in range(5)], 6, order=3)
    text = draws.integers(0, 6, 5)
    for length in range(5):
        total = sum(2 ** -model.bits(np.append(text[:length], symbol))[-1] for symbol in range(6))
        assert total == pytest.approx(1)


def test_witten_bell_by_hand(ngram: ModuleType) -> None:
    """`aab`: p(a) = (2 + 2/3) / 5; after `a` came a and b once each, so p(b | a) = (1 + 2 p(b)) / 4."""
    model = ngram.train_ngram([np.array([0, 0, 1])], 3, order=2)
    p_a, p_b = (2 + 2 / 3) / 5, (1 + 2 / 3) / 5
    assert 2 ** -model.bits(np.array([0, 1])) == pytest.approx([p_a, (1 + 2 * p_b) / 4])
