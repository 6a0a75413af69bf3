"""`train --resume` gives the run that was never cut, byte for byte; changed inputs are refused by name."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tests.cli.conftest import answered, recipe_for, texts, write_rows
from tests.cli.test_exit import comparable, same_run

from tunesmith import api
from tunesmith.errors import RunError


class Cut(Exception):
    """Stands for the process dying."""


def cut_after(step):
    def show(report):
        if report.step == step:
            raise Cut

    return show


def start_and_cut(recipe, name, step):
    with pytest.raises(Cut):
        api.train(recipe, run=name, show=cut_after(step))


def gz_texts(work):
    with gzip.open(work / "long.jsonl.gz", "wt") as file:
        for row in texts(24):
            file.write(json.dumps({"text": row["text"] * 30}) + "\n")


SETTINGS = {
    "in a later epoch": ("sft", {}, {"epochs": 2, "save_every": 2}, 5),
    "from the very beginning": ("mlm", {}, {"epochs": 2}, 2),
    "split rows of a gzip file": (
        "pretrain",
        {"train": "long.jsonl.gz", "on_too_long": "split", "max_length": 64},
        {"epochs": 2, "save_every": 2},
        5,
    ),
    "with dropout, accumulation and a best checkpoint": (
        "classify",
        {},
        {"epochs": 4, "eval_every": 2, "save_every": 1, "micro_batch_tokens": 40, "select_by": "loss", "keep": 1},
        7,
    ),
    "in the first epoch, in bfloat16": ("sft", {}, {"epochs": 2, "save_every": 1}, 2),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_equals_undisturbed(name, write, work):
    stage, data, train, step = SETTINGS[name]
    gz_texts(work)
    precision = "bfloat16" if "bfloat16" in name else "float32"
    recipe = write(stage, data=data, train=train, tune={"dropout": 0.2}, precision=precision)
    whole = api.train(recipe, run="whole")
    start_and_cut(recipe, "cut", step)
    resumed = api.resume("cut")
    same_run(work / "runs/whole", work / "runs/cut")
    assert comparable(resumed) == comparable(whole)
    assert api.resume("cut") == resumed, "a finished run gives its result again"


def test_resumed_twice(write, work):
    recipe = write("sft", train={"epochs": 4, "save_every": 1})
    whole = api.train(recipe, run="whole")
    start_and_cut(recipe, "cut", 3)
    with pytest.raises(Cut):
        api.resume("cut", show=cut_after(7))
    assert comparable(api.resume("cut")) == comparable(whole)
    same_run(work / "runs/whole", work / "runs/cut")


def test_the_base_is_measured_once(cut):
    kept = (cut / "runs/cut/before.json").read_bytes()
    said = []
    api.resume("cut", say=said.append)
    assert (cut / "runs/cut/before.json").read_bytes() == kept
    assert not any(line.startswith("before:") for line in said)


def test_a_run_that_died_after_its_last_weights_is_completed(write, work):
    recipe = write("classify", train={"epochs": 1})
    whole = api.train(recipe, run="whole")
    shutil.copytree(work / "runs/whole", work / "runs/died")
    for name in ("result.json", "report.html", "model_card.md", "samples.jsonl"):
        (work / "runs/died" / name).unlink()
    assert comparable(api.resume("died")) == comparable(whole)
    (work / "runs/died/report.html").unlink()
    api.resume("died")
    assert (work / "runs/died/report.html").is_file(), "pages are made again when only they are missing"


def test_a_run_that_stopped_early_does_not_go_on(write, work):
    train = {"epochs": 20, "eval_every": 1, "learning_rate": 1e-9, "early_stopping": {"patience": 2}}
    recipe = write("classify", train=train | {"select_by": "accuracy"})
    whole = api.train(recipe, run="whole")
    lines = (work / "runs/whole/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3, "no better at steps 2 and 3, so it stops there"
    assert whole["best_step"] == 1
    shutil.copytree(work / "runs/whole", work / "runs/died")
    (work / "runs/died/result.json").unlink()
    assert comparable(api.resume("died")) == comparable(whole)


def test_a_run_goes_on_with_the_precision_it_began_with(write, work, monkeypatch):
    from tunesmith.plan import hardware

    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    recipe = write("sft", precision="auto", train={"epochs": 2, "save_every": 1})
    start_and_cut(recipe, "cut", 2)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    api.resume("cut")
    assert json.loads((work / "runs/cut/environment.json").read_text())["precision"] == "float32"


def edit_recipe(old, new):
    def change(work):
        path = work / "runs/cut/recipe.yaml"
        assert old in path.read_text(), path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def edit_data(work):
    with open(work / "pairs.jsonl", "a") as file:
        file.write('{"prompt": "one more?", "completion": "yes"}\n')


def edit_eval(work):
    with open(work / "pairs-eval.jsonl", "a") as file:
        file.write('{"prompt": "one more of those?", "completion": "yes"}\n')


def own_base(work):
    if (work / "llama").is_symlink():
        target = (work / "llama").resolve()
        (work / "llama").unlink()
        shutil.copytree(target, work / "llama")


def edit_weights(work):
    own_base(work)
    tensors = load_file(work / "llama/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, work / "llama/model.safetensors", metadata={"format": "pt"})


def edit_tokenizer(work):
    own_base(work)
    path = work / "llama/tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    path.write_text(json.dumps(rules))


CHANGES = {
    "training samples": edit_data,
    "held-out samples": edit_eval,
    "base weights": edit_weights,
    "tokenizer": edit_tokenizer,
    "tune.rank": edit_recipe("rank: 2", "rank: 4"),
    "seed": edit_recipe("seed: 42", "seed: 43"),
    "train.batch_examples": edit_recipe("batch_examples: 8", "batch_examples: 4"),
    "train.learning_rate": edit_recipe("learning_rate: 0.001", "learning_rate: 0.002"),
    "precision": edit_recipe("precision: float32", "precision: bfloat16"),
    "data.max_length": edit_recipe("data:\n", "data:\n  max_length: 200\n"),
    "train.optimizer": edit_recipe("optimizer: adamw", "optimizer: sgd"),
    "tune.alpha": edit_recipe("alpha:", "alpha: 9.0 #"),
}


@pytest.fixture(scope="module")
def cut_once(bases, tmp_path_factory):
    """The run `cut`, made once: its folder is copied for each test."""
    folder = tmp_path_factory.mktemp("cut")
    (folder / "llama").symlink_to(bases / "llama")
    write_rows(folder / "pairs.jsonl", answered(24))
    write_rows(folder / "pairs-eval.jsonl", answered(8, 100))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_for("sft", train={"epochs": 2, "save_every": 1})))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        start_and_cut("recipe.yaml", "cut", 3)
    return folder


@pytest.fixture
def cut(cut_once, work):
    shutil.copytree(cut_once / "runs", work / "runs")
    path = work / "runs/cut/inputs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe_folder": str(work)}))
    return work


def test_a_run_whose_project_has_moved_goes_on(cut, run):
    assert run("train", "--resume", "cut").code == 0


@pytest.mark.parametrize("field", CHANGES)
def test_changed_inputs_are_refused_by_name(field, cut, run):
    CHANGES[field](cut)
    saved = sorted((cut / "runs/cut/checkpoints").iterdir())
    done = run("train", "--resume", "cut")
    assert done.code == 2 and "Traceback" not in done.err
    message = done.err[done.err.index("tunesmith: ") :]
    assert f"{field}: was " in message, message
    assert sorted((cut / "runs/cut/checkpoints").iterdir()) == saved


def test_a_damaged_checkpoint_is_passed_over_aloud(cut, run):
    whole = cut / "runs" / "whole"
    shutil.copytree(cut / "runs/cut", whole)
    newest = max((cut / "runs/cut/checkpoints").glob("step_*"))
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    done = run("train", "--resume", "cut", "--json")
    assert done.code == 0 and "damaged" in done.err and newest.name in done.err
    assert comparable(done.json) == comparable(api.resume("whole"))
    same_run(cut / "runs/cut", whole)


def test_a_planted_pickle_beside_a_checkpoint_is_never_opened(cut, run):
    for folder in (cut / "runs/cut/checkpoints").glob("step_*"):
        (folder / "optimizer.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    assert run("train", "--resume", "cut").code == 0
    assert not (cut / "pwned").exists()


def test_an_unfinished_run_says_how_to_go_on(cut):
    for use in (
        lambda: api.predict("cut", ["x"]), lambda: api.evaluate("cut", "pairs.jsonl"), lambda: api.export("cut", "out")
    ):  # fmt: skip
        with pytest.raises(RunError, match="train --resume"):
            use()
    assert api.runs_show("cut")["finished"] is False
