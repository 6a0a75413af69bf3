"""A record set can be read again and again, says what it is, and knows its content by a fingerprint."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.mix import Mixed
from tunesmith.data.records import read_records
from tunesmith.data.split import split_records
from tunesmith.errors import DataError

ROWS = [{"question": f"Number {n}?", "answer": f"It is {n}.", "id": n} for n in range(30)]


def _write(path, rows=ROWS):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_set_is_read_again_and_again_the_same(tmp_path):
    records = read_records(_write(tmp_path / "a.jsonl"), stage="sft")
    first = list(records)
    assert list(records) == first and len(records) == 30 and records.num_bad == 0
    one, two = iter(records), iter(records)
    assert [next(one), next(one)] == [next(two), next(two)] == first[:2]


def test_records_are_made_one_at_a_time(tmp_path):
    path = _write(tmp_path / "a.jsonl", [*ROWS, *["broken"] * 30])
    assert next(iter(read_records(path, stage="sft"))).origin == f"{path}:1"


def test_what_was_recognised_can_be_read(tmp_path):
    described = read_records(_write(tmp_path / "a.jsonl"), stage="sft").describe()
    assert described.splitlines() == [
        f"1 file: {tmp_path}/a.jsonl",
        "format: question_answer (jsonl); question <- 'question', answer <- 'answer'",
        "left out: id",
        "first: Number 0?",
        "    -> It is 0.",
    ]
    templated = read_records(tmp_path / "a.jsonl", stage="sft", template="qa").describe()
    assert "template: Please answer the following question.\\n\\nQ: {question}" in templated


def test_the_fingerprint_is_of_the_content_and_of_how_it_is_read(tmp_path):
    one, copy = _write(tmp_path / "a.jsonl"), _write(tmp_path / "b.jsonl")
    other = _write(tmp_path / "c.jsonl", [*ROWS[:-1], {**ROWS[-1], "answer": "no"}])
    sets = [
        read_records(one, stage="sft"), read_records(other, stage="sft"), read_records(one, stage="grpo"),
        read_records(one, stage="sft", template="qa"), read_records(one, stage="sft", on_bad_row="skip"),
        read_records(one, stage="sft", columns={"question": "answer", "answer": "question"}),
        read_records([one, copy], stage="sft"),
    ]  # fmt: skip
    assert len({records.fingerprint for records in sets}) == len(sets)
    assert sets[0].fingerprint == read_records(copy, stage="sft").fingerprint
    assert list(sets[0].file_hashes) == [str(one)] and len(sets[0].file_hashes[str(one)]) == 64


def test_parts_and_mixes_pass_on_what_was_left_out(tmp_path):
    path = _write(tmp_path / "a.jsonl", [*ROWS, "broken"])
    records = read_records(path, stage="sft", on_bad_row="skip")
    part, rest = split_records(records, [0.8, 0.2], 1)
    mixed = Mixed([(part, 1), (rest, 1)])
    assert part.num_bad == 1 and mixed.num_bad == 2
    assert [row.origin for row in part.bad_rows] == [f"{path}:31"] and len(mixed.bad_rows) == 2
    assert set(part.bad_rows[0].as_dict()) == {"origin", "problem", "advice", "row"}
    assert len(list(part)) + len(list(rest)) + records.num_bad == 31


def test_every_pass_reports_its_own_bad_rows(tmp_path):
    records = read_records(_write(tmp_path / "a.jsonl", [*ROWS, "broken"]), stage="sft", on_bad_row="skip")
    for _ in range(3):
        assert len(list(records)) == 30 and len(records.bad_rows) == 1 == records.num_bad


def test_problems_with_several_files_stand_in_one_message(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError) as refused:
        read_records([tmp_path / "none.jsonl", tmp_path / "empty.jsonl", ""], stage="sft")
    said = str(refused.value)
    assert "none.jsonl: there is no such file" in said and "the file is empty" in said and "'' is no path" in said
    with pytest.raises(DataError, match="no data is named"):
        read_records([], stage="sft")
