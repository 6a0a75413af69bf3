"""The heap's rules, each on the few tensors that show it."""

from __future__ import annotations

import random

from tunesmith.__main__ import STEADY
from tunesmith.plan.heap import MAPPED, heap_peak

PAD = 200_000
"""More than what the heap grows by at one time beside what is asked for."""


def test_a_hole_takes_a_tensor_of_its_own_size_and_no_larger_one():
    many = [(i, 60_000) for i in range(20)]
    freed = [(i, 0) for i in range(0, 20, 2)]
    same = heap_peak([*many, *freed, *((100 + i, 60_000) for i in range(10))])
    larger = heap_peak([*many, *freed, *((100 + i, 61_000) for i in range(10))])
    assert same == heap_peak(many) < larger
    assert abs(larger - 30 * 60_000) < PAD


def test_freed_neighbours_are_one_hole():
    many = [(i, 60_000) for i in range(20)]
    assert heap_peak([*many, *((i, 0) for i in range(19)), (99, 100_000)]) == heap_peak(many)


def test_large_tensors_are_mapped_and_given_back_and_smaller_ones_leave_their_room():
    small = [(1, 20 << 20), (1, 0), (2, 10 << 20), (3, 1000), (2, 0), (4, 33 << 20)]
    assert abs(heap_peak(small) - (20 << 20) - (33 << 20)) < PAD
    large = [(1, 40 << 20), (1, 0), (2, 10 << 20), (3, 1000), (2, 0), (4, 33 << 20)]
    assert abs(heap_peak(large) - (10 << 20) - (33 << 20)) < PAD


def test_the_command_asks_for_the_threshold_that_is_counted():
    assert f"mmap_threshold={MAPPED}:" in STEADY


def test_never_less_than_the_tensors():
    draw, events, alive, now, peak = random.Random(0), [], {}, 0, 0
    for number in range(2000):
        if alive and draw.random() < 0.5:
            gone = draw.choice(sorted(alive))
            now -= alive.pop(gone)
            events.append((gone, 0))
        else:
            alive[number] = draw.choice([100, 5000, 70_000, 900_000, 40 << 20])
            now += alive[number]
            events.append((number, alive[number]))
        peak = max(peak, now)
    assert peak < heap_peak(events) < 2 * peak
