"""Paths of a recipe begin in the recipe's folder, wherever the command is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_tokenizer

from tunesmith.data.kinds import Labelled, full_text, input_text
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import load_recipe
from tunesmith.stages.prepare import labels_of, locate, probe, read_sets


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (folder / "reviews").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    (folder / "general.txt").write_text("some general text\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("spec", ["rows.jsonl", "*.jsonl", "reviews", "reviews:test"])
def test_what_stands_beside_the_recipe_is_meant(spec: str, project: Path) -> None:
    assert locate(spec, project) == str(project / spec)


@pytest.mark.parametrize(
    "spec", ["other.jsonl", "*.csv", "owner/name:train", "reviewz:test", ":test", "/abs/rows.jsonl"]
)
def test_what_does_not_is_left_as_it_stands(spec: str, project: Path) -> None:
    assert locate(spec, project) == spec


def test_the_probe_is_read_beside_the_recipe(project: Path) -> None:
    recipe = load_recipe(
        {"stage": "sft", "base": "b", "data": {"train": "rows.jsonl"}, "evaluate": {"probe": "general.txt"}}
    ).recipe
    store = probe(recipe, project, tiny_tokenizer(), 64)
    assert store is not None and len(store) == 1
    with pytest.raises(DataError, match=r"general\.txt"):
        probe(recipe, Path.cwd(), tiny_tokenizer(), 64)


def test_held_out_rows_of_a_mix_are_asked_by_the_template_that_its_parts_share(project: Path) -> None:
    (project / "asked.jsonl").write_text('{"question": "two?", "answer": "2"}\n')
    parts = [{"path": "asked.jsonl", "template": "Frage: {question} Antwort: {answer}"}] * 2
    recipe = load_recipe({"stage": "sft", "base": "b", "data": {"mix": parts, "eval": "asked.jsonl"}}).recipe
    sets = read_sets(recipe, project)
    assert sets.eval is not None
    assert input_text(next(iter(sets.eval))) == "Frage: two? Antwort: " == input_text(next(iter(sets.train)))


def test_training_rows_are_capped_and_cleaned_and_held_out_rows_are_not(project: Path) -> None:
    rows = [{"text": f"row {i} of {i % 4}" + " me@host.org" * (i % 5 == 0), "user": str(i % 4)} for i in range(40)]
    for name in ("train", "held"):
        (project / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {
        "train": "train.jsonl", "eval": "held.jsonl", "group_key": "user", "max_per_key": 3, "on_personal": "drop"
    }  # fmt: skip
    recipe = load_recipe({"stage": "pretrain", "base": "b", "data": data}).recipe
    sets = read_sets(recipe, project)
    texts = [input_text(record) or full_text(record) for record in sets.train]
    assert len(texts) == 12 and not any("@" in text for text in texts) and len(list(sets.eval or ())) == 40
    assert sets.train.narrowed == (
        "without personal data (8 of 40 left out: e-mail address in 8)",
        "at most 3 rows for each user, seed 42 (20 of 32 left out)",
    )
    parts = {"mix": [{"path": "train.jsonl"}, {"path": "held.jsonl"}], "eval": "held.jsonl"}
    mixed = {key: value for key, value in data.items() if key != "train"} | parts
    both = read_sets(load_recipe({"stage": "pretrain", "base": "b", "data": mixed}).recipe, project)
    assert len(both.train) == 24 and len(both.train.narrowed) == 4
    plain = {key: data[key] for key in ("train", "eval")}
    assert (
        read_sets(load_recipe({"stage": "pretrain", "base": "b", "data": plain}).recipe, project).train.narrowed == ()
    )
    with pytest.raises(RecipeError, match=r"name the column as `data\.group_key`"):
        load_recipe({"stage": "pretrain", "base": "b", "data": plain | {"max_per_key": 3}})


def test_labels_stand_in_the_order_of_their_numbers_and_what_only_looks_like_one_is_text():
    names = ["b", "10", "9", "-1", "--5", "\u00b2", "a"]
    assert labels_of(Labelled("text", name) for name in names) == ("-1", "9", "10", "--5", "a", "b", "\u00b2")
