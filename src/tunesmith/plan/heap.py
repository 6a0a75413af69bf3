"""How far glibc's heap grows under a sequence of tensors made and freed: more than the tensors, because of its holes.

The rules are those of malloc.c (glibc 2.36): a block is taken from the smallest hole that holds it; freed neighbours
join; the heap grows at its end and keeps what it has; a block of 32 MiB and more that finds no room is mapped on its
own and given back at once. torch asks for aligned blocks, for which 96 bytes more are looked for than are used. What
is left of them must join its neighbours again, else no hole takes a tensor of the size that left it. The command sees
to that, and to the heap's keeping what it has (`__main__.py`), and so it is counted here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

_ALIGNMENT = 64
"""Of torch's tensors on a CPU, bytes."""
_SMALLEST = 32
_PAGE = 4096
_PAD = 128 << 10
"""Bytes that the heap grows by beside what is asked for."""
MAPPED = 32 << 20
"""A block of so many bytes that finds no room is mapped on its own."""


def heap_peak(events: Iterable[tuple[int, int]]) -> int:
    """The most bytes held for `events`: (number, bytes) where a tensor is made, (number, 0) where it is freed."""
    heap = _Heap()
    for number, size in events:
        if size:
            heap.take(number, size)
        else:
            heap.give(number)
    return heap.peak


class _Heap:
    def __init__(self) -> None:
        self.peak = 0
        self._end = self._top = self._mapped = 0
        self._holes: list[tuple[int, int]] = []
        """(size, start), smallest first."""
        self._starting: dict[int, int] = {}
        self._stopping: dict[int, int] = {}
        self._used: dict[int, tuple[int | None, int]] = {}
        """(start, size) of a tensor's block; start is None where it is mapped on its own."""

    def take(self, number: int, size: int) -> None:
        block = _rounded(size + 8, 16)
        asked = _rounded(block + _ALIGNMENT + _SMALLEST + 8, 16)
        found = self._find(asked)
        if found is None:
            mapped = _rounded(asked + 8, _PAGE)
            self._mapped += mapped
            self._used[number] = (None, mapped)
        else:
            self._used[number] = (self._aligned(*found, block), block)
        self.peak = max(self.peak, self._end + self._mapped)

    def give(self, number: int) -> None:
        start, size = self._used.pop(number)
        if start is None:
            self._mapped -= size
        else:
            self._free(start, size)

    def _find(self, size: int) -> tuple[int, int] | None:
        """(start, size) of a block in a hole or at the heap's end; None where it is to be mapped."""
        at = bisect_left(self._holes, (size, 0))
        if at < len(self._holes):
            hole, start = self._remove(at)
            if hole - size < _SMALLEST:
                return start, hole
            self._add(start + size, hole - size)
            return start, size
        left = self._end - self._top
        if left < size + _SMALLEST:
            if size >= MAPPED:
                return None
            self._end += _rounded(size + _PAD + _SMALLEST - left, _PAGE)
        start, self._top = self._top, self._top + size
        return start, size

    def _aligned(self, start: int, size: int, block: int) -> int:
        """The aligned start inside a block that was found; what is left before and behind is freed."""
        before = -(start + 16) % _ALIGNMENT
        if before:
            before += _ALIGNMENT if before < _SMALLEST else 0
            self._free(start, before)
        if size - before - block:
            self._free(start + before + block, size - before - block)
        return start + before

    def _free(self, start: int, size: int) -> None:
        if start in self._stopping:
            hole, start = self._remove(bisect_left(self._holes, self._hole_before(start)))
            size += hole
        if start + size in self._starting:
            behind = start + size
            size += self._remove(bisect_left(self._holes, (self._starting[behind], behind)))[0]
        if start + size == self._top:
            self._top = start
        else:
            self._add(start, size)

    def _hole_before(self, stop: int) -> tuple[int, int]:
        start = self._stopping[stop]
        return stop - start, start

    def _add(self, start: int, size: int) -> None:
        insort(self._holes, (size, start))
        self._starting[start], self._stopping[start + size] = size, start

    def _remove(self, at: int) -> tuple[int, int]:
        size, start = self._holes.pop(at)
        del self._starting[start], self._stopping[start + size]
        return size, start


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
