"""A chain hands on exactly what a stage gave, runs nothing twice, and says what each stage did to the others."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.chains import chain, make_files

from tunesmith import api
from tunesmith.errors import Interrupted, RecipeError, RunError
from tunesmith.evaluate.chain_report import render
from tunesmith.evaluate.lineage import broken_links, tree
from tunesmith.export.verify import logits_of
from tunesmith.model.load import load_backbone
from tunesmith.rundir import RunDir
from tunesmith.stages.finals import open_tuned
from tunesmith.stages.from_run import content, model_folder

EVIL = "<script>alert(1)</script>"


PROBES = [[1, 20, 40, 60, 80], [5, 9, 100]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, result) of one whole chain: pretrain in full, sft and classify by LoRA."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(make_files(folder))
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        yield folder, api.train(chain())


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of the whole chain to change things in."""
    shutil.copytree(made[0], tmp_path / "copy", symlinks=True)
    for path in (tmp_path / "copy").glob("runs/**/*.*"):
        if path.name in ("recipe.yaml", "inputs.json", "chain.json"):
            path.write_text(path.read_text().replace(str(made[0]), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "copy" / "cache"))
    recipe = chain()
    return tmp_path / "copy", recipe


def lineage(folder):
    return json.loads((folder / "runs/chain/lineage.json").read_text())


def test_every_stage_starts_from_what_the_one_before_gave(made):
    folder, result = made
    assert result["stages"] == ["1-pretrain", "2-sft", "3-classify"] and result["cached"] == []
    found = lineage(folder)
    first, second, third = found["stages"]
    assert found["problems"] == []
    assert second["starts_from"]["content"] == first["gives"] == content(RunDir(folder / "runs/chain/1-pretrain"))
    assert third["starts_from"]["content"] == second["gives"]
    assert first["starts_from"]["content"] == found["roots"][0]["content"]
    assert len({entry["starts_from"]["tokenizer"] for entry in found["stages"]}) == 1
    assert second["starts_from"]["how"] == "its weights" and "merged" in third["starts_from"]["how"]


def test_a_broken_link_is_found():
    entries = [
        {"name": "1-sft", "gives": "aaa", "starts_from": {"stage": None, "content": "base"}, "rewards": []},
        {"name": "2-dpo", "gives": "bbb", "starts_from": {"stage": "1-sft", "content": "aaa"}, "rewards": []},
    ]
    assert broken_links(entries) == []
    entries[0]["gives"] = "changed"
    assert "2-dpo was made from 1-sft" in broken_links(entries)[0]


def test_the_next_stage_begins_with_the_model_the_last_one_ended_with(made):
    run = RunDir(made[0] / "runs/chain/2-sft")
    merged = load_backbone(model_folder(run.path), "causal")
    expected = logits_of(open_tuned(run).backbone, PROBES)
    for ours, theirs in zip(logits_of(merged, PROBES), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    plain = load_backbone(made[0] / "tiny", "causal")
    assert not torch.allclose(logits_of(plain, PROBES)[0], expected[0], atol=1e-3)  # control


def test_the_probe_and_the_tasks_of_earlier_stages_are_measured_after_each(made):
    folder, _ = made
    first, second, third = lineage(folder)["stages"]
    assert first["probe"]["after"] == pytest.approx(second["probe"]["before"], abs=1e-6)
    change = second["probe"]["change"]["value"]
    assert change == pytest.approx(second["probe"]["after"] - second["probe"]["before"])
    assert second["probe"]["since_base"] == pytest.approx(second["probe"]["after"] - first["probe"]["before"])
    assert third["probe"] is None and third["earlier_tasks"] == {}
    asked = second["earlier_tasks"]["1-pretrain"]["loss"]
    alone = api.evaluate(folder / "runs/chain/1-pretrain", folder / "texts-eval.jsonl")["metrics"]["loss"]
    assert asked["n"] == alone["n"] == 8 and asked["value"] != alone["value"]
    base = model_folder(folder / "runs/chain/2-sft")
    again = api.evaluate(base, folder / "texts-eval.jsonl", stage="pretrain")["metrics"]["loss"]
    assert asked["value"] == pytest.approx(again["value"], abs=5e-3)  # in bfloat16 where there is any
    row = next(r for r in lineage(folder)["tasks"] if (r["task"], r["metric"]) == ("1-pretrain", "loss"))
    assert set(row["after"]) == {"1-pretrain", "2-sft"}


def test_the_tree_shows_every_stage_under_its_start(made):
    lines = made[1]["tree"]
    assert lines[0] == "chain" and lines[1].startswith("tiny  [")
    assert [line.index(name) for line, name in zip(lines[2:], made[1]["stages"], strict=True)] == [3, 6, 9]
    assert "outside the task" in lines[3] and "outside the task" not in lines[4]


def test_nothing_is_trained_twice(work):
    folder, recipe = work
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/chain/*/metrics.jsonl")}
    assert api.train(recipe)["cached"] == ["1-pretrain", "2-sft", "3-classify"]
    assert {p: p.stat().st_mtime_ns for p in folder.glob("runs/chain/*/metrics.jsonl")} == before


@pytest.mark.parametrize("number, cached", [(3, ["1-pretrain", "2-sft"]), (2, ["1-pretrain"]), (1, [])])
def test_a_changed_stage_reruns_itself_and_what_stands_on_it(work, number, cached):
    _, recipe = work
    assert api.train(recipe, [f"stages.{number}.train.learning_rate=1e-2"])["cached"] == cached


def test_changed_data_and_a_changed_base_rerun_and_what_was_there_comes_back(work):
    folder, recipe = work
    pairs = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").write_text(pairs.replace("good", "fine"))
    assert api.train(recipe)["cached"] == ["1-pretrain"]
    assert len(list((folder / "runs/chain/replaced").iterdir())) == 2
    (folder / "pairs.jsonl").write_text(pairs)
    assert api.train(recipe)["cached"] == ["1-pretrain", "2-sft", "3-classify"]


def test_an_order_of_lines_or_a_name_that_decides_nothing_reruns_nothing(work):
    folder, recipe = work
    (folder / "other.jsonl").write_bytes((folder / "labels.jsonl").read_bytes())
    changed = {**recipe, "threads": torch.get_num_threads()}
    assert api.train(changed, ["stages.3.data.train=other.jsonl"])["cached"] == ["1-pretrain", "2-sft", "3-classify"]


def test_a_stopped_chain_goes_on_to_the_same_bytes(work):
    folder, recipe = work

    def cut_after(stages):
        def show(report):
            ended.extend([report.step] if report.step == 3 else [])
            if report.step == 2 and len(ended) == stages:
                raise Interrupted("stopped by SIGINT; go on with `tunesmith train --resume RUN`")

        ended = []
        return show

    for name in ("1-pretrain", "2-sft", "3-classify"):
        with pytest.raises(Interrupted, match=rf"chain cut, stage {name}.*--resume runs/cut`"):
            if name == "1-pretrain":
                api.train(recipe, ["train.save_every=1"], run="cut", show=cut_after(0))
            else:
                api.resume("cut", show=cut_after(1))
    assert api.runs_show("cut")["stages"]["3-classify"] == "under way"
    api.resume("cut")
    api.train(recipe, ["train.save_every=1"], run="whole")
    for name in ("1-pretrain", "2-sft", "3-classify"):
        final = f"{name}/final/step_000003/tensors.safetensors"
        assert (folder / "runs/cut" / final).read_bytes() == (folder / "runs/whole" / final).read_bytes()


def test_resuming_refuses_changed_inputs_of_a_finished_stage(work):
    folder, _ = work
    (folder / "runs/chain/result.json").unlink()
    (folder / "texts.jsonl").write_text((folder / "texts.jsonl").read_text().replace("cat", "dog"))
    with pytest.raises(RunError, match=r"stage 1-pretrain: .*other inputs"):
        api.resume("chain")


def test_a_run_is_a_base_for_any_recipe(work):
    folder, _ = work
    recipe = {
        "stage": "sft", "base": "runs/chain/2-sft", "precision": "float32", "run": "more",
        "data": {"train": "pairs.jsonl", "eval": "pairs-eval.jsonl"}, "train": {"steps": 2}, "tune": {"rank": 2},
    }  # fmt: skip
    result = api.train(recipe)
    given = RunDir(folder / "runs/chain/2-sft")
    assert result["base"]["content"] == content(given) and result["base"]["name"] == "chain/2-sft"
    ended = given.read_json("result")["after"]["loss"]["value"]
    assert result["before"]["loss"]["value"] == pytest.approx(ended, abs=1e-5)
    assert isinstance(api.chat("more", "two plus two"), str)


def test_a_chain_is_a_base_and_can_be_asked(work):
    found = api.predict("chain", ["cat mat good"])
    assert found[0]["answer"] in ("n", "y")
    assert model_folder(work[0] / "runs/chain").parent.parent.name == "3-classify"


def test_a_run_whose_base_was_trained_anew_is_refused(work):
    folder, recipe = work
    kept = folder / "kept"
    shutil.copytree(folder / "runs/chain/3-classify", kept)
    api.train(recipe, ["stages.1.train.steps=2"])
    kept_recipe = yaml.safe_load((kept / "recipe.yaml").read_text())
    kept_recipe["base"] = str(folder / "runs/chain/2-sft")
    (kept / "recipe.yaml").write_text(yaml.safe_dump(kept_recipe))
    with pytest.raises(RunError, match="is now another model"):
        api.predict(kept, ["cat"])


def test_an_unfinished_run_is_no_base(work):
    folder, _ = work
    shutil.rmtree(folder / "runs/chain/2-sft/final")
    with pytest.raises(RunError, match="not finished"):
        model_folder(folder / "runs/chain/2-sft")


def test_the_report_says_it_all_and_escapes_everything(made):
    folder, _ = made
    page = (folder / "runs/chain/report.html").read_text()
    for said in ("Lineage", "Alignment tax", "after 2-sft", "Hand-offs", "1-pretrain"):
        assert said in page
    found = json.loads(json.dumps(lineage(folder)).replace("tiny", EVIL))
    found["stages"][1]["notes"] = [EVIL]
    assert EVIL in "\n".join(tree(found))
    assert EVIL not in render(found, folder / "runs/chain")


def test_a_chain_in_a_file_is_named_after_it(work):
    folder, recipe = work
    del recipe["run"]
    (folder / "review.yaml").write_text(yaml.safe_dump(recipe))
    shutil.move(folder / "runs/chain", folder / "runs/review")
    found = api.check("review.yaml")["chain"]
    assert found["2-sft"]["starts_from"] == "1-pretrain"
    names = {row["run"]: row for row in api.runs_list()}
    assert names["review"]["stage"] == "chain"


def test_missing_data_of_the_last_stage_stops_before_the_first(work):
    folder, recipe = work
    recipe["stages"][1]["data"]["train"] = "nowhere.jsonl"
    recipe["stages"][2]["tune"] = {"targets": ["no_such_layer"]}
    with pytest.raises(RecipeError) as error:
        api.train(recipe, run="never")
    assert "stage 2-sft: nowhere.jsonl" in str(error.value) and "stage 3-classify" in str(error.value)
    assert not (folder / "runs/never").exists()


def test_weights_of_an_adapter_run_are_stored_whole(made):
    folder, _ = made
    merged = load_file(model_folder(folder / "runs/chain/2-sft") / "model.safetensors")
    assert all("lora" not in name for name in merged) and all(t.dtype == torch.float32 for t in merged.values())
