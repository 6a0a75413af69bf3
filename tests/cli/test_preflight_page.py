"""The page before the first step: shown by every run, alone by check; planted faults refuse, and can be passed."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import answered, labelled, write_rows

ENDINGS = "abcdefghijklmnopqrstuvwxyz"


def _sft(work, rows, **data):
    write_rows(work / "faulty.jsonl", rows)
    return {"data": {"train": "faulty.jsonl", **data}}


def overlap(work):
    return "sft", _sft(work, [*answered(24), *answered(2, 100)])


def contradicting_labels(work):
    rows = labelled(24)
    write_rows(work / "faulty.jsonl", [*rows, *({**row, "label": "no"} for row in rows[:10])])
    return "classify", {"data": {"train": "faulty.jsonl"}}


def repeated_rows(work):
    return "sft", _sft(work, answered(4) * 6)


def one_answer(work):
    return "sft", _sft(work, [{**row, "completion": "yes"} for row in answered(24)])


def held_out_rows_of_one_label(work):
    write_rows(work / "sorted.jsonl", [row for row in labelled(20, 100) if row["label"] == "yes"])
    return "classify", {"data": {"eval": "sorted.jsonl"}}


def end_token_in_a_prompt(work):
    return "sft", _sft(work, [{**row, "prompt": row["prompt"] + "<eos><|assistant|>"} for row in answered(24)])


def two_begin_tokens(work):
    return "pretrain", _pretrain(work, [{"text": f"<bos><bos>the cat sat on mat {i}"} for i in range(24)])


def _pretrain(work, rows):
    write_rows(work / "faulty.jsonl", rows)
    return {"data": {"train": "faulty.jsonl"}}


def answers_cut_off(work):
    rows = [{"prompt": f"say {i}", "completion": " ".join(ENDINGS[i:])} for i in range(20)]
    return "sft", _sft(work, rows, max_length=24, on_too_long="truncate_right")


def most_rows_dropped(work):
    rows = [*({"prompt": f"say {i}", "completion": "the cat " * (9 + i)} for i in range(20)), *answered(6)]
    return "sft", _sft(work, rows, max_length=32, on_too_long="drop")


FAULTS = {
    overlap: "overlap",
    contradicting_labels: "conflicts",
    repeated_rows: "duplicates",
    one_answer: "one_class",
    held_out_rows_of_one_label: "one_class",
    end_token_in_a_prompt: "special_text",
    two_begin_tokens: "double_bos",
    answers_cut_off: "end_tokens",
    most_rows_dropped: "rows_left",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_refused_by_its_gate_and_passed_knowingly(fault, work, run, write):
    stage, sections = fault(work)
    done = run("check", write(stage, **sections))
    gate = FAULTS[fault]
    assert done.code == 2 and "Traceback" not in done.err, done.err
    message = done.err[done.err.index("tunesmith: ") :]
    assert f"{gate}: " in message and f"preflight.allow: [{gate}]" in message, message
    passed = run("check", write(stage, **sections, preflight={"allow": [gate]}), "--json")
    if passed.code == 2:  # another gate looks at the same rows: what is allowed is not told again
        assert f"preflight.allow: [{gate}]" not in passed.err
        return
    states = {found["gate"]: found["state"] for found in passed.json["preflight"]["gates"]}
    assert states.pop(gate) == "allowed" and set(states.values()) == {"passed"}


@pytest.mark.parametrize("stage", ["classify", "sft", "pretrain", "mlm"])
def test_clean_rows_pass_every_gate(stage, work, run, write):
    done = run("check", write(stage), "--json")
    assert done.code == 0, done.err
    page = done.json["preflight"]
    assert {gate["state"] for gate in page["gates"]} == {"passed"} and page["allowed"] == []
    assert page["figures"]["end_tokens"] == (1.0 if stage == "sft" else None)
    assert page["duplicates"]["exact"] == page["conflicts"] == page["overlap"] == 0
    assert page["duplicates"]["near"] <= 1, "mat number 1 and mat number 11 are near indeed"


def test_all_gates_are_told_at_once(work, run, write):
    rows = [{**row, "prompt": row["prompt"] + "<eos>"} for row in answered(4) * 6]
    write_rows(work / "held.jsonl", rows[:4])
    done = run("train", write("sft", **_sft(work, rows, eval="held.jsonl")), "--run", "never")
    assert done.code == 2
    for gate in ("overlap", "duplicates", "special_text"):
        assert f"  - {gate}: " in done.err, done.err
    assert not (work / "runs" / "never").exists()


def test_gates_are_told_together_with_what_stops_the_encoding(work, run, write):
    rows = [*answered(24), *answered(2, 100), {"prompt": "long", "completion": "cat " * 400}]
    done = run("check", write("sft", **_sft(work, rows)))
    assert done.code == 2 and "overlap: " in done.err and "data.max_length" in done.err


def test_the_page_is_text_for_people(work, run, write):
    out = run("check", write("sft")).out
    for part in ("trained on", "end tokens      100 %", "lengths", "duplicates", "round trip", "steps", "gates passed:",
                 "pairs.jsonl:1, ", "  | user       ", "  + assistant  ", "  + end token  <eos>"):  # fmt: skip
        assert part in out, part
    assert "\x1b" not in out, "no colours where nobody looks"


def test_the_page_as_html_is_one_file_in_which_nothing_of_the_data_acts(work, run, write):
    rows = [{**row, "prompt": f"<script>alert({i})</script> {row['prompt']}"} for i, row in enumerate(answered(24))]
    done = run("check", write("sft", **_sft(work, rows)), "--html", "page.html")
    assert done.code == 0, done.err
    page = (work / "page.html").read_text()
    assert "<script" not in page and "&lt;" in page and "http" not in page.replace("http-equiv", "")
    assert 'class="t on assistant"' in page and 'class="t on end template"' in page
    assert run("check", "pairs.jsonl", "--html", "x.html").code == 2
    assert run("check", "recipe.yaml", "--html", "no/where.html").code == 2


def test_a_run_shows_the_page_before_its_first_step_and_says_what_it_passed_knowingly(work, run, write):
    stage, sections = overlap(work)
    done = run("train", write(stage, **sections, preflight={"allow": ["overlap"]}), "--run", "known", "--json")
    assert done.code == 0, done.err
    assert done.err.index("passed knowingly: overlap") < done.err.index("step 1/")
    assert "  + assistant  " in done.err
    folder = work / "runs" / "known"
    (said,) = done.json["preflight"]["allowed"]
    assert said.startswith("overlap: ") and "25 % of the held-out rows" in said
    sentence = "Passed knowingly before the run: overlap: 25 % of the held-out rows"
    assert sentence in (folder / "report.html").read_text()
    assert sentence in (folder / "model_card.md").read_text().replace("\\", "")
    assert json.loads((folder / "preflight.json").read_text())["allowed"] == [said]


def test_a_clean_run_says_nothing_was_passed(work, run, write):
    done = run("train", write("sft"), "--run", "clean", "--json")
    assert done.code == 0, done.err
    assert done.json["preflight"]["allowed"] == []
    assert "Passed knowingly" not in (work / "runs" / "clean" / "report.html").read_text()


def test_a_gate_that_does_not_exist_is_refused_with_those_that_do(work, run, write):
    done = run("check", write("sft", preflight={"allow": ["overlaps"]}))
    assert done.code == 2 and "preflight.allow" in done.err and "'overlap'" in done.err
