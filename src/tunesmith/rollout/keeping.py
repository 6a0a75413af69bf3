"""Samples as plain JSON and back, bit for bit: what a checkpoint keeps of a running round."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import Sample


def pack_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """All ids, weights and columns end to end, compressed, with the lengths that take them apart again."""
    names = list(samples[0].columns) if samples else []
    return {
        "lengths": [len(sample) for sample in samples],
        "groups": [sample.group for sample in samples],
        "origins": [sample.origin for sample in samples],
        "ids": _pack([sample.ids for sample in samples]),
        "weights": _pack([sample.weights for sample in samples]),
        "columns": {name: _pack([sample.columns[name] for sample in samples]) for name in names},
    }


def unpack_samples(kept: Mapping[str, Any]) -> tuple[Sample, ...]:
    """The samples that `pack_samples` was given."""
    ends = np.cumsum(kept["lengths"])[:-1]
    ids, weights = (np.split(_unpack(kept[name]), ends) for name in ("ids", "weights"))
    columns = {name: np.split(_unpack(column), ends) for name, column in kept["columns"].items()}
    return tuple(
        Sample(ids[i], weights[i], {name: parts[i] for name, parts in columns.items()}, group=group, origin=origin)
        for i, (group, origin) in enumerate(zip(kept["groups"], kept["origins"], strict=True))
    )


def _pack(arrays: Sequence[NDArray[Any]]) -> dict[str, str]:
    whole = np.concatenate(arrays)
    return {"type": whole.dtype.str, "bytes": base64.b64encode(zlib.compress(whole.tobytes(), 1)).decode()}


def _unpack(kept: Mapping[str, str]) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(kept["bytes"])), np.dtype(kept["type"]))
