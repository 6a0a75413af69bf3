"""The embedded data and base: whole, balanced, hard enough, and no row near another."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest

from tunesmith.data.records import read_records
from tunesmith.embedded import BASE, SETS, SPLITS, base_folder, data_file
from tunesmith.errors import DataError, ModelError
from tunesmith.evaluate.linear import fit_logistic, predict_logistic, tfidf

DOMAINS = {"film", "book", "food", "place", "device"}
KINDS = {"plain", "negation", "irony", "mixed", "comparison", "understatement"}
STAGE = {"reviews": "classify", "instructions": "sft", "preferences": "reward", "prompts": "ppo"}
TEXT = {"reviews": "text", "instructions": "prompt", "preferences": "prompt", "prompts": "prompt"}
WHOLE_ROWS = {"reviews": 400, "instructions": 150, "preferences": 200, "prompts": 60}
NEAR = 0.3
_FUNCTION_WORDS = (
    "a an the and or but of in on at to for from with by as is are was were be been it its this that these those i me "
    "my we us our you your he she they him his her their not no never do does did so very too what who which when "
    "where how there here have has had will would can could if than then one all every"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def rows_of(name: str, split: str) -> list[dict[str, str]]:
    file = data_file(f"embedded:{name}/{split}")
    assert file is not None
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)} or {tuple(found)}


def skeleton(text: str) -> str:
    """The text with every content word blanked: what a template would leave behind."""
    return " ".join(word if word in FUNCTION_WORDS else "_" for word in words(text))


def near_duplicates(texts: list[str]) -> Iterator[tuple[str, str]]:
    grams = [trigrams(text) for text in texts]
    for (a, left), (b, right) in combinations(zip(texts, grams, strict=True), 2):
        if len(left & right) >= NEAR * len(left | right):
            yield a, b


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_its_rows_and_none_is_empty(name: str) -> None:
    parts = {split: rows_of(name, split) for split in SPLITS}
    assert sum(map(len, parts.values())) >= WHOLE_ROWS[name]
    assert min(map(len, parts.values())) >= 15
    assert all(value.strip() == value and value for rows in parts.values() for row in rows for value in row.values())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_set_is_read_by_its_stage(name: str, split: str) -> None:
    records = read_records(f"embedded:{name}/{split}", stage=STAGE[name])
    assert len(records) == len(rows_of(name, split))
    assert records.files == (f"embedded:{name}/{split}",)


@pytest.mark.parametrize("name", SETS)
def test_no_near_duplicates_within_or_across_splits(name: str) -> None:
    texts = [row[TEXT[name]] for split in SPLITS for row in rows_of(name, split)]
    assert list(near_duplicates(texts)) == []


def test_no_two_reviews_share_a_skeleton() -> None:
    texts = [row["text"] for split in SPLITS for row in rows_of("reviews", split)]
    counts = Counter(map(skeleton, texts))
    assert [text for text in texts if counts[skeleton(text)] > 1] == []


def test_a_row_with_one_word_swapped_is_found_and_a_template_too() -> None:
    rows = [row["text"] for row in rows_of("reviews", "train")]
    planted = rows[3].replace(words(rows[3])[-1], "elephant")
    assert (rows[3], planted) in set(near_duplicates([*rows, planted]))
    assert skeleton("The soup was cold and the bread was old.") == skeleton("The film was dull and the cast was bad.")


@pytest.mark.parametrize("split", SPLITS)
def test_reviews_are_balanced_in_every_domain_and_hard_in_every_split(split: str) -> None:
    rows = rows_of("reviews", split)
    counts = Counter((row["domain"], row["label"]) for row in rows)
    assert set(counts) == {(domain, label) for domain in DOMAINS for label in ("positive", "negative")}
    assert len(set(counts.values())) == 1
    assert {row["kind"] for row in rows} == KINDS
    assert sum(row["kind"] != "plain" for row in rows) >= 0.2 * len(rows)


@pytest.mark.parametrize("split", SPLITS)
def test_a_chosen_answer_is_not_known_by_its_length(split: str) -> None:
    rows = rows_of("preferences", split)
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in rows)
    assert abs(longer - shorter) <= 0.15 * len(rows)
    assert all(row["chosen"] != row["rejected"] for row in rows)


@pytest.mark.parametrize("split", ["eval", "test"])
def test_words_alone_do_not_solve_the_reviews(split: str) -> None:
    train, held_out = rows_of("reviews", "train"), rows_of("reviews", split)
    labels, truth = (np.asarray([row["label"] == "positive" for row in part], np.int64) for part in (train, held_out))
    assert float((truth == np.bincount(labels).argmax()).mean()) == 0.5
    known, asked = tfidf([row["text"] for row in train], [row["text"] for row in held_out])
    said = predict_logistic(fit_logistic(known, labels, 2), asked)
    assert 0.6 < float((said == truth).mean()) < 0.85


def test_a_wrong_embedded_name_is_told_the_right_one() -> None:
    with pytest.raises(DataError, match="did you mean embedded:reviews/train"):
        data_file("embedded:reviews/trains")
    with pytest.raises(ModelError, match=BASE):
        base_folder("tunesmith/reviews-2m")
    assert data_file("reviews/train.jsonl") is None
    assert base_folder("someone/reviews-1m") is None
