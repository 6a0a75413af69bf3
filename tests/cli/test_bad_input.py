"""Everything a user can get wrong: one message with what was found and what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import re
import time

import pytest
from tests.cli.bad_recipes import CASES, broken_line_17, lines, put, text
from tests.cli.conftest import texts


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's, while the adapter is made
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_message_exit_2_and_nothing_left(case, work, run):
    case(work)
    before = sorted(path.name for path in work.iterdir() if path.name != "cache")
    began = time.monotonic()
    done = run("train", "recipe.yaml", "--run", "never", "--json")
    assert done.code == 2, done.err
    assert done.out == "" and "Traceback" not in done.err
    message = done.err[done.err.index("tunesmith: ") :]
    for part in CASES[case]:
        assert part in message, message
    assert time.monotonic() - began < 60, "a network that is not there must not be waited for"
    left = [path.name for path in work.iterdir() if path.name not in ("cache", "runs")]
    assert sorted(left) == before
    assert not (work / "runs" / "never").exists()


def test_all_problems_come_at_once(work, run):
    put(work, "sft", train={"epochs": "three", "lerning_rate": 1, "batch_examples": 0})
    done = run("check", "recipe.yaml")
    assert done.code == 2
    assert all(part in done.err for part in ("train.epochs", "lerning_rate", "train.batch_examples"))
    assert len(re.findall(r"recipe\.yaml:\d+", done.err)) == 3


def test_a_bom_is_no_problem(work, run):
    (work / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(texts(24)))
    put(work, "pretrain", data={"train": "train.jsonl"})
    assert run("train", "recipe.yaml", "--run", "fine").code == 0


def test_bad_rows_may_be_left_out_knowingly_and_are_counted(work, run):
    broken_line_17(work)
    done = run("train", "recipe.yaml", "data.on_bad_row=skip", "--run", "fine", "--json")
    assert done.code == 0, done.err
    inputs = json.loads((work / "runs/fine/inputs.json").read_text())
    assert inputs["data"]["train"]["samples"] == 23
    assert "left out" in done.err or "skipped" in done.err


def test_a_loss_that_is_not_finite_ends_with_3_and_names_the_rows(work, run):
    put(work, "sft", tune={"method": "full"}, train={"learning_rate": 10.0, "optimizer": "sgd", "clip_norm": None,
                                                     "epochs": None, "steps": 40})  # fmt: skip
    text(work, "  rank: 2\n", "")
    done = run("train", "recipe.yaml", "--run", "wild")
    assert done.code == 3, done.err
    assert "pairs.jsonl:" in done.err and "learning_rate" in done.err and "Traceback" not in done.err
    kept = sorted((work / "runs/wild/checkpoints").glob("step_*/manifest.json"))
    assert kept, "the last good checkpoint stands"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["train"], ["RECIPE.yaml", "--resume"]),
        (["train", "nothing.yaml"], ["nothing.yaml"]),
        (["train", "--resume", "nobody"], ["no run nobody", "runs/"]),
        (["eval", "nobody", "--data", "pairs.jsonl"], ["nobody"]),
        (["eval", "./llama"], ["--data"]),
        (["chat", "nobody", "--prompt", "x"], ["no run nobody"]),
        (["predict", "nobody", "x"], ["no run nobody"]),
        (["export", "nobody", "--to", "out"], ["no run nobody"]),
        (["runs", "show", "nobody"], ["no run nobody"]),
        (["runs", "diff", "a", "b"], ["no run a"]),
        (["check", "nothing.jsonl"], ["nothing.jsonl"]),
        (["trian", "x"], ["trian"]),
        (["train", "a.yaml", "--jsn"], ["--jsn"]),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_a_wrong_command_line(args, parts, work, run):
    done = run(*args)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    for part in parts:
        assert part in done.err
