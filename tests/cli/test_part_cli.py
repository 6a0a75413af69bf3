"""Parts of a file on the command line: recorded in the run, refused when they overlap or have changed since."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import labelled, write_rows

from tunesmith import api


@pytest.fixture
def whole(work, write):
    """A recipe that trains on all rows of `whole.jsonl`."""
    write_rows(work / "whole.jsonl", labelled(90))
    return write("classify", data={"train": "whole.jsonl", "eval": "labels-eval.jsonl"})


PART = ("data.train.rows=24", "data.train.balance=label")


def test_a_part_is_taken_recorded_and_asked_for_again_when_a_run_goes_on(whole, work, run):
    done = run("train", whole, *PART, "run=part", "--json")
    assert done.code == 0, done.err
    told = "24 of 90 rows, drawn by seed 0, balanced by label (no: 12, yes: 12)"
    assert told in done.err and f"training: whole.jsonl: {told}" in done.json["findings"]
    inputs = json.loads((work / "runs/part/inputs.json").read_text())
    assert inputs["data"]["train"]["samples"] == 24
    run("train", whole, *PART, "data.train.seed=1", "run=other")
    other = json.loads((work / "runs/other/inputs.json").read_text())
    assert other["data"]["train"]["hash"] != inputs["data"]["train"]["hash"]


def test_a_changed_part_is_refused_when_a_run_goes_on(whole, work, run):
    def cut(report):
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.train(whole, [*PART, "train.epochs=2", "train.save_every=1"], run="cut", show=cut)
    saved = work / "runs/cut/recipe.yaml"
    text = saved.read_text()
    assert "rows: 24" in text
    saved.write_text(text.replace("rows: 24", "rows: 32"))
    refused = run("train", "--resume", "cut")
    assert refused.code == 2 and "data.train.rows" in refused.err and "Traceback" not in refused.err
    saved.write_text(text)
    assert run("train", "--resume", "cut").code == 0, "the control: as it was, it goes on"


def test_parts_of_one_file_by_two_seeds_overlap_and_are_refused(whole, run):
    parts = ("data.train.rows=60", "data.eval.path=whole.jsonl", "data.eval.rows=40", "data.eval.seed=1")
    refused = run("check", whole, *parts)
    assert refused.code == 2 and "overlap" in refused.err and "of 40 eval rows also stand in training" in refused.err
    assert run("check", whole, *parts, "data.on_overlap=allow").code == 0


def test_more_rows_than_there_are_is_one_message(whole, run):
    refused = run("check", whole, "data.train.rows=91")
    assert refused.code == 2 and "91 rows are asked for, and there are 90" in refused.err
    assert "Traceback" not in refused.err and "whole.jsonl" in refused.err
