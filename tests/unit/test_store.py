"""Encoded samples on disk: made once for the same content, mapped, and safe among several processes."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_tokenizer

from tunesmith.data.encode import Encoder
from tunesmith.data.kinds import Labelled, Text
from tunesmith.data.records import read_records
from tunesmith.data.store import build_store
from tunesmith.errors import DataError


class Counting:
    """Records that count how often they were read."""

    def __init__(self, records, fingerprint="one", files=("a",)):
        self.records, self.fingerprint, self.files, self.times = records, fingerprint, files, 0

    def __iter__(self):
        self.times += 1
        return iter(self.records)


def _encoder(stage="pretrain", **options):
    return Encoder(tiny_tokenizer(), stage, 64, **options)


def test_samples_come_back_as_they_were_made(tmp_path):
    records = [Labelled(f"text number {n}", str(n % 3), origin=f"f:{n}") for n in range(20)]
    encoder = _encoder("classify", label_names=("0", "1", "2"))
    store = build_store(Counting(records), encoder, tmp_path)
    for sample, made in zip(store, (encoder(record)[0] for record in records), strict=True):
        assert sample.ids.tolist() == made.ids.tolist() and sample.weights.tolist() == made.weights.tolist()
        assert (sample.label, sample.origin, sample.ids.dtype) == (made.label, made.origin, np.int32)
    assert store.num_tokens == sum(map(len, store)) and store.lengths.tolist() == [len(s) for s in store]
    several = _encoder("classify", label_names=("a", "b"), multi_label=True)
    store = build_store(Counting([Labelled("t", ("b",)), Labelled("t", ())], "two"), several, tmp_path)
    assert [sample.label for sample in store] == [(0.0, 1.0), (0.0, 0.0)]


def test_the_same_content_is_encoded_once_and_an_edit_again(tmp_path):
    cache, first, second = tmp_path / "cache", tmp_path / "a.jsonl", tmp_path / "elsewhere.jsonl"
    rows = [{"text": f"row {n}"} for n in range(9)]
    for path in (first, second):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = build_store(read_records(first, stage="pretrain"), _encoder(), cache)
    again = build_store(read_records(second, stage="pretrain"), _encoder(), cache)
    assert one.folder == again.folder and len(list((cache / "samples").glob("[0-9a-f]*"))) == 1
    assert again.origin(3) == f"{second}:4" and one.origin(3) == f"{first}:4"
    first.write_text(first.read_text().replace("row 4", "row four"))
    edited = build_store(read_records(first, stage="pretrain"), _encoder(), cache)
    assert edited.folder != one.folder and tiny_tokenizer().decode(edited[4].ids) == "row four<eos>"


def test_a_hit_reads_no_record(tmp_path):
    records = Counting([Text("a b c")])
    build_store(records, _encoder(), tmp_path)
    build_store(records, _encoder(), tmp_path)
    assert records.times == 1
    build_store(records, _encoder(on_too_long="drop"), tmp_path)
    assert records.times == 2


def test_samples_are_mapped_and_not_held(tmp_path):
    store = build_store(Counting([Text("a b c")] * 50), _encoder(), tmp_path)
    assert isinstance(store._arrays["ids"], np.memmap)
    sample = store[0]
    sample.ids[:] = 0
    assert store[0].ids.any(), "a sample is a copy"


def test_what_was_cut_is_kept_with_the_samples(tmp_path):
    records = Counting([Text("word " * 100), Text("a b")])
    for _ in range(2):
        store = build_store(records, _encoder(on_too_long="drop"), tmp_path)
        assert dict(store.tally) == {"dropped_too_long": 1} and len(store) == 1


@pytest.mark.parametrize("file", ["ids", "weights", "offsets", "origins", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "one bit"])
def test_a_damaged_store_is_made_again(file, damage, tmp_path):
    records = Counting([Text("a b c", "f:1"), Text("d e", "f:2")])
    store = build_store(records, _encoder(), tmp_path)
    before = [sample.ids.tolist() for sample in store]
    path = store.folder / file
    if damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        turned = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"cut": content[:-4], "empty": b"", "one bit": turned}[damage])
    said: list[str] = []
    again = build_store(records, _encoder(), tmp_path, say=said.append)
    assert records.times == 2 and [sample.ids.tolist() for sample in again] == before
    assert len(said) == 1 and "damaged" in said[0] and str(store.folder) in said[0]
    build_store(records, _encoder(), tmp_path, say=said.append)
    assert records.times == 2 and len(said) == 1, "made anew, it is sound"


def test_no_half_store_is_left_when_encoding_fails(tmp_path):
    def broken():
        yield Text("a b c")
        raise DataError("f:2: broken")

    class Broken(Counting):
        def __iter__(self):
            return broken()

    with pytest.raises(DataError, match="f:2"):
        build_store(Broken([]), _encoder(), tmp_path)
    assert [p.name for p in (tmp_path / "samples").iterdir() if p.name != ".lock"] == []


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a place nobody may write to")
def test_a_cache_that_cannot_be_written_is_named():
    with pytest.raises(DataError, match=r"cannot keep encoded samples in /proc/.*TUNESMITH_CACHE"):
        build_store(Counting([Text("a b c")]), _encoder(), Path("/proc/nothing"))


def _build_many(folder: Path, start: float) -> None:
    encoder = _encoder()
    while time.time() < start:
        pass
    for n in range(15):
        records = Counting([Text(f"row {i} of {n}") for i in range(100)], str(n))
        store = build_store(records, encoder, folder)
        assert encoder.tokenizer.decode(store[7].ids) == f"row 7 of {n}<eos>"


def test_several_processes_building_at_once_leave_sound_stores(tmp_path):
    start, children = time.time() + 1, []
    for _ in range(3):
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            child = os.fork()
        if child == 0:
            try:
                _build_many(tmp_path, start)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert len(names) == 16 and names[0] == ".lock"
