"""Every kind of file gives the same rows, with their places, in bounded memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.files import DataFile
from tunesmith.data.readers import kind_of, read_rows
from tunesmith.data.records import read_records
from tunesmith.data.rows import BadRow, Row, shown
from tunesmith.errors import DataError

ROWS = [{"question": f"Wie heißt Nr. {n}?\nGenau?", "answer": f'"Käse"; {n}, ja\t{n}'} for n in range(7)]


def _csv(delimiter: str, *, bom: bool = False, end: str = "\n") -> bytes:
    quoted = [[f'"{cell}"'.replace('"Käse"', '""Käse""') for cell in row.values()] for row in ROWS]
    lines = [delimiter.join(ROWS[0]), *(delimiter.join(cells) for cells in quoted)]
    return (b"\xef\xbb\xbf" if bom else b"") + (end.join(lines) + end).encode()


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "a.ndjson": "\n".join(map(json.dumps, ROWS)).encode() + b"\n",
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": "\n".join(map(json.dumps, ROWS)).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "held.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "a.csv": _csv(","),
    "bom.csv": _csv(";", bom=True),
    "windows.csv": _csv(";", end="\r\n").replace(b"Nr. ", b"Nr. "),
    "a.tsv": _csv("\t"),
    "pipes.csv": _csv("|"),
    "a.parquet": _parquet(),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name, zipped, tmp_path):
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(KINDS[name]) if zipped else KINDS[name])
    file = DataFile.at(path)
    rows = list(read_rows(file, kind_of(file)))
    assert all(isinstance(row, Row) for row in rows)
    assert [dict(row.values) for row in rows] == ROWS
    assert all(row.origin.startswith(str(path) + ":") for row in rows)
    records = read_records(path, stage="sft")
    assert (records.format, len(records)) == ("question_answer", len(ROWS))


@pytest.mark.parametrize(
    ("name", "lines"),
    [("a.jsonl", range(1, 8)), ("a.csv", range(2, 16, 2)), ("a.json", range(2, 30, 4)), ("a.parquet", range(1, 8))],
)
def test_rows_name_the_line_where_they_begin(name, lines, tmp_path):
    path = tmp_path / name
    path.write_bytes(KINDS[name])
    file = DataFile.at(path)
    assert [row.origin for row in read_rows(file, kind_of(file))] == [f"{path}:{line}" for line in lines]


def test_json_in_pieces_gives_what_json_at_once_gives(tmp_path, monkeypatch):
    rows = [{"text": "ä" * n + '\\"[{', "n": [n, {"a": None}], "f": 1.5e-3 * n} for n in range(200)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr("tunesmith.data.readers._CHUNK_CHARS", 7)
    file = DataFile.at(path)
    assert [dict(row.values) for row in read_rows(file, "json")] == rows


def test_text_is_a_document_or_one_between_marks_or_one_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One\ndocument.\n\nSame.\n<|endoftext|>Another.<|endoftext|>\nThird.\n")
    assert [r.text for r in read_records(path, stage="pretrain")] == ["One\ndocument.\n\nSame.", "Another.", "Third."]
    assert [r.origin.rpartition(":")[2] for r in read_records(path, stage="pretrain")] == ["1", "5", "6"]
    assert len(read_records(path, stage="pretrain", format="lines")) == 5
    prompts = read_records(path, stage="grpo")
    assert [r.messages[0].content for r in prompts][:2] == ["One", "document."]


def test_a_document_beyond_a_million_characters_comes_in_pieces(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 20 + "\n")
    with path.open("a") as file:
        file.writelines("x" * 99 + "\n" for _ in range(25_000))
    texts = [r.text for r in read_records(path, stage="pretrain")]
    assert len(texts) == 3 and max(map(len, texts)) < 2**20 + 200
    assert "\n".join(texts) == path.read_text().rstrip("\n")


def test_folders_globs_lists_and_splits(tmp_path):
    for name in ("train-1.jsonl", "train-2.jsonl", "test-1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / ".hidden.jsonl").write_text("broken")
    assert [r.text for r in read_records(tmp_path, stage="pretrain")] == [
        "test-1.jsonl",
        "train-1.jsonl",
        "train-2.jsonl",
    ]
    assert read_records(tmp_path, stage="pretrain").notes == (f"{tmp_path}: passed over README.md",)
    for spec in (
        f"{tmp_path}/train-*.jsonl",
        f"{tmp_path}:train",
        [tmp_path / "train-1.jsonl", tmp_path / "train-2.jsonl"],
    ):
        assert [r.text for r in read_records(spec, stage="pretrain")] == ["train-1.jsonl", "train-2.jsonl"]
    with pytest.raises(DataError, match=r"no file matches"):
        read_records(f"{tmp_path}/no-*.jsonl", stage="pretrain")
    with pytest.raises(DataError, match=r"there is no such file.*did you mean .*train-1.jsonl"):
        read_records(str(tmp_path / "tran-1.jsonl"), stage="pretrain")


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "a.jsonl").write_text('{"text": "open"}')
    (inside / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    records = read_records(inside, stage="pretrain")
    assert [r.text for r in records] == ["open"] and "lead out of the folder" in " ".join(records.notes)


def test_files_of_other_columns_are_not_read_together(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.jsonl").write_text('{"body": "b"}')
    with pytest.raises(DataError, match=r"b.jsonl: has no column text as .*a.jsonl has"):
        read_records(tmp_path, stage="pretrain")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    records = read_records(path, stage="pretrain")
    assert len(records) == 1
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="changed while it was in use"):
        list(records)


def test_what_is_no_data_file_is_named(tmp_path):
    for name, content, said in (
        ("a.xlsx", b"PK\x03\x04" + bytes(50), "a zip archive"), ("a.jsonl", b"BZh9" + bytes(50), "bzip2"),
        ("a.dat", b"hello", "what kind of file is this"), ("b.jsonl.gz", b"plain", "is not gzip"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_records(tmp_path / name, stage="sft")
    with pytest.raises(DataError, match="not a regular file"):
        read_records("/dev/null", stage="sft")


def test_without_a_network_a_hub_id_is_one_clear_message(monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(DataError, match=r"nobody/nothing:train: is no file here.*no route to host.*without a network"):
        read_records("nobody/nothing:train", stage="sft")


def test_what_is_shown_of_a_row_is_short_and_printable():
    assert shown("plain ä") == "plain ä" and shown("a\x1b[31m\u202eb") == "a\\x1b[31m\\u202eb"
    assert shown("x" * 200) == "x" * 77 + "..." and len(shown("\ud800" * 50)) <= 80
    for length in range(70, 90):
        assert len(shown("é" * length)) == min(length, 80)


def _peak_bytes(path: Path, stage: str) -> int:
    """Peak memory of a process that reads every record of a file."""
    program = (
        "import resource, sys; from tunesmith.data.records import read_records\n"
        "n = sum(1 for _ in read_records(sys.argv[1], stage=sys.argv[2])); assert n > 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path), stage], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _fill(path: Path, size: int) -> None:
    """About `size` bytes of rows in the file's own kind."""
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 8
    count = size // len(text)
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("text,label\n")
            file.writelines(f'"{text}{n}",{n % 2}\n' for n in range(count))
        elif path.suffix == ".json":
            file.write("[\n")
            file.writelines(json.dumps({"text": f"{text}{n}", "label": n % 2}) + ",\n" for n in range(count))
            file.write(json.dumps({"text": "last", "label": 0}) + "\n]")
        else:
            file.writelines(json.dumps({"text": f"{text}{n}", "label": n % 2}) + "\n" for n in range(count))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_memory_does_not_grow_with_the_file(kind, tmp_path):
    peaks = []
    for size in (1_000_000, 16_000_000):
        path = tmp_path / f"{size}.{kind}"
        _fill(path, size)
        peaks.append(_peak_bytes(path, "classify"))
    assert peaks[1] - peaks[0] < 5_000_000


@pytest.mark.evidence
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_two_hundred_megabytes_take_no_more_memory_than_two(kind, tmp_path):
    peaks = []
    for size in (2_000_000, 200_000_000):
        path = tmp_path / f"{size}.{kind}"
        _fill(path, size)
        peaks.append(_peak_bytes(path, "classify" if kind != "txt" else "pretrain"))
    assert peaks[1] - peaks[0] < 5_000_000 + 8 * 400_000, peaks


def test_bad_rows_stand_between_good_ones_in_their_order(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": NaN}, {"a": 1, "a": 2}, 7, {"a": 3}]')
    rows = list(read_rows(DataFile.at(path), "json"))
    assert [type(row) for row in rows] == [Row, BadRow, BadRow, BadRow, Row]
