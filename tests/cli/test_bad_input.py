"""Everything a user can get wrong: one message with what was found and what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest
import yaml
from tests.cli.conftest import answered, labelled, recipe_for, texts, write_rows
from tests.tiny import save_tiny, tiny_causal

from tunesmith.rundir import RunDir


def put(work, stage, **sections):
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(stage, **sections), sort_keys=False))


def text(work, old, new):
    path = work / "recipe.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def mistyped_key(work):
    put(work, "sft")
    text(work, "learning_rate", "lerning_rate")


def mistyped_section(work):
    put(work, "sft")
    text(work, "tune:", "tuen:")


def missing_base(work):
    put(work, "sft")
    text(work, "base: llama\n", "")


def missing_data(work):
    recipe = recipe_for("sft")
    del recipe["data"]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def wrong_type(work):
    put(work, "sft", train={"epochs": "three"})


def negative(work):
    put(work, "sft", train={"learning_rate": -0.1})


def yaml_broken(work):
    put(work, "sft")
    text(work, "stage: sft", "stage: [sft")


def unknown_stage(work):
    put(work, "sft")
    text(work, "stage: sft", "stage: stf")


def idle_key(work):
    put(work, "sft", tune={"layers": 2})


def encoder_for_sft(work):
    put(work, "sft")
    text(work, "base: llama", "base: bert")


def decoder_for_mlm(work):
    put(work, "mlm")
    text(work, "base: bert", "base: llama")


def no_such_target(work):
    put(work, "sft", tune={"targets": ["q_porj"]})


def no_such_method(work):
    put(work, "sft", tune={"method": "lorra"})


def no_such_base(work):
    put(work, "sft")
    text(work, "base: llama", "base: ./lama")


def hub_base_without_network(work):
    put(work, "sft")
    text(work, "base: llama", "base: some-owner/some-model")


def hub_data_without_network(work):
    put(work, "sft", data={"train": "some-owner/some-data:train"})


def no_such_device(work):
    put(work, "sft", device="cuda:7")


def no_data_file(work):
    put(work, "sft", data={"train": "pears.jsonl"})


def with_train(work, stage, content):
    (work / "train.jsonl").write_bytes(content)
    put(work, stage, data={"train": "train.jsonl"})


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def empty_file(work):
    with_train(work, "sft", b"")


def only_newlines(work):
    with_train(work, "sft", b"\n\n\n")


def broken_line_17(work):
    rows = lines(answered(24)).splitlines(keepends=True)
    rows[16] = rows[16][:20] + b"\n"
    with_train(work, "sft", b"".join(rows))


def latin_1(work):
    rows = lines(answered(24)).splitlines(keepends=True)
    rows[4] = b'{"prompt": "caf\xe9?", "completion": "yes"}\n'
    with_train(work, "sft", b"".join(rows))


def nul_bytes(work):
    rows = lines(answered(24)).splitlines(keepends=True)
    rows[4] = b'{"prompt": "a\x00b?", "completion": "yes"}\n'
    with_train(work, "sft", b"".join(rows))


def empty_answer(work):
    rows = answered(24)
    rows[6]["completion"] = "  "
    with_train(work, "sft", lines(rows))


def missing_answer(work):
    rows = answered(24)
    del rows[6]["completion"]
    with_train(work, "sft", lines(rows))


def wide_encoding(work):
    with_train(work, "sft", lines(answered(24)).decode().encode("utf-16"))


def pickle_given(work):
    (work / "rows.pkl").write_bytes(b"\x80\x04abc.")
    put(work, "sft", data={"train": "rows.pkl"})


def one_label(work):
    with_train(work, "classify", lines([{**row, "label": "yes"} for row in labelled(24)]))


def unseen_label(work):
    write_rows(work / "labels-eval.jsonl", [*labelled(8, 100), {"text": "a new one", "label": "perhaps"}])
    put(work, "classify")


def rows_too_long(work):
    rows = answered(24)
    rows[3]["completion"] = "word " * 400
    with_train(work, "sft", lines(rows))


def max_length_beyond_the_model(work):
    put(work, "sft", data={"max_length": 4096})


def eval_rows_in_train(work):
    write_rows(work / "pairs-eval.jsonl", answered(8, 3))
    put(work, "sft")


def template_without_its_column(work):
    put(work, "sft", data={"template": "Q: {question}\n\nA: {answer}"})


def adapter_of_another_base(work):
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(tiny_causal("llama", width=64), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(work / "adapter")
    put(work, "sft")
    text(work, "  method: lora\n  rank: 2", "  method: lora\n  adapter: adapter")


def pickled_base(work):
    (work / "pickled").mkdir()
    shutil.copy(work / "llama" / "config.json", work / "pickled")
    shutil.copy(work / "llama" / "tokenizer.json", work / "pickled")
    (work / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    put(work, "sft")
    text(work, "base: llama", "base: ./pickled")


def base_without_tokenizer(work):
    folder = save_tiny(tiny_causal("llama"), work / "mute")
    for path in folder.glob("*token*"):
        path.unlink()
    put(work, "sft")
    text(work, "base: llama", "base: ./mute")


def too_much_held_out(work):
    recipe = recipe_for("sft")
    recipe["data"] = {"train": "pairs.jsonl", "split": {"eval": 0.6, "test": 0.5}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def selecting_without_eval(work):
    recipe = recipe_for("sft", train={"select_by": "loss"})
    del recipe["data"]["eval"]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


CASES = {
    mistyped_key: ["recipe.yaml:", "lerning_rate", "did you mean `learning_rate`"],
    mistyped_section: ["tuen", "did you mean `tune`"],
    missing_base: ["`base` is missing", "folder or a hub id"],
    missing_data: ["`data` is missing"],
    wrong_type: ["recipe.yaml:", "train.epochs", "three"],
    negative: ["train.learning_rate", "-0.1", "greater than 0"],
    yaml_broken: ["recipe.yaml"],
    unknown_stage: ["stf", "did you mean `sft`"],
    idle_key: ["tune.layers", "last_layers"],
    encoder_for_sft: ["bert", "encoder", "mlm or classify"],
    decoder_for_mlm: ["llama", "pretrain, sft"],
    no_such_target: ["q_porj", "did you mean q_proj"],
    no_such_method: ["tune.method", "lorra"],
    no_such_base: ["lama", "llama"],
    hub_base_without_network: ["some-owner/some-model", "hf download"],
    hub_data_without_network: ["some-owner/some-data", "hf download"],
    no_such_device: ["cuda:7", "cpu"],
    no_data_file: ["pears.jsonl", "pairs.jsonl"],
    empty_file: ["train.jsonl", "empty"],
    only_newlines: ["train.jsonl"],
    broken_line_17: ["train.jsonl:17"],
    latin_1: ["train.jsonl:5", "UTF-8"],
    nul_bytes: ["train.jsonl:5"],
    empty_answer: ["train.jsonl:7", "empty"],
    missing_answer: ["train.jsonl:7", "completion"],
    wide_encoding: ["train.jsonl", "UTF-16"],
    pickle_given: ["rows.pkl", "pickle"],
    one_label: ["'yes'", "at least two"],
    unseen_label: ["perhaps", "no, yes"],
    rows_too_long: ["1 of 24", "256", "max_length", "truncate"],
    max_length_beyond_the_model: ["4096", "256"],
    eval_rows_in_train: ["pairs-eval.jsonl", "on_overlap"],
    template_without_its_column: ["question", "prompt"],
    adapter_of_another_base: ["adapter"],
    pickled_base: ["pytorch_model.bin", "safetensors"],
    base_without_tokenizer: ["tokenizer"],
    too_much_held_out: ["data.split"],
    selecting_without_eval: ["held-out rows"],
}


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(work, run):
    put(work, "sft")
    (work / "locked").mkdir()
    (work / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = run("train", "recipe.yaml", "--run", str(work / "locked" / "run"))
    assert done.code == 2 and "locked" in done.err and "--run" in done.err


@pytest.mark.parametrize("place", ["/proc/never", "file/run", "na\tme"])
def test_a_place_that_cannot_hold_a_run(place, work, run):
    put(work, "sft")
    (work / "file").write_text("")
    done = run("train", "recipe.yaml", "--run", place)
    assert done.code == 2 and "Traceback" not in done.err
    assert place.rpartition("/")[0] in done.err and place.partition("/")[2] in done.err


def test_a_second_run_in_the_same_folder_names_the_first(work, run):
    put(work, "sft")
    holder = RunDir(work / "runs" / "busy")
    holder.path.mkdir(parents=True)
    holder.lock()
    done = run("train", "recipe.yaml", "--run", "busy")
    holder.unlock()
    assert done.code == 2 and f"process {os.getpid()} on" in done.err and "another name" in done.err
    assert run("train", "recipe.yaml", "--run", "busy").code == 0, "the lock ends with its owner"
    again = run("train", "recipe.yaml", "--run", "busy")
    assert again.code == 2 and "already holds a run" in again.err and "--resume" in again.err


def test_two_real_processes_at_once_make_one_run(work):
    put(work, "pretrain", train={"epochs": None, "steps": 40})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tunesmith", "train", "recipe.yaml", "--run", "one"]
    both = [
        subprocess.Popen(
            command, cwd=work, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], messages
    assert (work / "runs" / "one" / "result.json").is_file()


def test_a_full_disk_is_said_before_the_first_step(work, run, monkeypatch):
    from tunesmith.engine import durable

    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    put(work, "sft")
    done = run("train", "recipe.yaml", "--run", "full")
    assert done.code == 74 and "1000 bytes are free" in done.err and "Traceback" not in done.err


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
