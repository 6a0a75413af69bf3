"""Parts of a data set: seeded, disjoint after normalising, whole groups; caps, personal data, balance."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.kinds import normalised
from tunesmith.data.records import read_records
from tunesmith.data.split import _cut, cap_per_key, split_records, without_personal
from tunesmith.errors import DataError


def _records(tmp_path, rows, stage="classify"):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(path, stage=stage)


ROWS = [{"text": f"Text number {n % 400}" + " " * (n % 3), "label": n % 2, "user": f"u{n % 37}"} for n in range(1000)]


def test_parts_share_no_text_and_lose_none(tmp_path):
    parts = split_records(_records(tmp_path, ROWS), {"train": 0.8, "eval": 0.1, "test": 0.1}, 7)
    keys = [{normalised(record.text) for record in part} for part in parts]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert sum(map(len, parts)) == 1000 == sum(1 for part in parts for _ in part)
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(part) - 1000 * share) <= 3 and len(list(part)) == len(part)
    origins = [int(record.origin.rpartition(":")[2]) for record in parts[0]]
    assert origins == sorted(origins)


def test_the_seed_decides_and_nothing_else(tmp_path):
    records = _records(tmp_path, ROWS)
    texts = {seed: [r.text for r in split_records(records, [0.5, 0.5], seed)[0]] for seed in (1, 2)}
    assert texts[1] == [r.text for r in split_records(records, [0.5, 0.5], 1)[0]] != texts[2]
    prints = {
        split_records(records, shares, seed)[0].fingerprint for shares in ([0.5, 0.5], [0.6, 0.4]) for seed in (1, 2)
    }
    assert len(prints) == 4


def test_no_group_stands_in_two_parts(tmp_path):
    records = _records(tmp_path, ROWS)
    parts = split_records(records, [0.7, 0.3], 1, group_key="user")
    users = [{row.values["user"] for row, _ in part.rows()} for part in parts]
    assert not users[0] & users[1] and users[0] | users[1] == {row["user"] for row in ROWS}
    with pytest.raises(DataError, match=r"data.jsonl:1: there is no column 'person' to group by.*text, label, user"):
        split_records(records, [0.7, 0.3], 1, group_key="person")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=60), st.sampled_from([(0.5, 0.5), (0.8, 0.1, 0.1), (0.98, 0.02)])
)
def test_parts_are_within_a_group_of_their_share(sizes, shares):
    part_of = _cut(Counter(dict(enumerate(sizes))), shares, sum(sizes))
    for part, share in enumerate(shares):
        filled = sum(size for group, size in enumerate(sizes) if part_of[group] == part)
        assert abs(filled - share * sum(sizes)) <= max(sizes) * (len(shares) - 1)


def test_a_part_without_rows_and_shares_that_are_none_are_refused(tmp_path):
    records = _records(tmp_path, ROWS[:2])
    with pytest.raises(DataError, match="no rows are left for"):
        split_records(records, {"train": 0.9, "eval": 0.09, "test": 0.01}, 1)
    for shares in ([0.5, 0.4], [1.2, -0.2], []):
        with pytest.raises(DataError, match="must be above 0 and sum to 1"):
            split_records(records, shares, 1)


def test_no_key_has_more_rows_than_its_cap(tmp_path):
    records = _records(tmp_path, ROWS)
    capped = cap_per_key(records, "user", 20, seed=1)
    counts = Counter(row.values["user"] for row, _ in capped.rows())
    assert set(counts.values()) == {20} and len(counts) == 37 and len(capped) == 740
    assert "260 of 1000 left out" in capped.describe()
    other = cap_per_key(records, "user", 20, seed=2)
    assert [r.origin for r in other] != [r.origin for r in capped]
    with pytest.raises(DataError):
        cap_per_key(records, "user", 0)


def test_personal_data_is_left_out_and_counted(tmp_path):
    rows = [{"text": text} for text in (
        "write to jane.doe@example.org now", "call +49 171 1234567", "card 1234 5678 9012 3456",
        "IBAN DE89 3704 0044 0532 0130 00",
        "in 1999 there were 12345 of them", "version 1.2.3 on 2020-01-02", "it is 50 percent @ home")]  # fmt: skip
    kept, counts = without_personal(_records(tmp_path, rows, "pretrain"))
    assert len(kept) == 3 == len(list(kept))
    assert set(counts) == {"e-mail address", "phone number", "credit card number", "IBAN"}
