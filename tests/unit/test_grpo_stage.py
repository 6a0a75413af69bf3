"""The stage grpo: it learns, keeps its start, resumes bit for bit in the middle of a round, and says what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.unit.rl import lines, recipe, result, train, weights

from tunesmith import api
from tunesmith.errors import DataError, RecipeError, RewardError
from tunesmith.stages.grpo import has_signal, overlong_penalty


def test_a_toy_task_goes_from_near_0_to_above_0_9(tmp_path: Path):
    settings = recipe(tmp_path, "grpo", train={"steps": 40}) | {"reward": {"contains": "good"}}
    settings["grpo"] = {"prompts": 4, "group": 8}
    run = train(tmp_path, settings)
    found, steps = result(run), lines(run)
    assert found["before"]["reward"]["value"] < 0.3
    assert found["after"]["reward"]["value"] > 0.9
    assert steps[0]["reward"] < 0.2 and np.mean([s["reward"] for s in steps[-5:]]) > 0.9
    assert steps[0]["kl"] == 0.0 and steps[-1]["kl"] > 0.5
    assert found["difference"]["reward"]["verdict"] == "better"
    assert found["difference"]["kl"]["verdict"] == "changed"


def test_the_ratio_of_every_round_s_first_minibatch_is_exactly_1(tmp_path: Path):
    run = train(tmp_path, recipe(tmp_path, "grpo", train={"steps": 12}))
    steps = lines(run)
    first, others = [s for s in steps if s["step"] % 4 == 1], [s for s in steps if s["step"] % 4 != 1]
    assert all(s["ratio"] == 1.0 and s["approx_kl"] == 0.0 and s["clip_fraction"] == 0.0 for s in first)
    assert any(s["approx_kl"] > 0 for s in others)  # control: later ones are not
    assert all(s["sampler_error"] < 1e-5 for s in steps)


@pytest.mark.parametrize("die_at", [1, 3, 4, 6])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, die_at: int):
    settings = recipe(tmp_path, "grpo", train={"save_every": 1})
    whole = train(tmp_path, settings, "whole")
    cut = train(tmp_path, settings, "cut", die_at=die_at)
    assert not (cut / "result.json").exists()
    api.resume(str(cut))
    assert weights(cut) == weights(whole)
    for name in ("metrics", "rollouts", "evaluations", "samples"):
        assert (cut / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes(), name


def test_control_another_seed_is_another_run(tmp_path: Path):
    first = train(tmp_path, recipe(tmp_path, "grpo"), "first")
    same = train(tmp_path, recipe(tmp_path, "grpo"), "same")
    other = train(tmp_path, recipe(tmp_path, "grpo", seed=7), "other")
    assert weights(first) == weights(same)
    assert weights(first) != weights(other)
    assert (first / "rollouts.jsonl").read_bytes() == (same / "rollouts.jsonl").read_bytes()


def test_rollouts_are_kept_with_their_rewards_by_parts(tmp_path: Path):
    reward = {"contains": "o", "regex": "^[ a-z]", "length": {"target": 3}, "weights": {"regex": 0.5}}
    run = train(tmp_path, recipe(tmp_path, "grpo") | {"reward": reward})
    rows = lines(run, "rollouts")
    assert len(rows) == 2 * 8  # two rounds were begun for six steps of four a round
    assert {row["step"] for row in rows} == {1, 5} and {row["sample"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        parts = row["parts"]
        assert row["reward"] == pytest.approx(parts["contains"] + 0.5 * parts["regex"] + parts["length"])
        assert parts["contains"] == float("o" in row["completion"])
        assert row["prompt"] and "train.jsonl:" in row["origin"]
    first = lines(run)[0]
    assert first["reward.length"] == pytest.approx(np.mean([r["parts"]["length"] for r in rows[:8]]))
    assert {"reward", "reward.contains", "reward.regex"} <= set(result(run)["after"])


@pytest.mark.parametrize("variant", ["dapo", "dr_grpo", "rloo"])
def test_the_variants_run_and_are_not_the_same(tmp_path: Path, variant: str):
    settings = recipe(tmp_path, "grpo", train={"steps": 4})
    plain = train(tmp_path, settings, "plain")
    settings["grpo"] = {**settings["grpo"], "variant": variant}
    run = train(tmp_path, settings, variant)
    assert len(lines(run)) == 4 and weights(run) != weights(plain)
    assert "kl" not in lines(run)[0]  # these have no reference
    assert result(run)["after"]["kl"]["value"] != 0.0  # and yet it is measured


def test_groups_without_signal_are_left_out(tmp_path: Path):
    settings = recipe(tmp_path, "grpo", reward={"regex": "e"}, train={"steps": 1})
    settings["grpo"] = {"prompts": 4, "group": 4, "filter_groups": True}
    run = train(tmp_path, settings)
    step, rows = lines(run)[0], lines(run, "rollouts")
    groups = {row["origin"]: [r["reward"] for r in rows if r["origin"] == row["origin"]] for row in rows}
    silent = [origin for origin, rewards in groups.items() if len(set(rewards)) == 1]
    assert 0 < len(silent) < 4, "the task is chosen so that some groups are silent"
    assert step["no_signal"] == len(silent) / 4
    assert step["targets"] == 4 * (4 - len(silent))  # completions that count


def test_has_signal_and_overlong_penalty_by_hand():
    assert has_signal(np.array([1.0, 1, 0, 1]), np.array([5, 5, 9, 9])).tolist() == [False, False, True, True]
    assert overlong_penalty(np.array([5, 8, 9, 10]), 10, 2).tolist() == [0, 0, -0.5, -1]


def test_an_adapter_s_start_is_the_base(tmp_path: Path):
    settings = recipe(tmp_path, "grpo", tune={"method": "lora", "rank": 4}, train={"steps": 8, "learning_rate": 5e-2})
    run = train(tmp_path, settings)
    steps = lines(run)
    assert steps[0]["kl"] == 0.0 and steps[4]["kl"] != 0.0
    assert result(run)["before"]["kl"]["value"] == 0.0 and result(run)["after"]["kl"]["value"] > 0.0


def broken(tmp_path: Path, body: str) -> dict:
    (tmp_path / "mine.py").write_text(
        f"calls = []\ndef reward(prompts, completions):\n    calls.append(1)\n    {body}\n"
    )
    return recipe(tmp_path, "grpo") | {"reward": {"function": str(tmp_path / "mine.py") + ":reward"}}


def test_a_reward_that_fails_in_the_middle_loses_nothing(tmp_path: Path):
    good = "return [float('a' in c) for c in completions]"
    whole = train(tmp_path, broken(tmp_path, good), "whole")
    settings = broken(tmp_path, f"if len(calls) == 3: return [float('nan')] * len(completions)\n    {good}")
    with pytest.raises(RewardError, match=r"returned nan for completion 1 of prompt .*train\.jsonl:\d"):
        train(tmp_path, settings, "failed")
    failed = tmp_path / "failed"
    assert [line["step"] for line in lines(failed)] == [1, 2, 3, 4]
    assert (failed / "checkpoints" / "step_000004").is_dir()
    broken(tmp_path, good)  # the user mends the file
    said: list[str] = []
    api.resume(str(failed), say=said.append)
    assert any("mine.py:reward has changed since the run began" in line for line in said)
    assert weights(failed) == weights(whole)
    assert (failed / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()


def test_prompts_that_leave_no_room_are_refused_by_line(tmp_path: Path):
    settings = recipe(tmp_path, "grpo")
    path = tmp_path / "train.jsonl"
    path.write_text(
        path.read_text() + '{"prompt": "' + "zq" * 200 + '"}\n{"prompt": "fine"}\n{"prompt": "' + "y" * 300 + '"}\n'
    )
    with pytest.raises(DataError, match=r"2 prompts have more than 251 tokens .*train\.jsonl:7 .*train\.jsonl:9"):
        train(tmp_path, settings)
    settings["data"]["on_too_long"] = "drop"
    assert len(lines(train(tmp_path, settings, "dropped"))) == 6


def test_dropout_and_missing_answers_are_refused_before_the_first_step(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"trains without dropout"):
        train(tmp_path, recipe(tmp_path, "grpo", tune={"method": "lora", "dropout": 0.1}))
    with pytest.raises(DataError, match=r"answer.*missing in .*train\.jsonl:1"):
        train(tmp_path, recipe(tmp_path, "grpo", reward={"exact": True}))


def test_a_finished_policy_is_measured_on_other_prompts_and_asked(tmp_path: Path):
    run = train(tmp_path, recipe(tmp_path, "grpo", sampling={"continue_prompt": True}))
    found = api.evaluate(str(run), str(tmp_path / "eval.jsonl"))
    after = result(run)["after"]
    assert found["metrics"]["reward"] == after["reward"] and found["metrics"]["kl"] == after["kl"]
    assert after["kl"]["value"] != 0.0
    assert isinstance(api.chat(str(run), "the cat", max_tokens=3), str)
