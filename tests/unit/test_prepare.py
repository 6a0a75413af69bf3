"""Paths of a recipe begin in the recipe's folder, wherever the command is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_tokenizer

from tunesmith.data.kinds import input_text
from tunesmith.errors import DataError
from tunesmith.recipe import load_recipe
from tunesmith.stages.prepare import locate, probe, read_sets


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
