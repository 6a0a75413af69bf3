"""How well a classifier labels held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunesmith.errors import DataError
from tunesmith.evaluate.intervals import Array, Estimate, Statistic, bootstrap, mean_statistic, wilson
from tunesmith.evaluate.likelihood import Collate, Samples, token_batches
from tunesmith.evaluate.tasks import CLASS_METRICS
from tunesmith.model.packing import evaluating

DEFAULT_METRICS = ("accuracy", "f1", "mcc")


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`scores [n, C]`, `labels` and `predictions` `[n]` (classes) or, multi-label, `[n, C]` of 0 and 1."""

    scores: Array
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    origins: tuple[str, ...] = ()

    @property
    def multi_label(self) -> bool:
        """True when a row may have several labels."""
        return self.labels.ndim == 2

    def losses(self) -> Array:
        """Nats per row `[n]`: -log softmax at the label; multi-label, binary cross-entropy averaged over classes."""
        if self.multi_label:
            costs = np.logaddexp(0, self.scores) - self.labels * self.scores
            return costs.mean(1)
        top = self.scores.max(1, keepdims=True)
        log_total = np.log(np.exp(self.scores - top).sum(1)) + top[:, 0]
        return log_total - self.scores[np.arange(len(self.labels)), self.labels]

    def statistics(self, names: Sequence[str] = DEFAULT_METRICS) -> dict[str, Statistic]:
        """`loss` and the metrics named; `mcc` has no multi-label form and is left out there."""
        found = {"loss": mean_statistic("loss", self.losses())}
        for name in names:
            if name in CLASS_METRICS and not (name == "mcc" and self.multi_label):
                found[name] = CLASS_METRICS[name](self.labels, self.predictions)
        return found

    def metrics(self, names: Sequence[str] = DEFAULT_METRICS, *, seed: int = 0) -> dict[str, Estimate]:
        """Every metric with its 95 % interval: Wilson's for accuracy, bootstrap over rows for the rest."""
        found = {name: bootstrap(statistic, seed=seed) for name, statistic in self.statistics(names).items()}
        if "accuracy" in found:
            right = self.labels == self.predictions
            found["accuracy"] = wilson(int((right.all(1) if self.multi_label else right).sum()), len(right))
        return found

    def per_class(self, names: Sequence[str]) -> dict[str, Estimate]:
        """Share found of the rows that have each label (recall), so that a tuned model's bias shows."""
        found = {}
        for c, name in enumerate(names):
            has = self.labels[:, c] == 1 if self.multi_label else self.labels == c
            hit = self.predictions[has][:, c] == 1 if self.multi_label else self.predictions[has] == c
            if has.any():
                found[name] = wilson(int(hit.sum()), int(has.sum()))
        return found


def evaluate_scores(
    model: nn.Module,
    store: Samples,
    *,
    collate: Collate,
    max_tokens: int = 8192,
    device: torch.device | str = "cpu",
) -> ScoreResult:
    """Scores of every sample of `store` under `model` (`ScoreModel`), gradients and dropout off.

    The prediction is the largest score; multi-label, every class whose score is above 0. `DataError` when a row has
    no label.
    """
    scores: dict[int, Any] = {}
    labels: dict[int, Any] = {}
    origins = [""] * len(store)
    with evaluating(model):
        for indices in token_batches(store.lengths, max_tokens):
            batch = collate([store[i] for i in indices])
            if batch.labels is None:
                raise DataError(f"{_places(batch.origins)}: no label; evaluation of a classifier needs one in each row")
            rows = model(batch.to(device)).scores.double().cpu().numpy()
            for i, row, label, origin in zip(
                indices, rows, batch.labels.numpy(), batch.origins or [""] * len(indices), strict=True
            ):
                scores[i], labels[i], origins[i] = row, label, origin
    return _result(scores, labels, tuple(origins))


def _result(scores: Mapping[int, Any], labels: Mapping[int, Any], origins: tuple[str, ...]) -> ScoreResult:
    order = range(len(scores))
    table = np.stack([scores[i] for i in order]) if scores else np.zeros((0, 1))
    truth = np.asarray([np.rint(labels[i]) for i in order], dtype=np.int64)
    guess = (table > 0).astype(np.int64) if truth.ndim == 2 else table.argmax(1)
    return ScoreResult(table, truth, guess, origins)


def _places(origins: Sequence[str]) -> str:
    return ", ".join(origins[:5]) or "rows without origin"
