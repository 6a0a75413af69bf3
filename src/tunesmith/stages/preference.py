"""What reward and dpo share: measuring preferences, and the log-probs of a reference, computed once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunesmith.data.batches import collate
from tunesmith.data.columns import WithColumns
from tunesmith.data.store import SampleStore
from tunesmith.errors import DataError
from tunesmith.evaluate.likelihood import token_batches
from tunesmith.evaluate.preference import Answers, Comparing, PreferenceResult, evaluate_preferences
from tunesmith.model import soft_prompt
from tunesmith.model.hashing import backbone_hash
from tunesmith.model.language import LanguageModel
from tunesmith.model.packing import evaluating
from tunesmith.stages.job import Job, Measured

REFERENCE = "reference_logprobs"


def measure_preferences(
    job: Job, model: nn.Module, objective: Comparing, store: Answers, *, full: bool
) -> tuple[Measured, PreferenceResult]:
    """Loss, pair accuracy and margin with intervals over prompts; in full also every answer's score and how far a
    preference of p can be trusted to be right in a share p of cases."""
    if store.groups is None:
        raise DataError(f"stage {job.recipe.stage} compares answers; the data needs pairs (prompt, chosen, rejected) "
                        "or rankings")  # fmt: skip
    result = evaluate_preferences(
        model, objective, store, collate=collate, max_tokens=job.eval_tokens, device=job.device
    )
    rows = tuple(result.rows()) if full else ()
    extra: Mapping[str, Any] = {"reliability": result.reliability()} if full else {}
    metrics = result.metrics(seed=job.recipe.seed)
    return Measured(result.statistics(), metrics, predictions=rows, extra=extra), result


class References:
    """Stores with the log-probs of the model as it is now - before training - beside every token.

    The reference is the start of the run, whatever that is: the adapter that is still the identity, the base without
    its new soft prompt, an adapter that the run goes on from, or the weights that full tuning will change. It is
    computed with the very model that trains, so no second copy of it is ever held, and kept in the cache by content:
    the samples, the weights, how they were computed.
    """

    def __init__(self, model: LanguageModel, job: Job, folder: Path) -> None:
        self._model, self._job, self._folder = model, job, folder
        self._made: dict[str, WithColumns] = {}
        self._start = ""

    def beside(self, store: SampleStore) -> WithColumns:
        """The store with its column `reference_logprobs`; the same object each time."""
        if store.fingerprint not in self._made:
            self._made[store.fingerprint] = WithColumns(store, {REFERENCE: self._column(store)})
        return self._made[store.fingerprint]

    def _column(self, store: SampleStore) -> NDArray[np.float32]:
        path = self._folder / "reference" / f"{self._key(store)}.npy"
        found = _read(path, store.num_tokens)
        if found is None:
            with self._job.at_start():
                found = reference_column(self._model, store, max_tokens=self._job.eval_tokens, device=self._job.device)
            _write(path, found)
        return found

    def _key(self, store: SampleStore) -> str:
        job = self._job
        self._start = self._start or _hash_of(job)
        parts = [
            store.fingerprint, self._start, job.recipe.tune.quantize, job.precision, job.device, job.eval_tokens,
            torch.__version__, torch.get_num_threads(),
        ]  # fmt: skip
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]


def reference_column(model: LanguageModel, store: SampleStore, *, max_tokens: int, device: str) -> NDArray[np.float32]:
    """log p of every token that counts `[tokens of the store]`, nats, 0 elsewhere; dropout and gradients off."""
    column = np.zeros(store.num_tokens, np.float32)
    starts = np.concatenate([[0], np.cumsum(store.lengths)])
    with evaluating(model):
        for indices in token_batches(store.lengths, max_tokens):
            batch = collate([store[i] for i in indices])
            found = model(batch.to(device)).logprobs[0].float().cpu().numpy()
            for i, part in zip(indices, np.split(found, np.cumsum(batch.lengths)[:-1]), strict=True):
                column[int(starts[i]) + 1 : int(starts[i + 1])] = part[:-1]
    return column


def _hash_of(job: Job) -> str:
    """The base's content and, where the start is not the base alone, that of the parameters that will learn."""
    backbone = job.backbone
    parts = sha256(str(backbone_hash(backbone, skip=(soft_prompt.PLACE,))).encode())
    if job.starts_from_base:
        return parts.hexdigest()
    for name, parameter in sorted(backbone.named_parameters()):
        if parameter.requires_grad:
            parts.update(name.encode())
            parts.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


def _read(path: Path, num_tokens: int) -> NDArray[np.float32] | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.float32 and found.shape == (num_tokens,) else None


def _write(path: Path, column: NDArray[np.float32]) -> None:
    """Whole or not at all; a cache that cannot be written costs time and nothing else."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, column, allow_pickle=False)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
