"""A chain in a recipe: what stages share, what they start from, and every problem of all of them at once."""

from __future__ import annotations

import pytest
from tests.chains import chain, stage

from tunesmith.errors import RecipeError, RunError
from tunesmith.recipe_chain import load_chain, load_saved


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


def test_a_supervised_stage_may_be_judged_by_a_reward_stage():
    judged = stage("sft", "pairs", reward={"run": "reward"}, train={"select_by": "reward"})
    found = full(stage("reward", "preferences"), judged, stage("sft", "pairs"))
    assert [s.rewards for s in found.stages] == [(), (0,), ()] and [s.parent for s in found.stages] == [None, None, 1]
    assert found.stages[1].resolved.recipe.reward.run == "1-reward"


def test_a_saved_chain_is_the_same_chain(tmp_path):
    found = full(stage("sft", "pairs"), stage("reward", "preferences"), stage("ppo", "prompts", name="p"))
    (tmp_path / "saved.yaml").write_text(found.to_yaml())
    for again in (load_saved(tmp_path / "saved.yaml", found.folder), load_chain(tmp_path / "saved.yaml")):
        assert [s.resolved.recipe for s in again.stages] == [s.resolved.recipe for s in found.stages]
        assert [(s.name, s.parent, s.rewards) for s in again.stages] == [
            (s.name, s.parent, s.rewards) for s in found.stages
        ]


@pytest.mark.parametrize("text", ["", "stages: 3\n", "base: tiny\nstages:\n- {stage: sft}\n", "base: [\n", "- a\n"])
def test_a_damaged_saved_chain_is_told_as_such(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match="is damaged"):
        load_saved(tmp_path / "recipe.yaml", tmp_path)


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
