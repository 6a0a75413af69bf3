"""What fine-tuning should do at least: learn a few rows by heart, do the same twice; each task end to end."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import labelled, write_rows

from tunesmith.data.records import read_records


def test_eight_rows_are_learned_by_heart(run, write, work):
    write_rows(work / "eight.jsonl", labelled(8))
    recipe = write("classify", data={"train": "eight.jsonl", "eval": "eight.jsonl", "on_overlap": "allow"},
                   train={"epochs": 60, "learning_rate": 1e-2})  # fmt: skip
    done = run("train", recipe, "--run", "heart", "--json")
    assert done.code == 0, done.err
    assert done.json["after"]["accuracy"] == {"value": 1.0, "low": pytest.approx(0.676, abs=0.001), "high": 1.0, "n": 8}
    lines = [json.loads(line) for line in (work / "runs/heart/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]


def test_the_same_seed_twice_gives_the_same_losses_and_another_does_not(run, write, work):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        assert run("train", write("classify"), f"seed={seed}", "--run", name).code == 0
    one, two, other = (
        [json.loads(line)["loss"] for line in (work / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two", "other")
    )
    assert one == two != other


TASKS = {
    "qa": {"question": "what is {i} plus 1?", "answer": "it is {j}"},
    "summarise": {"text": "the cat {i} sat on the mat all day long", "summary": "cat {i} sat"},
    "translate": {"source": "the cat {i}", "target": "die Katze {i}"},
}


@pytest.mark.parametrize("task", TASKS)
def test_each_text_task_has_its_template_and_is_judged_by_its_text(task, run, write, work):
    for name, count in (("rows", 12), ("held", 4)):
        shift = 0 if name == "rows" else 50
        rows = [{k: v.format(i=i, j=i + 1) for k, v in TASKS[task].items()} for i in range(shift, shift + count)]
        write_rows(work / f"{name}.jsonl", rows)
    recipe = write("sft", data={"train": "rows.jsonl", "eval": "held.jsonl", "template": task},
                   evaluate={"generate": {"max_tokens": 4}})  # fmt: skip
    done = run("train", recipe, "--run", task, "--json")
    assert done.code == 0, done.err
    assert {"loss", "exact_match", "rouge_l", "bleu"} <= set(done.json["after"])


def test_reviews_become_instructions_row_for_row(work):
    rows = read_records(work / "labels.jsonl", stage="sft", template="classify")
    talks = list(rows)
    assert len(talks) == 24 == len(list(read_records(work / "labels.jsonl", stage="classify")))
    for talk, row in zip(talks, labelled(24), strict=True):
        asked, answered = (message.content for message in talk.messages)
        assert row["text"] in asked and row["label"] not in asked.replace(row["text"], "") and answered == row["label"]
