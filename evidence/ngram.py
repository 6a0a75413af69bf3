"""A 5-gram model with Witten-Bell interpolation over any small alphabet: what counting alone can do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Order:
    """Counts of one order: every context that was seen with how often and with how many symbols, every continuation."""

    contexts: Ints
    totals: Ints
    types: Ints
    grams: Ints
    counts: Ints


@dataclass(frozen=True, slots=True)
class NGram:
    """`orders[k]` has contexts of k symbols. p_k = (count + types * p_{k-1}) / (total + types), p_{-1} = 1 / size
    (Witten and Bell 1991, method C, interpolated)."""

    size: int
    orders: tuple[_Order, ...]

    def bits(self, symbols: Ints) -> Floats:
        """-log2 p of every symbol of a text `[n]`, each given those before it in the same text."""
        p = np.full(len(symbols), 1 / self.size)
        for length, order in enumerate(self.orders):
            context, valid = _contexts(symbols, length, self.size)
            at, seen = _find(order.contexts, context)
            seen &= valid
            hit, known = _find(order.grams, context * self.size + symbols)
            count = np.where(known & seen, order.counts[hit], 0)
            total, types = np.where(seen, order.totals[at], 0), np.where(seen, order.types[at], 1)
            p = (count + types * p) / (total + types)
        return -np.log2(p)


def train_ngram(texts: list[Ints], size: int, order: int = 5) -> NGram:
    """Counts over `texts`, each of symbols below `size`; contexts never reach over the start of a text.

    `size ** order` must fit 63 bits.
    """
    assert order * np.log2(size) < 63, "a gram is one integer"
    return NGram(size, tuple(_count(texts, size, length) for length in range(order)))


def _count(texts: list[Ints], size: int, length: int) -> _Order:
    parts = []
    for text in texts:
        context, valid = _contexts(text, length, size)
        parts.append((context * size + text)[valid])
    grams, counts = np.unique(np.concatenate(parts), return_counts=True)
    contexts, first = np.unique(grams // size, return_index=True)
    totals = np.add.reduceat(counts, first)
    types = np.diff(np.append(first, len(grams)))
    return _Order(contexts, totals, types, grams, counts)


def _contexts(symbols: Ints, length: int, size: int) -> tuple[Ints, NDArray[np.bool_]]:
    """The `length` symbols before each as one number, and where there are that many."""
    context = np.zeros(len(symbols), np.int64)
    for back in range(length, 0, -1):
        shifted = np.concatenate([np.zeros(min(back, len(symbols)), np.int64), symbols[:-back]])
        context = context * size + shifted
    return context, np.arange(len(symbols)) >= length


def _find(table: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """(where each stands or would stand, whether it is there)."""
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted
