"""`tune.quantize` from beginning to end: train, resume bit for bit, eval, export, plan, compare, selftest."""

from __future__ import annotations

import pytest
import torch
from tests.cli.test_exit import comparable, same_run
from tests.cli.test_resume import start_and_cut
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith import api

TUNE = {"quantize": "4bit"}


def test_a_resumed_run_is_an_undisturbed_one(write, work):
    train = {"epochs": 2, "save_every": 2, "checkpoint_activations": True}
    recipe = write("sft", tune=TUNE | {"dropout": 0.2}, train=train)
    whole = api.train(recipe, run="whole")
    start_and_cut(recipe, "cut", 3)
    assert comparable(api.resume("cut")) == comparable(whole)
    same_run(work / "runs/whole", work / "runs/cut")
    saved = sum(path.stat().st_size for path in (work / "runs/whole/final").rglob("*.safetensors"))
    assert saved < 40_000, "no packed weight is in what is saved"


@pytest.mark.parametrize("stage", ["sft", "classify"])
def test_eval_and_export_are_of_the_model_that_was_trained(stage, write, run, work):
    train = {"epochs": 3, "learning_rate": 1e-2}
    assert run("train", write(stage, tune=TUNE, train=train), "--run", "packed").code == 0
    result = tunesmith.runs_show("packed")
    data = "pairs" if stage == "sft" else "labels"
    found = run("eval", "packed", "--data", f"{data}-eval.jsonl", "--json").json["metrics"]
    assert found["loss"]["value"] == pytest.approx(result["after"]["loss"]["value"], rel=1e-6)
    merged = run("export", "packed", "--to", "merged", "--format", "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["agreement"]["error"] < 1e-4 < merged.json["on_plain_base"]["error"]
    assert "in 4bit" in merged.err
    if stage == "sft":
        plain = AutoModelForCausalLM.from_pretrained(work / "merged")
        assert plain.dtype == torch.float32 and not hasattr(plain.model.layers[0].mlp.up_proj, "codes")
        again = run("eval", "merged", "--data", "pairs-eval.jsonl", "--stage", "sft", "--json").json["metrics"]["loss"]
        assert again["value"] == pytest.approx(result["after"]["loss"]["value"], rel=2e-2)
    adapter = run("export", "packed", "--to", "adapter", "--json")
    assert adapter.json["on_plain_base"] == merged.json["on_plain_base"]


def test_a_later_run_starts_from_the_function_that_was_trained(write, work):
    first = api.train(write("sft", tune=TUNE), run="first")
    second = api.train(write("sft", base="runs/first", tune={"quantize": "none"}), run="second")
    assert second["before"]["loss"]["value"] == pytest.approx(first["after"]["loss"]["value"], abs=1e-4)


def test_bits_for_another_method_are_refused(write, run):
    refused = run("check", write("sft", tune={"method": "full", "rank": None, "quantize": "4bit"}))
    assert refused.code == 2 and "`tune.quantize` does nothing with method full" in refused.err
    odd = run("check", write("sft", tune={"quantize": "5bit"}))
    assert odd.code == 2 and "4bit" in odd.err


def test_plan_has_a_line_for_it_and_selftest_passes(write, run):
    found = run("plan", write("sft", tune=TUNE), "--json").json
    rows = {row["method"]: row["states"] for row in found["methods"]}
    assert rows["4bit rank=16"] < rows["lora rank=16"] < rows["full"]
    plain = run("plan", write("sft"), "--json").json
    assert found["memory"]["weights"] < plain["memory"]["weights"]
    assert found["parameters"] == plain["parameters"]
    done = run("selftest", "recipe.yaml", "tune.quantize=4bit", "--json")
    assert done.code == 0, done.err
    assert done.json["passed"]


def test_compare_takes_4bit_as_a_way_to_tune(write, run):
    from tunesmith.recipe import load_recipe
    from tunesmith.stages.comparing import trials_of

    name = write("sft")
    trials = trials_of(name, (), tune=["full", "lora:rank=4", "4bit:rank=4", "8bit=2"], bases=(), grid=(), seeds=1)
    found = {trial.name: load_recipe(name, trial.overrides).recipe.tune for trial in trials}
    assert (found["4bit:rank=4"].method, found["4bit:rank=4"].quantize, found["4bit:rank=4"].rank) == (
        "lora",
        "4bit",
        4,
    )
    assert (found["8bit=2"].quantize, found["8bit=2"].rank, found["lora:rank=4"].quantize) == ("8bit", 2, None)
    assert run("compare", name, "--tune", "2bit").code == 2
