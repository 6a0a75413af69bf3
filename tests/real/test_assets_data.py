"""Real data sets are recognised as what they are, row for row."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.assets import asset

from tunesmith.data.check import check_records
from tunesmith.data.part import drawn_part
from tunesmith.data.records import Pair, input_text, output_text, read_records
from tunesmith.errors import DataError


@pytest.mark.parametrize(
    ("path", "stage", "format", "rows"),
    [
        ("imdb/imdb_truncated_train.jsonl", "classify", "labelled", 1000),
        ("imdb/imdb_truncated_validation.jsonl", "classify", "labelled", 1000),
        ("imdb/imdb_train.jsonl.gz", "classify", "labelled", 24996),
        ("instruction/instruction-data.json", "sft", "alpaca", 1100),
        ("instruction/instruction-data.json", "grpo", "prompts", 1100),
        ("instruction/instruction-data-with-preference.json", "dpo", "preference", 1100),
        ("gsm8k/train.jsonl", "sft", "question_answer", 7473),
        ("gsm8k/test.jsonl", "grpo", "prompts", 1319),
        ("self-instruct/seed_tasks.jsonl", "sft", "instances", 175),
        ("self-instruct", "ppo", "prompts", 175),
    ],
)
def test_real_files_are_recognised(path, stage, format, rows):
    records = read_records(asset(f"data/{path}"), stage=stage)
    assert (records.format, len(records), records.num_bad) == (format, rows, 0)
    assert all(input_text(record) and (output_text(record) or stage == "ppo") for record in records)


def test_the_truncated_imdb_pair_is_balanced_to_the_row():
    sides = [
        read_records(asset(f"data/imdb/imdb_truncated_{n}.jsonl"), stage="classify") for n in ("train", "validation")
    ]
    for side in sides:
        counts = Counter(record.label for record in side)
        assert (len(side), counts["0"] / len(side)) == (1000, 0.5)
    found = {finding.kind: finding for finding in check_records(*sides)}
    assert "overlap" not in found and "0 0.500" in found["balance"].message


def test_the_truncated_pair_is_made_again_from_the_whole_with_a_seed():
    sides = [
        drawn_part(read_records(asset(f"data/imdb/imdb_{n}.jsonl.gz"), stage="classify"), 1000, balance="label", seed=s)
        for n, s in (("train", 0), ("test", 1))
    ]
    for side in sides:
        counts = Counter(record.label for record in side)
        assert (len(side), counts["0"] / 1000, counts["1"] / 1000) == (1000, 0.5, 0.5)
    assert "1,000 of 24,996 rows, drawn by seed 0, balanced by label (0: 500, 1: 500)" in sides[0].narrowed[0]
    found = {finding.kind: finding for finding in check_records(*sides, ngrams=False)}
    assert "overlap" not in found and "0 0.500" in found["balance"].message


def test_hh_rlhf_dialogues_become_pairs_and_thirteen_broken_ones_are_listed():
    with pytest.raises(DataError, match=r"13 bad rows found") as refused:
        len(read_records(asset("data/hh-rlhf"), stage="reward"))
    assert "harmless-base-test.jsonl.gz:87: 'chosen': turn 4 (assistant) is empty" in str(refused.value)
    records = read_records(asset("data/hh-rlhf"), stage="reward", on_bad_row="skip")
    assert (records.format, len(records), records.num_bad) == ("dialogue_pairs", 2299, 13)
    assert len(records.bad_rows) == 13
    for record in records:
        assert isinstance(record, Pair) and record.prompt[0].role == record.prompt[-1].role == "user"
        assert "\n\nHuman:" not in record.chosen and "\n\nAssistant:" not in record.rejected


def test_unlabelled_reviews_are_streamed_as_text():
    records = read_records(asset("data/imdb/imdb_unsup.jsonl.gz"), stage="pretrain")
    first = next(iter(records))
    assert records.format == "text" and len(first.text) > 100 and first.origin.endswith(".gz:1")
