"""A seeded part of a data set: as many rows as asked for, balanced, the same from any order; in recipes too."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chains import chain, stage

from tunesmith.data.kinds import Labelled
from tunesmith.data.part import _Lots, drawn_part
from tunesmith.data.records import read_records
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import load_recipe, load_resolved
from tunesmith.recipe_chain import load_chain
from tunesmith.recipe_data import DataSource
from tunesmith.stages.prepare import read_sets

ROWS = [{"text": f"Text number {n}", "label": ("a", "b", "b", "c")[n % 4], "user": f"u{n}"} for n in range(400)]


def _records(tmp_path: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> Any:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(path, stage="classify")


def _texts(records: Any) -> list[str]:
    return [record.text for record in records]


def test_a_balanced_part_has_as_many_of_each_label(tmp_path):
    records = _records(tmp_path, ROWS)
    part = drawn_part(records, 150, seed=1, balance="label")
    assert Counter(record.label for record in part) == {"a": 50, "b": 50, "c": 50} and len(part) == 150
    uneven = drawn_part(records, 152, balance="label")
    assert Counter(record.label for record in uneven) == {"a": 51, "b": 51, "c": 50}
    assert _texts(part) == _texts(drawn_part(records, 150, seed=1, balance="label"))
    assert part.narrowed[0].endswith("150 of 400 rows, drawn by seed 1, balanced by label (a: 50, b: 50, c: 50)")
    assert "150 of 400 rows" in part.describe()


def test_the_seed_and_the_texts_decide_and_the_order_of_the_file_does_not(tmp_path):
    mixed = list(ROWS)
    random.Random(3).shuffle(mixed)
    records = _records(tmp_path, ROWS)
    plain = drawn_part(records, 60, seed=5)
    other = drawn_part(_records(tmp_path, mixed, "mixed.jsonl"), 60, seed=5)
    assert set(_texts(plain)) == set(_texts(other)) and _texts(plain) != _texts(other)
    assert _texts(other) == [row["text"] for row in mixed if row["text"] in set(_texts(plain))], "in the file's order"
    (tmp_path / "data.csv").write_text("label,text\n" + "".join(f"{r['label']},{r['text']}\n" for r in ROWS))
    table = drawn_part(read_records(tmp_path / "data.csv", stage="classify"), 60, seed=5)
    assert _texts(table) == _texts(plain), "nor the format"
    assert 0 < len(set(_texts(drawn_part(records, 60, seed=6))) & set(_texts(plain))) < 30
    assert 15 < sum(int(text.rpartition(" ")[2]) < 200 for text in _texts(plain)) < 45, "from the whole file"


def test_a_part_is_known_by_its_content_and_how_it_was_drawn(tmp_path):
    records = _records(tmp_path, ROWS)
    prints = [drawn_part(records, n, seed=s, balance=b).fingerprint
              for n, s, b in ((20, 0, None), (21, 0, None), (20, 1, None), (20, 0, "label"))]  # fmt: skip
    prints.append(drawn_part(_records(tmp_path, ROWS[:-1]), 20).fingerprint)
    assert len({*prints, records.fingerprint}) == 6


def test_only_as_many_draws_are_held_as_the_part_could_need():
    lots = _Lots(12)
    for number in range(3000):
        lots.add(number, "ab"[number > 9 and number % 2], Labelled(f"text {number}", "x"), 0)
    assert sum(map(len, lots.kept.values())) == 12 and lots.counts == {"a": 1505, "b": 1495}


@pytest.mark.parametrize(
    ("rows", "balance", "told"),
    [
        (401, None, "401 rows are asked for, and there are 400; ask for 400 at most"),
        (303, "label", "are 101 of each of its 3 values, and there are a: 100, c: 100; ask for 300 rows at most"),
        (20, "lable", "no column 'lable' to balance by; the row has text, label, user"),
        (20, "user", "'user' has more values than the 20 rows asked for"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(rows, balance, told, tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl") as refused:
        drawn_part(_records(tmp_path, ROWS), rows, balance=balance)
    assert told in str(refused.value)


def test_a_column_may_be_named_by_its_role_and_must_hold_one_value(tmp_path):
    stars = [{"review": f"Review number {n} is here", "stars": n % 2} for n in range(40)]
    assert Counter(r.label for r in drawn_part(_records(tmp_path, stars), 10, balance="label")) == {"0": 5, "1": 5}
    holes = [{**row, "kind": None if n == 7 else "x"} for n, row in enumerate(stars)]
    with pytest.raises(DataError, match=r"data\.jsonl:8: rows cannot be balanced by 'kind'"):
        drawn_part(_records(tmp_path, holes), 10, balance="kind")
    lists = [{**row, "kind": ["x", "y"]} for row in stars]
    with pytest.raises(DataError, match="which holds lists"):
        drawn_part(_records(tmp_path, lists), 10, balance="kind")


def test_a_label_that_was_corrected_is_balanced_as_it_is_trained(tmp_path):
    marked = {"prediction": "x", "tunesmith": "predicted"}
    rows = [{"text": f"Text number {n}", "label": "a", "correction": "b" if n % 4 == 0 else None, **marked}
            for n in range(80)]  # fmt: skip
    part = drawn_part(_records(tmp_path, rows), 40, balance="label")
    assert Counter(record.label for record in part) == {"a": 20, "b": 20}


def _recipe(train: Any, **data: Any) -> dict[str, Any]:
    return {"stage": "classify", "base": "b", "data": {"train": train, **data}}


def test_a_recipe_takes_a_part_from_the_file_and_from_the_command_line(tmp_path):
    written = load_recipe(_recipe({"path": "data.jsonl", "rows": 30, "balance": "label", "seed": 2}))
    source = DataSource(path="data.jsonl", rows=30, balance="label", seed=2)
    assert written.recipe.data.train == source and written.origins["data.train.rows"] == "user"
    given = load_recipe(_recipe("data.jsonl"), ["data.train.rows=30", "data.train.balance=label", "data.train.seed=2"])
    assert given.recipe.data.train == source
    assert (given.origins["data.train.path"], given.origins["data.train.rows"]) == ("user", "override")
    assert (
        load_recipe(_recipe(written.recipe.data.train.model_dump()), ["data.train=x.csv"]).recipe.data.train == "x.csv"
    )
    (tmp_path / "saved.yaml").write_text(written.to_yaml())
    assert load_resolved(tmp_path / "saved.yaml").data.train == source
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(_recipe("data.jsonl")))
    (tmp_path / "small.yaml").write_text("extends: whole.yaml\ndata: {train: {rows: 30}}\n")
    assert load_recipe(tmp_path / "small.yaml").recipe.data.train == DataSource(path="data.jsonl", rows=30)
    (tmp_path / "small.yaml").write_text("extends: whole.yaml\ndata: {train: {rows: 30, blance: label}}\n")
    with pytest.raises(RecipeError, match="did you mean `balance`") as refused:
        load_recipe(tmp_path / "small.yaml")
    assert "is missing" not in str(refused.value), "the path is the parent's"


def test_each_source_has_a_part_of_its_own(tmp_path):
    _records(tmp_path, ROWS)
    one = {"path": "data.jsonl", "rows": 40, "balance": "label"}
    whole = read_sets(load_recipe(_recipe(one, eval={**one, "seed": 1}, test="data.jsonl")).recipe, tmp_path)
    assert [len(s) for s in (whole.train, whole.eval, whole.test)] == [40, 40, 400]
    assert _texts(whole.train) != _texts(whole.eval)
    mix = [{"path": "data.jsonl", "rows": 10, "weight": 1.0}, {"path": "data.jsonl", "rows": 30, "weight": 3.0}]
    mixed = read_sets(load_recipe(_recipe(None, mix=mix)).recipe, tmp_path).train
    assert [len(part) for part in mixed.parts] == [10, 30] and len(mixed.narrowed) == 2
    split = read_sets(load_recipe(_recipe(one, split={"eval": 0.25})).recipe, tmp_path)
    assert (len(split.train), len(split.eval)) == (30, 10)


def test_a_stage_of_a_chain_takes_a_part_of_what_is_shared():
    recipe = chain(stage("sft", "pairs"), stage("dpo", "preferences"))
    path = recipe["stages"][0]["data"]["train"]
    found = load_chain(recipe, ["stages.1.data.train.rows=7"])
    assert found.stages[0].resolved.recipe.data.train == DataSource(path=path, rows=7)
    shared = {"stages": [{**s, "data": {k: v for k, v in s["data"].items() if k != "train"}} for s in recipe["stages"]]}
    shared = {**recipe, **shared, "data": {"train": "all.jsonl"}}
    sources = [s.resolved.recipe.data.train for s in load_chain(shared, ["stages.1.data.train.rows=7"]).stages]
    assert sources == [DataSource(path="all.jsonl", rows=7), "all.jsonl"]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"path": "a.jsonl", "row": 3}, "there is no key `data.train.row`; did you mean `rows`?"),
        ({"path": "a.jsonl", "rows": 0}, "`data.train.rows` is 0: should be greater than 0"),
        ({"rows": 3}, "`data.train.path` is missing"),
        ({"path": "a.jsonl", "balance": "label"}, "say of how many, as `data.train.rows`"),
        (5, "`data.train` is 5: should be a valid string"),
    ],
)
def test_a_wrong_part_is_one_problem(train, told):
    with pytest.raises(RecipeError) as refused:
        load_recipe(_recipe(train))
    assert told in str(refused.value) and str(refused.value).count("data.train") <= 2
