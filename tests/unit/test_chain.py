"""A chain hands on exactly what a stage gave, runs nothing twice, and says what each stage did to the others."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.chains import chain, make_files, stage

from tunesmith import api
from tunesmith.errors import Interrupted, RecipeError, RunError
from tunesmith.evaluate.chain_report import render
from tunesmith.evaluate.lineage import broken_links, tree
from tunesmith.export.verify import logits_of
from tunesmith.model.load import load_backbone
from tunesmith.recipe_chain import load_chain, load_saved
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


def full(*stages, **shared):
    return load_chain(chain(*stages, **shared))


def test_settings_are_shared_and_the_stages_own_win():
    found = full(
        stage("sft", "pairs", train={"steps": 9}),
        stage("reward", "preferences", tune={"method": "full"}),
        stage("ppo", "prompts", name="policy", ppo={"clip": 0.3}),
        train={"epochs": 2, "learning_rate": 1e-3},
        ppo={"kl_coef": 0.5},
    )
    sft, reward, ppo = (s.resolved.recipe for s in found.stages)
    assert [s.name for s in found.stages] == ["1-sft", "2-reward", "3-policy"]
    assert (sft.train.steps, sft.train.epochs, reward.train.epochs) == (9, None, 2.0)
    assert (sft.tune.rank, reward.tune.rank) == (2, None) and reward.tune.method == "full"
    assert ppo.ppo is not None and (ppo.ppo.clip, ppo.ppo.kl_coef) == (0.3, 0.5)
    assert [s.parent for s in found.stages] == [None, 0, 0] and found.stages[2].rewards == (1,)


def test_the_prompt_template_is_handed_on():
    template = "Q: {prompt} A: {completion}"
    sft = stage("sft", "pairs")
    sft["data"]["template"] = template
    plain = stage("dpo", "preferences", **{"from": "base"})
    found = full(sft, stage("dpo", "preferences"), plain)
    assert [s.resolved.recipe.data.template for s in found.stages] == [template, template, None]
    assert found.stages[1].resolved.origins["data.template"] == "from 1-sft"


def test_skipping_sft_is_allowed_and_recorded():
    found = full(stage("reward", "preferences"), stage("ppo", "prompts"))
    assert [s.parent for s in found.stages] == [None, None] and found.stages[1].rewards == (0,)
    assert all("no sft stage" in s.notes[0] for s in found.stages)
    assert full().stages[0].notes == ()


def test_a_saved_chain_is_the_same_chain(tmp_path):
    found = full(stage("sft", "pairs"), stage("reward", "preferences"), stage("ppo", "prompts", name="p"))
    (tmp_path / "saved.yaml").write_text(found.to_yaml())
    for again in (load_saved(tmp_path / "saved.yaml", found.folder), load_chain(tmp_path / "saved.yaml")):
        assert [s.resolved.recipe for s in again.stages] == [s.resolved.recipe for s in found.stages]
        assert [(s.name, s.parent, s.rewards) for s in again.stages] == [
            (s.name, s.parent, s.rewards) for s in found.stages
        ]


def test_overrides_reach_one_stage_or_all():
    overrides = ["stages.2.train.steps=7", "stages.first.tune.rank=4", "train.learning_rate=1e-2"]
    found = load_chain(chain(stage("sft", "pairs", name="first"), stage("sft", "pairs")), overrides)
    one, two = (s.resolved.recipe for s in found.stages)
    assert (one.train.steps, two.train.steps, one.tune.rank, two.tune.rank) == (3, 7, 4, 2)
    assert one.train.learning_rate == two.train.learning_rate == 1e-2


BAD = """\
base: tiny
train: {stps: 3}
grpo: {group: 4}
stages:
  - stage: classify
    data: {train: labels.jsonl}
  - stage: sft
    data: {trian: pairs.jsonl}
    tune: {method: full, rank: 4}
  - stage: ppo
    data: {train: prompts.jsonl}
    from: 9-nothing
"""


def test_all_problems_of_all_stages_are_told_at_once_with_their_lines(tmp_path):
    (tmp_path / "bad.yaml").write_text(BAD)
    with pytest.raises(RecipeError) as error:
        load_chain(tmp_path / "bad.yaml", ["stages.5.train.steps=1"])
    text = str(error.value)
    for said in (
        "bad.yaml:2: there is no key `train.stps`; did you mean `steps`?",
        "bad.yaml:3: `grpo.group` does nothing in any stage",
        "bad.yaml:7: stage 2-sft cannot start from 1-classify",
        "bad.yaml:8: there is no key `data.trian`; did you mean `train`?",
        "bad.yaml:12: `from: 9-nothing` is not one earlier stage",
        "stage 3-ppo has no reward",
        "`stages.5.train.steps=1`: there is no such stage",
    ):
        assert said in text
    assert text.count("train.stps") == 3, "once for each stage it is shared by"


@pytest.mark.parametrize(
    "stages, said",
    [
        ([], "is a list"),
        ([{"data": {}}], "does not name its `stage`"),
        ([stage("stf", "pairs")], "did you mean `sft`"),
        ([stage("pretrain", "texts"), stage("mlm", "texts")], "cannot start from 1-pretrain"),
        ([stage("mlm", "texts"), stage("sft", "pairs")], "cannot start from 1-mlm"),
        ([stage("sft", "pairs"), stage("ppo", "prompts")], "put a reward stage before it"),
        ([stage("ppo", "prompts", reward={"run": "reward"}), stage("reward", "preferences")], "before 1-ppo"),
        ([stage("sft", "pairs", run="x")], "names the whole chain"),
        ([stage("sft", "pairs", name="a/b")], "is no name"),
        ([stage("sft", "pairs"), stage("dpo", "preferences", base="tiny", **{"from": "sft"})], "both say where"),
        ([stage("sft", "pairs", tune={"method": "full", "rank": 4})], "`tune.rank` does nothing"),
    ],
)
def test_chains_that_cannot_work(stages, said):
    recipe = {**chain(), "stages": stages}
    with pytest.raises(RecipeError, match=said.replace("`", ".")):
        load_chain(recipe)


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


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """(folder, result) of InstructGPT's three steps on the tiny base."""
    folder = tmp_path_factory.mktemp("aligned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(make_files(folder))
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        policy = stage("ppo", "prompts", sampling={"max_tokens": 4}, ppo={"rollouts": 8, "minibatches": 1})
        yield folder, api.train(chain(stage("sft", "pairs"), stage("reward", "preferences"), policy))


def test_a_policy_starts_from_sft_and_is_paid_by_the_reward_model(aligned):
    folder, result = aligned
    sft, reward, ppo = lineage(folder)["stages"]
    assert ppo["starts_from"]["stage"] == reward["starts_from"]["stage"] == "1-sft"
    assert ppo["rewards"] == [{"stage": "2-reward", "content": reward["gives"]}] and reward["rewards"] == []
    assert ppo["probe"]["before"] == pytest.approx(sft["probe"]["after"], abs=1e-5)
    assert reward["probe"] is None and set(ppo["earlier_tasks"]) == {"1-sft"}
    assert "paid by 2-reward" in result["tree"][-1] and lineage(folder)["problems"] == []
    assert ppo["own_task"]["metric"] == "reward"


def test_a_judge_that_was_the_reward_is_named_as_such(aligned):
    found = {}
    for other in ("reward:chain/2-reward", "judge.py:longer"):
        (aligned[0] / "judge.py").write_text(
            "def longer(prompts, completions):\n    return list(map(len, completions))\n"
        )
        to = aligned[0] / f"{len(found)}.jsonl"
        found[other] = api.winrate("chain", "chain/1-sft", "prompts.jsonl", other, max_tokens=4, limit=6, to=to)
    first, second = found.values()
    assert len(first["notes"]) == 1 and "reward that chain was trained on" in first["notes"][0]
    assert second["notes"] == []


@pytest.mark.usefixtures("aligned")
def test_a_changed_reward_model_reruns_the_policy():
    policy = stage("ppo", "prompts", sampling={"max_tokens": 4}, ppo={"rollouts": 8, "minibatches": 1})
    recipe = chain(stage("sft", "pairs"), stage("reward", "preferences"), policy)
    assert api.train(recipe)["cached"] == ["1-sft", "2-reward", "3-ppo"]
    assert api.train(recipe, ["stages.reward.train.steps=2"])["cached"] == ["1-sft"]
    assert api.train(recipe, ["stages.ppo.ppo.clip=0.1"])["cached"] == ["1-sft", "2-reward"]


def test_a_supervised_stage_may_be_judged_by_a_reward_stage():
    judged = stage("sft", "pairs", reward={"run": "reward"}, train={"select_by": "reward"})
    found = full(stage("reward", "preferences"), judged, stage("sft", "pairs"))
    assert [s.rewards for s in found.stages] == [(), (0,), ()] and [s.parent for s in found.stages] == [None, None, 1]
    assert found.stages[1].resolved.recipe.reward.run == "1-reward"


@pytest.mark.parametrize("text", ["", "stages: 3\n", "base: tiny\nstages:\n- {stage: sft}\n", "base: [\n", "- a\n"])
def test_a_damaged_saved_chain_is_told_as_such(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match="is damaged"):
        load_saved(tmp_path / "recipe.yaml", tmp_path)
