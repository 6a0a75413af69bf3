"""`tunesmith runs rows`: what single rows cost, as a user asks for it."""

from __future__ import annotations

import json

from tests.cli.conftest import labelled, recipe_for, write_rows

import tunesmith


def trained(work, **evaluate) -> None:
    """A run on 41 rows: the 7th is labelled wrongly, the last one repeats the 3rd under the other label."""
    rows = labelled(40)
    rows[6]["label"] = {"yes": "no", "no": "yes"}[rows[6]["label"]]
    rows.append({**rows[2], "label": {"yes": "no", "no": "yes"}[rows[2]["label"]]})
    write_rows(work / "labels.jsonl", rows)
    train = {"epochs": 8, "steps": None, "batch_examples": 4, "learning_rate": 1e-2}
    tunesmith.train(recipe_for("classify", train=train, tune={"rank": 8}, evaluate=evaluate), run="seen")


def test_a_wrong_label_and_a_contradiction_are_listed_with_their_places(run, work):
    trained(work)
    found = run("runs", "rows", "seen", "--top", "5", "--json").json
    assert (found["rows"], found["set"], found["stage"]) == (41, "train", "classify")
    assert "labels.jsonl:7" in [row["origin"] for row in found["mislabelled"]]
    assert found["duplicates"][0]["conflict"]
    assert sorted(found["duplicates"][0]["rows"]) == ["labels.jsonl:3", "labels.jsonl:41"]
    assert all(len(found[key]) <= 5 for key in ("expensive", "never_learned", "mislabelled"))
    dearest = found["expensive"]
    assert [row["last"] for row in dearest] == sorted((row["last"] for row in dearest), reverse=True)
    assert {row["visits"] for row in dearest} == {8}, "one visit an epoch"
    shown = run("runs", "rows", "seen")
    assert shown.code == 0 and "probably mislabelled" in shown.out and "labels differ" in shown.out
    assert "labels.jsonl:7" in shown.out and len(shown.out.splitlines()) > 30


def test_held_out_rows_changed_data_and_what_cannot_be_listed(run, work):
    trained(work)
    held_out = run("runs", "rows", "seen", "--set", "eval", "--json").json
    assert held_out["rows"] == 8 and held_out["expensive"][0]["origin"].startswith("labels-eval.jsonl:")
    refused = [(("seen", "--set", "test"), "not of `test`"), (("absent",), "absent"), (("seen", "--top", "0"), "--top")]
    for arguments, said in refused:
        done = run("runs", "rows", *arguments)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err
    lines = (work / "labels.jsonl").read_text().splitlines()
    (work / "labels.jsonl").write_text("\n".join(lines[:30]) + "\n")
    found = run("runs", "rows", "seen", "--json").json
    assert found["notes"] == ["11 rows are not in the data any more: it has changed since"]
    assert len({json.dumps(row) for row in found["expensive"]}) == 10


def test_a_run_that_kept_none_says_so(run, work):
    tunesmith.train(recipe_for("classify", evaluate={"row_losses": "none"}), run="quiet")
    done = run("runs", "rows", "quiet")
    assert done.code == 2 and "evaluate.row_losses: none" in done.err
