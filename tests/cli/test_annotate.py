"""Predictions with room for corrections, and back: the file is training data without an edit of its columns."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import recipe_for, write_rows

import tunesmith
from tunesmith.data.records import read_records


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_go_round(run, work):
    tunesmith.train(recipe_for("classify"), run="labels")
    texts = [{"text": f"the cat {i} was good", "id": i} for i in range(6)]
    write_rows(work / "ask.jsonl", texts)
    done = run("predict", "labels", "--file", "ask.jsonl", "--to", "out.jsonl", "--json")
    assert done.code == 0, done.err
    rows = rows_of(work / "out.jsonl")
    assert list(rows[0]) == ["text", "id", "label", "prediction", "correction", "tunesmith"]
    assert [row["prediction"] for row in rows] == [row["label"] for row in rows] == [r["answer"] for r in done.json]
    before = [record.label for record in read_records("out.jsonl", stage="classify")]
    assert before == [row["prediction"] for row in rows], "uncorrected, the predictions are the labels"
    other = {"yes": "no", "no": "yes"}
    rows[2]["correction"], rows[4]["correction"] = other[rows[2]["label"]], "  "
    write_rows(work / "out.jsonl", rows)
    after = [record.label for record in read_records("out.jsonl", stage="classify")]
    assert after == [*before[:2], other[before[2]], *before[3:]], "what was filled in wins, and nothing else changes"
    again = recipe_for("classify", data={"train": "labels.jsonl", "mix": None})
    again["data"] = {"mix": [{"path": "labels.jsonl"}, {"path": "out.jsonl"}], "eval": "labels-eval.jsonl"}
    assert tunesmith.train(again, run="again")["trainable_parameters"] > 0
    done = run("predict", "labels", "--file", "out.jsonl", "--to", "anew.jsonl")
    assert done.code == 0, done.err
    anew = rows_of(work / "anew.jsonl")
    assert [row["label"] for row in anew] == after, "what was corrected is the row's answer now"
    assert [row["prediction"] for row in anew] == before and not any(row["correction"] for row in anew)
    refused = run("predict", "labels", "--file", "ask.jsonl", "--to", "out.jsonl")
    assert refused.code == 2 and "may hold corrections" in refused.err


@pytest.mark.parametrize("template", [None, "Q: {prompt}\n\nA: {completion}"], ids=["plain", "template"])
def test_answers_go_round(template, run, work):
    recipe = recipe_for("sft", data={} if template is None else {"template": template})
    tunesmith.train(recipe, run="answers")
    write_rows(work / "ask.jsonl", [{"prompt": f"what is {i} plus 1?"} for i in range(4)])
    for asked, given in (("ask.jsonl", False), ("pairs-eval.jsonl", True)):
        to = f"out-{asked}"
        done = run("predict", "answers", "--file", asked, "--to", to, "--max-tokens", "4", "--json")
        assert done.code == 0, done.err
        rows = rows_of(work / to)
        answer = next(name for name in rows[0] if name not in ("prompt", "prediction", "correction", "tunesmith"))
        if given:
            assert rows[0][answer] == "it is 101" and rows[0]["prediction"] == done.json[0]["answer"]
        for row in rows:
            row[answer] = row[answer] or "nothing"  # a tiny model may say nothing at all
        rows[1]["correction"] = "it is right now"
        write_rows(work / to, rows)
        records = list(read_records(to, stage="sft", template=template))
        said = [record.messages[-1].content for record in records]
        assert "it is right now" in said[1] and rows[0][answer] in said[0] and "right now" not in said[2]
        assert "what is" in records[0].messages[0].content


@pytest.mark.parametrize("names", [("correction",), ("correction", "prediction"), ("correction", "tunesmith")])
def test_columns_of_these_names_alone_are_the_users_own(names, work):
    row = {"prompt": "a", "completion": "b", **dict.fromkeys(names, "c")}
    write_rows(work / "own.jsonl", [row] * 2)
    records = read_records("own.jsonl", stage="sft")
    assert [record.messages[-1].content for record in records] == ["b", "b"]
    said = "own.jsonl: the columns 'prediction' and 'correction' are its own"
    assert (said in records.describe()) == ("prediction" in names)
    write_rows(work / "own.jsonl", [{**row, "prediction": "d", "tunesmith": "predicted"}] * 2)
    marked = read_records("own.jsonl", stage="sft")
    assert [record.messages[-1].content for record in marked] == ["c", "c"], "the control: the mark alone decides"
    assert "corrections that are filled in take the place of 'completion'" in marked.describe()


def test_what_predict_adds_is_not_taken_for_the_rows_own_columns(work):
    rows = [{"one": f"is it {i}?", "two": f"it is {i}", "prediction": f"{i}", "correction": None} for i in range(9)]
    write_rows(work / "marked.jsonl", [{**row, "tunesmith": "predicted"} for row in rows])
    assert read_records("marked.jsonl", stage="sft").columns == {"question": "one", "answer": "two"}
    named = read_records("marked.jsonl", stage="sft", columns={"question": "one", "answer": "prediction"})
    assert next(iter(named)).messages[-1].content == "0"


def test_corrections_that_cannot_be_used_are_said(work):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "prediction": "c", "correction": "d", "tunesmith": "predicted"}
    write_rows(work / "turns.jsonl", [row] * 2)
    assert "corrections that are filled in are not used" in read_records("turns.jsonl", stage="sft").describe()


def test_columns_of_the_file_are_not_written_over(run, work):
    tunesmith.train(recipe_for("classify"), run="labels")
    write_rows(work / "own.jsonl", [{"text": "the cat", "prediction": "mine"}] * 3)
    refused = run("predict", "labels", "--file", "own.jsonl", "--to", "out.jsonl")
    assert refused.code == 2 and "columns of its own called 'prediction'" in refused.err
    assert not (work / "out.jsonl").exists()


def test_there_must_be_a_file_to_write_back(run, work):
    assert "--file" in run("predict", "nothing", "text", "--to", "out.jsonl").err
