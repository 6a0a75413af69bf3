"""How often a model prefers what people preferred, how sure it is, and whether it is right to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunesmith.batch import Batch, Outputs, Sample
from tunesmith.data.batches import pack
from tunesmith.evaluate.intervals import Array, Estimate, Statistic, bootstrap, mean_statistic, wilson
from tunesmith.evaluate.likelihood import Collate
from tunesmith.model.packing import evaluating
from tunesmith.objectives.pairs import Compared

NUM_BINS = 10


class Answers(Protocol):
    """Samples whose neighbours of equal `groups` answer the same prompt."""

    @property
    def lengths(self) -> Any: ...

    @property
    def groups(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Comparing(Protocol):
    """An objective that says what it makes of every answer and of every pair."""

    def compare(self, outputs: Outputs, batch: Batch) -> Compared: ...


@dataclass(frozen=True, slots=True)
class PreferenceResult:
    """Scores of all answers `[n]` with their ranks and origins, and of each of the M prompts' pairs: `gaps [P]`
    (better minus worse), `costs [P]` in nats, `owner [P]` (which prompt) and `share [P]` (1 / pairs of that prompt).
    """

    scores: Array
    ranks: NDArray[np.int64]
    origins: tuple[str, ...]
    gaps: Array
    costs: Array
    owner: NDArray[np.int64]
    share: Array

    def per_prompt(self, values: Array) -> Array:
        """The mean over each prompt's pairs `[M]`, for prompts that have one."""
        found = np.asarray(np.bincount(self.owner, self.share * values), np.float64)
        return found[np.bincount(self.owner) > 0]

    def right(self) -> Array:
        """Share of each prompt's pairs in the right order `[M]`; a tie is half right."""
        return self.per_prompt((self.gaps > 0) + 0.5 * (self.gaps == 0))

    def statistics(self) -> dict[str, Statistic]:
        """`loss`, `accuracy` and `margin`, one row a prompt."""
        columns = {"loss": self.per_prompt(self.costs), "accuracy": self.right(), "margin": self.per_prompt(self.gaps)}
        return {name: mean_statistic(name, values) for name, values in columns.items()}

    def metrics(self, *, seed: int = 0) -> dict[str, Estimate]:
        """Every metric with its 95 % interval over prompts: Wilson's for an accuracy of plain pairs, else bootstrap."""
        found = {name: bootstrap(statistic, seed=seed) for name, statistic in self.statistics().items()}
        right = self.right()
        if len(right) and set(right.tolist()) <= {0.0, 1.0}:
            found["accuracy"] = wilson(int(right.sum()), len(right))
        return found

    def reliability(self, num_bins: int = NUM_BINS) -> dict[str, Any]:
        """Is a preference of p right in a share p of cases? `{bins, error}` over pairs, p = sigmoid(|gap|).

        Bins hold equally many pairs; `error` is the mean distance between p and the share, weighted by pairs
        (expected calibration error, 1706.04599, eq. 3). A pair of gap 0 is half right.
        """
        sure = 1 / (1 + np.exp(-np.abs(self.gaps)))
        right = (self.gaps > 0) + 0.5 * (self.gaps == 0)
        order = np.argsort(sure, kind="stable")
        bins = [_bin(sure[part], right[part]) for part in np.array_split(order, min(num_bins, len(order))) if len(part)]
        total = sum(entry["n"] for entry in bins)
        error = sum(entry["n"] * abs(entry["predicted"] - entry["observed"]) for entry in bins) / max(total, 1)
        return {"bins": bins, "error": error}

    def rows(self) -> list[dict[str, Any]]:
        """Per answer: where it stands, its rank and its score."""
        return [
            {"origin": origin, "rank": int(rank), "score": round(float(score), 6)}
            for origin, rank, score in zip(self.origins, self.ranks, self.scores, strict=True)
        ]


def _bin(sure: Array, right: Array) -> dict[str, Any]:
    share = wilson(round(float(right.sum())), len(right))
    return {
        "n": len(right), "predicted": float(sure.mean()), "observed": float(right.mean()), "low": share.low,
        "high": share.high,
    }  # fmt: skip


def evaluate_preferences(
    model: nn.Module,
    objective: Comparing,
    store: Answers,
    *,
    collate: Collate,
    max_tokens: int = 8192,
    device: torch.device | str = "cpu",
) -> PreferenceResult:
    """Every answer of `store` under `model`, gradients and dropout off; prompts stay whole."""
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(store.groups)) + 1, [len(store)]])
    sizes = np.add.reduceat(np.asarray(store.lengths), bounds[:-1])
    scores, ranks, origins = np.zeros(len(store)), np.zeros(len(store), np.int64), [""] * len(store)
    found: dict[str, list[Any]] = {"gaps": [], "costs": [], "owner": [], "share": []}
    with evaluating(model):
        for prompts in pack(sizes.tolist(), range(len(sizes)), max_tokens):
            indices = [i for prompt in prompts for i in range(int(bounds[prompt]), int(bounds[prompt + 1]))]
            owners = np.repeat(prompts, np.diff(bounds)[prompts])
            batch = collate([store[i] for i in indices]).to(device)
            made = objective.compare(model(batch), batch)
            assert batch.labels is not None
            labels = batch.labels.cpu().numpy()
            scores[indices], ranks[indices] = _numbers(made.scores), labels[:, 0] if labels.ndim == 2 else labels
            for i, origin in zip(indices, batch.origins, strict=True):
                origins[i] = origin
            found["owner"].append(owners[made.pairs.better.cpu().numpy()])
            for name, values in (("gaps", made.gaps), ("costs", made.costs), ("share", made.pairs.share)):
                found[name].append(_numbers(values))
    return _result(scores, ranks, tuple(origins), found)


def _numbers(values: torch.Tensor) -> Array:
    return values.double().cpu().numpy()


def _result(
    scores: Array, ranks: NDArray[np.int64], origins: tuple[str, ...], found: Mapping[str, Sequence[Any]]
) -> PreferenceResult:
    """Pairs in the order of their prompts, whatever batches they were computed in."""
    whole = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in found.items()}
    owner = whole["owner"].astype(np.int64)
    order = np.argsort(owner, kind="stable")
    return PreferenceResult(
        scores, ranks, origins, whole["gaps"][order], whole["costs"][order], owner[order], whole["share"][order]
    )
