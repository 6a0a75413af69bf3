"""SampleStore: encoded samples on disk, mapped into memory, made once for the same content and settings."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.data.encode import Encoder
from tunesmith.data.kinds import Record
from tunesmith.data.naming import place
from tunesmith.errors import DataError

VERSION = 5
_FILES = {"ids": np.int32, "weights": np.float32, "offsets": np.int64, "labels": np.float32,
          "groups": np.int64, "origin_offsets": np.int64}  # fmt: skip


class Records(Protocol):
    """Records that can be read again, and the hash of what they are."""

    @property
    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[Record]: ...


@dataclass(slots=True)
class SampleStore:
    """Samples by index. `lengths [n]` are tokens, `tally` what encoding cut or dropped.

    `groups [n]` numbers the records whose samples stay together (the answers to one prompt), or is None.
    """

    folder: Path
    fingerprint: str
    tally: Mapping[str, int]
    num_tokens: int
    num_targets: float
    label_width: int
    lengths: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    _arrays: dict[str, Any] = field(repr=False)
    _origins: Any = field(repr=False)
    _moved: Mapping[str, str] = field(repr=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        offsets = self._arrays["offsets"]
        part = slice(int(offsets[index]), int(offsets[index + 1]))
        return Sample(
            np.array(self._arrays["ids"][part]), np.array(self._arrays["weights"][part]),
            label=self._label(index), origin=self.origin(index),
            group=None if self.groups is None else int(self.groups[index]),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def flat(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """(ids, weights) of the samples from `start` to before `stop`, one behind the other."""
        offsets = self._arrays["offsets"]
        part = slice(int(offsets[start]), int(offsets[stop]))
        return self._arrays["ids"][part], self._arrays["weights"][part]

    @property
    def labels(self) -> NDArray[np.float32]:
        """Of each sample the number of its class, or a column for each label `[n, label_width]`."""
        return np.asarray(self._arrays["labels"]).reshape(len(self), -1)

    def origin(self, index: int) -> str:
        """Where the sample's record stands, as `file:line`."""
        offsets = self._arrays["origin_offsets"]
        origin = bytes(self._origins[int(offsets[index]) : int(offsets[index + 1])]).decode()
        return place(origin, self._moved)

    def renamed(self, names: Mapping[str, str]) -> SampleStore:
        """The same samples, with the files of their origins called by `names`."""
        moved = {old: names.get(new, new) for old, new in self._moved.items()}
        return replace(self, _moved={**names, **moved})

    def _label(self, index: int) -> int | tuple[float, ...] | None:
        if self.label_width == 0:
            return None
        row = self._arrays["labels"][index * self.label_width : (index + 1) * self.label_width]
        return int(row[0]) if self.label_width == 1 else tuple(float(value) for value in row)


def _silent(_: str) -> None:
    pass


def build_store(
    records: Records, encoder: Encoder, cache_dir: Path, *, say: Callable[[str], None] = _silent
) -> SampleStore:
    """The samples of `records`, from the cache when content and settings are the same, else encoded now.

    What is in the cache is held against its checksums; damaged samples are told to `say` and encoded again. Raises
    `DataError` when rows are too long under the policy `error`, naming the lengths that keep 100, 99 and 95 % whole,
    and for everything that reading and encoding refuse.
    """
    key = sha256(f"{VERSION}/{records.fingerprint}/{encoder.key}".encode()).hexdigest()[:32]
    folder = Path(cache_dir) / "samples" / key
    files = tuple(getattr(records, "files", ()))
    found = _open(folder, key, files)
    if found is None:
        if folder.exists():
            say(f"warning: the encoded samples in {folder} are damaged; they are made again")
        _write(records, encoder, folder, key)
        found = _open(folder, key, files)
    if found is None:
        raise DataError(f"the cache {folder} cannot be read back; is its disk sound? TUNESMITH_CACHE names another")
    return found


def _write(records: Iterable[Record], encoder: Encoder, folder: Path, key: str) -> None:
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        meta = _write_samples(records, encoder, temporary)
        (temporary / "meta.json").write_text(json.dumps({**meta, "fingerprint": key}), encoding="utf-8")
        publish(temporary, folder, lambda: _open(folder, key) is not None)
    except OSError as error:
        raise DataError(f"cannot keep encoded samples in {folder.parent}: {error.strerror}; make room, or name "
                        "another folder with TUNESMITH_CACHE") from None  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path, sound: Callable[[], bool]) -> None:
    """Put a new folder in place, one process at a time; one that another has put there meanwhile stays if `sound`."""
    with (folder.parent / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and sound():
            return
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)


def _write_samples(records: Iterable[Record], encoder: Encoder, folder: Path) -> dict[str, Any]:
    encoder.tally.clear()
    lengths: list[int] = []
    origins: list[int] = [0]
    width, targets = 0, 0.0
    with (
        (folder / "ids").open("wb") as ids, (folder / "weights").open("wb") as weights,
        (folder / "labels").open("wb") as labels, (folder / "origins").open("wb") as names,
        (folder / "groups").open("wb") as groups,
    ):  # fmt: skip
        for number, sample in _numbered(encoder.many(records)):
            ids.write(sample.ids.tobytes())
            weights.write(sample.weights.tobytes())
            targets += float(sample.weights.sum())
            if sample.label is not None:
                row = np.asarray(sample.label, np.float32).reshape(-1)
                width = len(row)
                labels.write(row.tobytes())
            if sample.group is not None:
                groups.write(np.int64(number).tobytes())
            lengths.append(len(sample))
            origins.append(origins[-1] + names.write(sample.origin.encode()))
    _refuse_too_long(lengths, encoder)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    (folder / "offsets").write_bytes(offsets.tobytes())
    (folder / "origin_offsets").write_bytes(np.asarray(origins, np.int64).tobytes())
    digests = {path.name: _digest(path) for path in folder.iterdir()}
    return {
        "version": VERSION, "files": getattr(records, "files", ()), "tally": dict(encoder.tally),
        "num_targets": targets, "label_width": width, "sha256": digests,
    }  # fmt: skip


def _numbered(encoded: Iterable[list[Sample]]) -> Iterator[tuple[int, Sample]]:
    """(number of the record, sample), for every sample of every record."""
    return ((number, sample) for number, samples in enumerate(encoded) for sample in samples)


def _refuse_too_long(lengths: list[int], encoder: Encoder) -> None:
    if encoder.on_too_long != "error" or not encoder.tally["too_long"]:
        return
    ordered = np.sort(lengths)
    keep = {share: int(ordered[max(0, int(np.ceil(share / 100 * len(ordered))) - 1)]) for share in (100, 99, 95)}
    named = ", ".join(f"{length} keeps {share} % of the rows whole" for share, length in keep.items())
    raise DataError(
        f"{encoder.tally['too_long']:,} of {len(lengths):,} rows have more than {encoder.max_length} tokens. "
        f"data.max_length {named}; or choose data.on_too_long: truncate_left, truncate_right, split or drop"
    )


def _open(folder: Path, key: str, files: tuple[str, ...] = ()) -> SampleStore | None:
    """The store, or None when it is not there or not whole. `files` is how the user calls now what was read then."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        digests = {name: _digest(folder / name) for name in meta["sha256"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if meta.get("fingerprint") != key or digests != meta["sha256"] or not {*_FILES, "origins"} <= set(digests):
        return None
    arrays = {name: _map(folder / name, np.dtype(kind)) for name, kind in _FILES.items()}
    lengths = np.diff(arrays["offsets"])
    return SampleStore(
        folder, key, meta["tally"], int(lengths.sum()), meta["num_targets"], meta["label_width"], lengths,
        arrays["groups"] if len(arrays["groups"]) else None, arrays, _map(folder / "origins", np.dtype(np.uint8)),
        {old: new for old, new in zip(meta["files"], files, strict=False) if old != new},
    )  # fmt: skip


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """A file as a read-only array; an empty file cannot be mapped."""
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, kind)
