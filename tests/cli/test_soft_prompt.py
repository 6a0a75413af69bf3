"""Prompt and prefix tuning from beginning to end: check, plan, train, resume, eval, sample, export, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tests.cli.conftest import write_rows
from tests.cli.test_exit import comparable, same_run
from tests.cli.test_resume import start_and_cut
from tests.preferences import pairs as preferences
from tests.preferences import recipe
from tests.unit import rl

import tunesmith
from tunesmith import api
from tunesmith.stages import forgetting

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
    assert result["after"]["loss"]["value"] != result["before"]["loss"]["value"]
    seen = [json.loads(line)["loss"] for line in (work / "runs/whole/metrics.jsonl").read_text().splitlines()]
    assert np.mean(seen[-3:]) < np.mean(seen[:3]), seen
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
    whole = run("check", write("sft", tune=tune("PROMPT_TUNING", num_virtual_tokens=600)))
    assert whole.code == 2 and "tune.peft.num_virtual_tokens is 600" in whole.err and "no room for a text" in whole.err


def test_before_and_the_baselines_are_of_the_base_and_an_adapter_that_goes_on_is_its_own_start(write, work, run):
    generate = {"evaluate": {"generate": {"max_tokens": 4, "examples": 4}, "baselines": ["zero_shot", "few_shot"]}}
    results = {"lora": api.train(write("sft", **generate), run="lora")}
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        results[kind] = api.train(write("sft", tune=tune(kind), **generate), run=kind.lower())
    wanted = results.pop("lora")
    for result in results.values():
        for one, other in ((result, wanted), (result["probe"], wanted["probe"])):
            for name, estimate in other["before"].items():
                assert one["before"][name]["value"] == pytest.approx(estimate["value"], rel=1e-5), name
        for title, entry in wanted["baselines"].items():
            for name, estimate in entry["metrics"].items():
                found = result["baselines"][title]["metrics"][name]["value"]
                assert found == pytest.approx(estimate["value"], rel=1e-5), (title, name)
        assert result["after"]["loss"]["value"] != pytest.approx(result["before"]["loss"]["value"], rel=1e-3)
    assert run("export", "prompt_tuning", "--to", "adapter", "--format", "adapter").code == 0
    again = api.train(write("sft", tune={**NONE, "method": "lora", "adapter": "adapter"}), run="again")
    assert again["before"]["loss"]["value"] == pytest.approx(
        results["PROMPT_TUNING"]["after"]["loss"]["value"], rel=1e-5
    )


@pytest.mark.parametrize("stage", ["sft", "classify"])
def test_forgetting_is_against_the_base_and_a_classifier_answers_text_behind_its_prompt(stage, write, work, run):
    write_rows(work / "general.jsonl", [{"text": "the cat sat on a mat and was good"}] * 3)
    forget = {"probe": "general.jsonl", "at_most": "0%", "on_exceed": "go_on"}
    found = api.train(write(stage, base="llama", forget=forget), run="lora")["forget"]["probes"]["probe"]["before"]
    done = run("train", write(stage, base="llama", tune=tune("PROMPT_TUNING"), forget=forget), "--run", "p", "--json")
    assert done.code == 0, done.err
    kept = done.json["forget"]
    before = kept["probes"]["probe"]["before"]["loss"]["value"]
    assert before == pytest.approx(found["loss"]["value"], rel=1e-5)
    assert kept["probes"]["probe"]["after"]["loss"]["value"] != pytest.approx(before, rel=1e-4)
    assert not kept["start_is_base"]
    lost = {**kept, "base_kept": True, "forgetting": 0.5}
    assert "kept as it was drawn, with which it is +50.00 %" in forgetting.verdict(lost)
    assert "the base is kept as it was" in forgetting.verdict({**lost, "start_is_base": True})


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_the_reference_of_preferences_is_the_base(kind, work, run):
    write_rows(work / "prefs.jsonl", preferences(12))
    write_rows(work / "prefs-eval.jsonl", preferences(6, 100))
    data = {"train": "prefs.jsonl", "eval": "prefs-eval.jsonl"}

    def settings(method):
        return recipe("dpo", base="llama", data=data, tune=method)

    lora = api.train(settings({"method": "lora", "rank": 2}), run="lora")
    result = api.train(settings({k: v for k, v in tune(kind).items() if v is not None}), run="whole")
    for name in ("loss", "accuracy", "margin"):
        assert result["before"][name]["value"] == pytest.approx(lora["before"][name]["value"], abs=1e-5)
    columns = [np.load(path) for path in sorted((work / "cache/reference").glob("*.npy"))]
    assert len(columns) == 4
    for column in columns:
        assert sum(c.shape == column.shape and np.allclose(c, column, atol=1e-4) for c in columns) == 2
    found = api.evaluate("whole", "prefs-eval.jsonl")["metrics"]
    assert found["margin"]["value"] == pytest.approx(result["after"]["margin"]["value"], abs=1e-5)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_start_of_rewarded_policies_is_the_base(stage, tmp_path):
    settings = rl.recipe(tmp_path, stage, tune={k: v for k, v in tune("PROMPT_TUNING").items() if v is not None})
    settings[stage] = {**settings[stage], "kl_coef": 0.02}
    lora = rl.train(tmp_path, {**settings, "tune": {"method": "lora", "rank": 2}}, "lora")
    whole, cut = rl.train(tmp_path, settings, "whole"), rl.train(tmp_path, settings, "cut", die_at=3)
    api.resume(str(cut))
    assert rl.weights(cut) == rl.weights(whole) and rl.lines(cut) == rl.lines(whole)
    before = rl.result(whole)["before"]
    assert before["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert before["reward"]["value"] == rl.result(lora)["before"]["reward"]["value"]
    assert abs(rl.lines(whole)[0]["kl"]) > 1e-3, "the drawn prompt is far from its base"


def test_a_stage_behind_one_is_refused_before_the_first_step(work, run):
    soft = {"method": "peft", "peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}}
    stages = [
        {"stage": "pretrain", "data": {"train": "texts.jsonl"}, "tune": soft},
        {"stage": "sft", "data": {"train": "pairs.jsonl"}},
    ]
    (work / "chain.yaml").write_text(yaml.safe_dump({"base": "llama", "stages": stages}))
    done = run("check", "chain.yaml")
    assert done.code == 2 and "stage 2-sft starts from 1-pretrain, whose soft prompt cannot be merged" in done.err
