"""Packing and order as pure functions; the one place where targets are shifted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.batch import Sample
from tunesmith.data.batches import collate, collate_mlm, order_at, pack


def _sample(ids, weights=None, **more) -> Sample:
    weights = [0.0] + [1.0] * (len(ids) - 1) if weights is None else weights
    return Sample(np.asarray(ids, np.int32), np.asarray(weights, np.float32), **more)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 64))
def test_packing_keeps_every_sample_once_and_no_part_is_too_long(lengths, limit):
    indices = [7 * i for i in range(len(lengths))]
    parts = pack(lengths, indices, limit)
    assert sorted(i for part in parts for i in part) == indices
    for part in parts:
        size = sum(lengths[i // 7] for i in part)
        assert size <= limit or len(part) == 1


def test_packing_by_hand():
    assert pack([6, 5, 4, 3], [10, 11, 12, 13], 9) == [[10, 13], [11, 12]]
    assert pack([20, 1], [0, 1], 9) == [[0], [1]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 500), st.integers(0, 2**31), st.integers(0, 50))
def test_the_order_is_a_permutation_of_seed_and_epoch_alone(num, seed, epoch):
    order = order_at(num, seed, epoch)
    assert sorted(order.tolist()) == list(range(num)) and (order == order_at(num, seed, epoch)).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(order_at(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_targets_are_the_next_token_inside_each_segment():
    batch = collate([_sample([5, 6, 7], origin="a"), _sample([8, 9], origin="b")])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]] and batch.targets.tolist() == [[6, 7, 7, 9, 9]]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 0]] and batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1]] and batch.lengths == (3, 2) and batch.origins == ("a", "b")
    assert batch.is_flat and batch.labels is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(0, 99))
def test_every_weighted_token_is_a_target_once(rows, seed):
    rng = np.random.default_rng(seed)
    samples = [_sample(row, [0.0, *rng.integers(0, 2, len(row) - 1)]) for row in rows]
    batch = collate(samples)
    wanted = [int(i) for s in samples for i, w in zip(s.ids, s.weights, strict=True) if w]
    found = [int(t) for t, w in zip(batch.targets[0], batch.weights[0], strict=True) if w]
    assert found == wanted
    ends = np.cumsum([len(row) for row in rows]) - 1
    assert not batch.weights[0][ends].any(), "no target beyond a segment's end"


def test_columns_are_shifted_with_the_weights_and_labels_are_stacked():
    columns = {"old": np.array([0.0, 1.0, 2.0], np.float32)}
    batch = collate([_sample([5, 6, 7], columns=columns, label=1), _sample([8, 9, 4], columns=columns, label=0)])
    assert batch.columns["old"].tolist() == [[1, 2, 0, 1, 2, 0]] and batch.labels.tolist() == [1, 0]
    several = collate([_sample([5, 6], label=(1.0, 0.0)), _sample([8, 9], label=(1.0, 1.0))])
    assert several.labels.tolist() == [[1, 0], [1, 1]]
    with pytest.raises(AssertionError):
        collate([_sample([5, 6], label=1), _sample([8, 9])])


def _masked(samples, **options):
    return collate_mlm(samples, mask_id=4, vocab_size=320, special_ids=(0, 1, 2, 4, 5, 6), **options)


def test_masking_follows_the_paper_and_spares_special_tokens():
    rng = np.random.default_rng(0)
    samples = [_sample([5, *rng.integers(10, 320, 98), 6], origin=f"f:{n}") for n in range(200)]
    batch = _masked(samples, seed=1)
    ids = np.concatenate([s.ids for s in samples])
    holes = batch.weights[0].numpy() > 0
    seen = batch.input_ids[0].numpy()
    assert (batch.targets[0].numpy() == ids).all() and (seen[~holes] == ids[~holes]).all()
    assert not np.isin(ids[holes], (5, 6)).any() and abs(holes.mean() / 0.98 - 0.15) < 0.01
    masked, same = (seen[holes] == 4).mean(), (seen[holes] == ids[holes]).mean()
    assert abs(masked - 0.8) < 0.03 and abs(same - 0.1) < 0.03


def test_masks_depend_on_seed_step_and_sample_and_not_on_neighbours():
    rng = np.random.default_rng(0)
    one, two = (_sample(rng.integers(10, 320, 40), origin=o) for o in "ab")
    together, alone = _masked([two, one], seed=1, step=3), _masked([one], seed=1, step=3)
    assert together.input_ids[0][40:].tolist() == alone.input_ids[0].tolist()
    assert _masked([one], seed=1, step=4).input_ids.tolist() != alone.input_ids.tolist()
    assert _masked([one], seed=2, step=3).input_ids.tolist() != alone.input_ids.tolist()
    here, there, next_row = (_masked([_sample(one.ids, origin=o)], seed=1) for o in ("/a/f:1", "/b/f:1", "/a/f:2"))
    assert here.input_ids.tolist() == there.input_ids.tolist() != next_row.input_ids.tolist()
    short = _masked([_sample([5, 77, 6])], seed=1)
    assert short.weights.tolist() == [[0, 1, 0]], "at least one token of a sample is chosen"
