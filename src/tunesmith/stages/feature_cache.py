"""What enters the head of a frozen body, computed once for every text of a run and kept by content.

The vectors lie beside the encoded samples in the cache, mapped from there into memory. Runs that share base, samples,
device and settings share them too: other seeds, other learning rates, a run that goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.batches import collate
from tunesmith.data.store import SampleStore, publish
from tunesmith.errors import DataError
from tunesmith.evaluate.features import head_inputs
from tunesmith.model.features import FeatureTable, text_key
from tunesmith.model.hashing import parameters_hash
from tunesmith.model.load import load_config
from tunesmith.model.score import ScoreModel
from tunesmith.model.trainable import head_modules
from tunesmith.recipe import Recipe
from tunesmith.stages.job import Built, Inputs, Job

VERSION = 1
FILE, META = "vectors", "meta.json"
_OF_THE_HEAD = frozenset({"_name_or_path", "architectures", "id2label", "label2id", "problem_type"})
"""Settings of a model that its body does not depend on."""


def kept(built: Built, job: Job, cache: Path) -> Built:
    """The stage, whose model scores the run's texts by its head alone where the recipe has it so; `cache` is a folder.

    Raises `ModelError` for a head whose input is not known and `DataError` when the cache cannot be written.
    """
    model = built.stage.model
    if not job.recipe.tune.cache_features or not isinstance(model, ScoreModel):
        return built
    model.check_pooled()
    started, table, made, size = time.perf_counter(), FeatureTable(), 0, 0
    body = _body_hash(job)
    for store in stores_of(job.inputs):
        part = _Part.of(store, cache / "features" / _key(job, model, body, store))
        vectors = part.opened()
        if vectors is None:
            if part.folder.exists():
                job.say(f"warning: the features in {part.folder} are damaged; they are made again")
            vectors, made = part.written(model, job), made + len(part.rows)
        table.add(part.keys, vectors)
        size += vectors.nbytes
    model.features = table
    how = f"{made:,} made in {time.perf_counter() - started:.1f} s" if made else "from the cache"
    job.say(f"features: {len(table):,} texts, {size / 1e6:.1f} MB, {how}")
    return built


def stores_of(inputs: Inputs) -> list[SampleStore]:
    """Everything that a run of classify gives its model again and again."""
    probes = [*inputs.probes.values(), *([] if inputs.replay is None else [inputs.replay])]
    probed = [probe.store for probe in probes if probe.kind == "classify"]
    return [store for store in (inputs.train, inputs.eval, inputs.test, *probed) if store is not None]


def feature_bytes(recipe: Recipe, base: str, inputs: Inputs) -> int:
    """Bytes that the kept features take at most, equal texts counted apart; 0 where none are kept."""
    if not recipe.tune.cache_features:
        return 0
    width = int(load_config(base, trust=recipe.trust_remote_code).get_text_config().hidden_size)
    return 4 * width * sum(len(store) for store in stores_of(inputs))


def _body_hash(job: Job) -> str:
    """The content of what is frozen, as it stands in memory, and of the settings that it is computed by."""
    settings = {name: v for name, v in job.backbone.config.to_dict().items() if name not in _OF_THE_HEAD}
    weights = parameters_hash(job.backbone, skip=head_modules(job.backbone))
    return sha256(json.dumps([settings, weights], sort_keys=True, default=str).encode()).hexdigest()


def _key(job: Job, model: ScoreModel, body: str, store: SampleStore) -> str:
    """Everything that a bit of a feature depends on: the same key is the same bits."""
    chip = torch.cuda.get_device_name(job.device) if job.device.startswith("cuda") else ""
    parts = [
        VERSION, body, store.fingerprint, job.precision, job.eval_tokens, model.layout.value, job.device, chip,
        torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip
    return sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Part:
    """The features of one set of samples in the cache: `keys` and `rows` of its texts, each text once."""

    folder: Path
    store: SampleStore
    keys: tuple[bytes, ...]
    rows: tuple[int, ...]

    @staticmethod
    def of(store: SampleStore, folder: Path) -> _Part:
        texts: dict[bytes, int] = {}
        for row in range(len(store)):
            texts.setdefault(text_key(store.flat(row, row + 1)[0]), row)
        return _Part(folder, store, tuple(texts), tuple(texts.values()))

    def opened(self) -> NDArray[np.float32] | None:
        """The vectors `[n, D]`, mapped; None when they are not there or not whole."""
        try:
            meta = json.loads((self.folder / META).read_text(encoding="utf-8"))
            shape = (int(meta["rows"]), int(meta["width"]))
            with (self.folder / FILE).open("rb") as file:
                sound = file_digest(file, "sha256").hexdigest() == meta["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        size = (self.folder / FILE).stat().st_size
        if not sound or shape[0] != len(self.rows) or size != 4 * shape[0] * shape[1]:
            return None
        return np.memmap(self.folder / FILE, np.float32, "r", shape=shape)

    def written(self, model: ScoreModel, job: Job) -> NDArray[np.float32]:
        """One pass over the texts; the vectors, in place in the cache."""
        temporary = self.folder.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            width = _write(temporary / FILE, self._vectors(model, job))
            with (temporary / FILE).open("rb") as file:
                meta = {"rows": len(self.rows), "width": width, "sha256": file_digest(file, "sha256").hexdigest()}
            (temporary / META).write_text(json.dumps(meta), encoding="utf-8")
            publish(temporary, self.folder, lambda: self.opened() is not None)
        except OSError as error:
            raise DataError(f"cannot keep features in {self.folder.parent}: {error.strerror}; make room, name another "
                            "folder with TUNESMITH_CACHE, or leave out tune.cache_features") from None  # fmt: skip
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = self.opened()
        if found is None:
            raise DataError(f"the cache {self.folder} cannot be read back; is its disk sound? TUNESMITH_CACHE names "
                            "another")  # fmt: skip
        return found

    def _vectors(self, model: ScoreModel, job: Job) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        settings = {"collate": collate, "max_tokens": job.eval_tokens, "device": job.device}
        return head_inputs(model, self.store, self.rows, **settings)


def _write(path: Path, batches: Iterator[tuple[list[int], NDArray[Any]]]) -> int:
    """Each vector in its place, so that no more than a batch of them is in memory; returns their width."""
    width = 0
    with path.open("wb") as file:
        for places, vectors in batches:
            width = vectors.shape[1]
            for place, vector in zip(places, vectors, strict=True):
                file.seek(4 * width * place)
                file.write(vector.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return width
