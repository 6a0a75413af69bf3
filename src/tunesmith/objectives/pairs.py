"""Which answers of a batch are compared: every untied pair within a group, each group counting once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.batch import Batch


@dataclass(frozen=True, slots=True)
class Pairs:
    """`better [P]` and `worse [P]` are segments; `share [P]` is 1 over the untied pairs of their group, `margins [P]`
    how much better the better one is said to be."""

    better: Tensor
    worse: Tensor
    share: Tensor
    margins: Tensor

    @property
    def num_groups(self) -> float:
        """Groups with at least one pair: what a preference loss is averaged over."""
        return float(round(float(self.share.sum())))

    def mean(self, values: Tensor) -> tuple[Tensor, float]:
        """`values [P]` as (sum over groups of their mean, number of groups)."""
        return (values.detach().double() * self.share).sum(), self.num_groups


@dataclass(frozen=True, slots=True)
class Compared:
    """What a preference objective makes of a batch: a score for every answer `[S]`, the loss of every pair `[P]`."""

    scores: Tensor
    costs: Tensor
    pairs: Pairs

    @property
    def gaps(self) -> Tensor:
        """Score of the better answer minus that of the worse `[P]`."""
        return self.scores[self.pairs.better] - self.scores[self.pairs.worse]

    def rows(self, batch: Batch) -> Tensor:
        """For each answer the mean loss of the pairs of its prompt `[S]`, without gradient; NaN where all are tied."""
        assert batch.groups is not None
        _, owner = batch.groups.unique(return_inverse=True)
        costs = torch.full((int(owner.max()) + 1,), torch.nan, dtype=self.costs.dtype, device=self.costs.device)
        costs[owner[self.pairs.better]] = 0.0
        costs.index_add_(0, owner[self.pairs.better], self.costs.detach() * self.pairs.share.to(self.costs.dtype))
        return costs[owner]


def pairs_of(batch: Batch) -> Pairs:
    """All pairs of segments of one group whose ranks (`labels [S]` or the first of `labels [S, 2]`) differ.

    Ranks 1, 2, 3 of one group give three pairs of share 1/3: with K answers the loss is 1 / C(K, 2) times the sum
    over pairs (InstructGPT, 2203.02155, eq. 1). Ties give no pair.
    """
    labels, groups = batch.labels, batch.groups
    assert labels is not None and groups is not None, "preferences need ranks and groups"
    ranks = labels[:, 0] if labels.dim() == 2 else labels
    same = groups[:, None] == groups[None]
    wins = same & (ranks[:, None] < ranks[None])
    better, worse = wins.nonzero(as_tuple=True)
    per_group = same.double() @ wins.sum(1).double()
    margins = labels[better, 1] if labels.dim() == 2 else torch.zeros(len(better), device=groups.device)
    return Pairs(better, worse, 1.0 / per_group[better], margins)


def num_groups(batch: Batch) -> float:
    """Groups of the batch with at least one untied pair, known before the forward."""
    return pairs_of(batch).num_groups


def half_for_ties(gaps: Tensor) -> Tensor:
    """1 where the gap is positive, 1/2 where it is 0, else 0: the chance to be right when ties are guessed."""
    return (gaps > 0).double() + 0.5 * (gaps == 0).double()


def weighted(values: Tensor, share: Tensor) -> Tensor:
    """Sum of `values [P]` times their share, in the values' own precision."""
    return (values * share.to(values.dtype)).sum() if len(values) else torch.zeros((), dtype=values.dtype)
