"""The batches of any step as a function of (seed, step): every row once an epoch, whatever the sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.batch import Sample
from tunesmith.data.source import OfflineSource


@dataclass
class Rows:
    lengths: np.ndarray

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        length = int(self.lengths[index])
        return Sample(
            np.full(length, index, np.int32), np.array([0.0] + [1.0] * (length - 1), np.float32), origin=str(index)
        )


def _source(lengths, **options):
    return OfflineSource(Rows(np.asarray(lengths)), **({"seed": 3, "num_epochs": 2.0} | options))


def _origins(source, step):
    return [origin for batch in source.step_batches(step) for origin in batch.origins]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 200), st.booleans(), st.integers(0, 5))
def test_every_row_comes_once_an_epoch_and_no_step_is_empty(lengths, size, by_tokens, seed):
    sized = {"batch_tokens": size} if by_tokens else {"batch_examples": size}
    source = _source(lengths, seed=seed, num_epochs=3, micro_batch_tokens=50, **sized)
    assert source.num_steps == 3 * source.steps_per_epoch
    for epoch in range(3):
        steps = [source.rows_at(epoch * source.steps_per_epoch + 1 + i) for i in range(source.steps_per_epoch)]
        assert all(steps) and sorted(row for rows in steps for row in rows) == list(range(len(lengths)))
    for batch in source.step_batches(source.num_steps):
        assert batch.num_tokens <= 50 or batch.num_segments == 1


def test_steps_by_tokens_are_about_as_large_as_asked():
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    source = _source(lengths, batch_tokens=1000)
    sizes = [sum(int(lengths[row]) for row in source.rows_at(step)) for step in range(1, source.num_steps + 1)]
    assert 900 < np.mean(sizes) < 1100 and max(sizes) < 1000 + 2 * 60


def test_a_step_needs_nothing_that_came_before():
    lengths = list(range(1, 30))
    one, other = (_source(lengths, batch_examples=4) for _ in range(2))
    for step in range(1, 12):
        one.step_batches(step)
    other.restore(one.state())
    assert _origins(one, 12) == _origins(other, 12)
    assert _origins(_source(lengths, batch_examples=4, seed=4), 12) != _origins(one, 12)
    assert [one.at_boundary(step) for step in (7, 8, 9, 16)] == [False, True, False, True]


def test_other_data_or_another_seed_is_no_continuation():
    source = _source([3] * 8, batch_examples=4)
    for state in ({"seed": 4, "rows": 8}, {"seed": 3, "rows": 9}):
        with pytest.raises(AssertionError):
            source.restore(state)


def test_a_part_of_an_epoch_and_a_number_of_steps():
    assert _source([3] * 10, batch_examples=4, num_epochs=0.5).num_steps == 2
    assert _source([3] * 10, batch_examples=4, num_epochs=None, num_steps=7).num_steps == 7


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.integers(1, 5), st.booleans())
def test_groups_stay_together(sizes, size, by_tokens):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    sized = {"batch_tokens": 10 * size} if by_tokens else {"batch_examples": size}
    source = _source([5] * len(groups), groups=groups, micro_batch_tokens=20, **sized)
    seen = []
    for step in range(1, source.steps_per_epoch + 1):
        for batch in source.step_batches(step):
            held = [int(groups[int(origin)]) for origin in batch.origins]
            assert all(held.count(group) == sizes[group] for group in held)
            seen += set(held)
    assert sorted(seen) == list(range(len(sizes)))
