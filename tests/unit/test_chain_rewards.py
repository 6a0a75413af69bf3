"""sft, a reward model and ppo as one chain: who starts from whom, who pays whom, and what reruns what."""

from __future__ import annotations

import json

import pytest
from tests.chains import chain, make_files, stage

from tunesmith import api


def lineage(folder):
    return json.loads((folder / "runs/chain/lineage.json").read_text())


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
