"""Prompt and prefix tuning from beginning to end: check, plan, train, resume, eval, sample, export, refusals."""

from __future__ import annotations

import pytest
import yaml
from safetensors.torch import load_file
from tests.cli.test_exit import comparable, same_run
from tests.cli.test_resume import start_and_cut

import tunesmith
from tunesmith import api

NONE = {"method": "peft", "rank": None, "alpha": None, "dropout": None, "targets": None}


def tune(kind: str, **options):
    return NONE | {"peft": {"peft_type": kind, "num_virtual_tokens": 4, **options}}


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_from_training_to_its_adapter(kind, write, run, work):
    recipe = write("sft", tune=tune(kind), train={"epochs": 2, "save_every": 2})
    whole = api.train(recipe, run="whole")
    start_and_cut(recipe, "cut", 3)
    assert comparable(api.resume("cut")) == comparable(whole)
    same_run(work / "runs/whole", work / "runs/cut")
    result = tunesmith.runs_show("whole")
    assert result["after"]["loss"]["value"] < result["before"]["loss"]["value"]
    found = run("eval", "whole", "--data", "pairs-eval.jsonl", "--json").json["metrics"]
    assert found["loss"]["value"] == pytest.approx(result["after"]["loss"]["value"], rel=1e-6)
    merged = run("export", "whole", "--to", "merged", "--format", "merged")
    assert merged.code == 2 and "cannot be merged" in merged.err and "--format adapter" in merged.err
    assert run("export", "whole", "--to", "adapter", "--format", "adapter").code == 0
    width = 32 if kind == "PROMPT_TUNING" else 2 * 2 * 16
    written = load_file(work / "adapter/adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in written.items()} == {"prompt_embeddings": (4, width)}
    planned = run("plan", recipe, "--json")
    assert planned.code == 0 and planned.json["trainable_parameters"] == 4 * width, planned.err


def test_a_limit_leaves_room_for_virtual_tokens_and_an_encoder_is_refused(write, run):
    long = run("check", write("sft", tune=tune("PROMPT_TUNING"), data={"max_length": 254}))
    assert long.code == 2 and "takes 252 tokens beside 4 virtual ones" in long.err
    encoder = run("train", write("mlm", tune=tune("PROMPT_TUNING")))
    assert encoder.code == 2 and "BertForMaskedLM is an encoder" in encoder.err


def test_a_stage_behind_one_is_refused_before_the_first_step(work, run):
    soft = {"method": "peft", "peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}}
    stages = [
        {"stage": "pretrain", "data": {"train": "texts.jsonl"}, "tune": soft},
        {"stage": "sft", "data": {"train": "pairs.jsonl"}},
    ]
    (work / "chain.yaml").write_text(yaml.safe_dump({"base": "llama", "stages": stages}))
    done = run("check", "chain.yaml")
    assert done.code == 2 and "stage 2-sft starts from 1-pretrain, whose soft prompt cannot be merged" in done.err
