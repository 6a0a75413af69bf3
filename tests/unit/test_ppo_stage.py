"""The stage ppo: it learns, its KL obeys its price, its mix is nothing at 0, and it resumes bit for bit anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import save_tiny, tiny_classifier, tiny_tokenizer
from tests.unit.rl import lines, recipe, result, train, weights

from tunesmith import api
from tunesmith.data.kinds import Message
from tunesmith.errors import RecipeError
from tunesmith.rollout.rewards import Completed
from tunesmith.rundir import RunDir
from tunesmith.stages.finals import open_tuned
from tunesmith.stages.rewarding import ModelScore, _answered


def test_a_toy_task_goes_from_near_0_to_above_0_9(tmp_path: Path):
    settings = recipe(tmp_path, "ppo", train={"steps": 72}) | {"reward": {"contains": "good"}}
    settings["ppo"] = {
        "rollouts": 32, "epochs": 2, "minibatches": 2, "critic_learning_rate": 1e-2, "kl_coef": 0.002
    }  # fmt: skip
    run = train(tmp_path, settings)
    found, steps = result(run), lines(run)
    assert found["before"]["reward"]["value"] < 0.3 and found["after"]["reward"]["value"] > 0.9
    assert steps[0]["reward"] < 0.2 and np.mean([s["reward"] for s in steps[-8:]]) > 0.9
    assert steps[0]["kl"] == 0.0 and steps[-1]["kl"] > 0.5
    logged = {"kl_coef", "clip_fraction", "approx_kl", "entropy", "value_loss", "explained_variance", "response_length"}
    assert logged <= set(steps[-1])


def test_a_larger_price_leaves_a_smaller_kl(tmp_path: Path):
    final = {}
    sizes = {"rollouts": 32, "epochs": 1, "minibatches": 1, "critic_learning_rate": 1e-2}
    for coef in (0.0, 0.1, 2.0):
        settings = recipe(tmp_path, "ppo", train={"steps": 40, "learning_rate": 3e-3}, sampling={"max_tokens": 4})
        settings["ppo"] = {**sizes, "kl_coef": coef}
        found = result(train(tmp_path, settings, f"run{coef}"))
        assert found["before"]["kl"]["value"] == 0.0
        final[coef] = found["after"]["kl"]["value"]
    assert final[0.0] > final[0.1] > final[2.0], final


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_the_ratio_of_every_round_s_first_minibatch_is_exactly_1(tmp_path: Path, critic: str):
    settings = recipe(tmp_path, "ppo", train={"steps": 8})
    settings["ppo"] = {k: v for k, v in settings["ppo"].items() if k != "critic_learning_rate"} | {"critic": critic}
    steps = lines(train(tmp_path, settings))
    first, others = [s for s in steps if s["step"] % 4 == 1], [s for s in steps if s["step"] % 4 != 1]
    assert all(s["ratio"] == 1.0 and s["approx_kl"] == 0.0 and s["clip_fraction"] == 0.0 for s in first)
    assert any(s["approx_kl"] > 0 for s in others)  # control: later ones are not
    assert all(s["sampler_error"] < 1e-5 for s in steps)


@pytest.mark.parametrize("die_at", [1, 2, 4, 5])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, die_at: int):
    settings = recipe(tmp_path, "ppo", train={"save_every": 1})
    settings["ppo"] = {**settings["ppo"], "kl_target": 3.0, "entropy_coef": 0.01}
    whole = train(tmp_path, settings, "whole")
    cut = train(tmp_path, settings, "cut", die_at=die_at)
    api.resume(str(cut))
    assert weights(cut) == weights(whole)
    for name in ("metrics", "rollouts", "evaluations", "samples"):
        assert (cut / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes(), name


def test_the_same_seed_twice_is_the_same_run(tmp_path: Path):
    first, again = (train(tmp_path, recipe(tmp_path, "ppo"), name) for name in ("first", "again"))
    other = train(tmp_path, recipe(tmp_path, "ppo", seed=5), "other")
    assert weights(first) == weights(again) and weights(first) != weights(other)


def with_text(tmp_path: Path, coef: float | None) -> dict[str, Any]:
    settings = recipe(tmp_path, "ppo", train={"steps": 24})
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {w} sat on a mat and was good" for w in ("cat", "dog", "fox")))
    if coef is not None:
        settings["ppo"] = {**settings["ppo"], "ptx_coef": coef}
        if coef:
            settings["ppo"]["ptx_data"] = str(tmp_path / "text.txt")
    settings["evaluate"] = {"probe": str(tmp_path / "text.txt")}
    return settings


def test_a_mix_of_0_is_plain_ppo_and_a_mix_keeps_the_text(tmp_path: Path):
    plain = train(tmp_path, with_text(tmp_path, None), "plain")
    zero = train(tmp_path, with_text(tmp_path, 0.0), "zero")
    mixed = train(tmp_path, with_text(tmp_path, 1.0), "mixed")
    assert weights(zero) == weights(plain) and lines(zero) == lines(plain)
    assert weights(mixed) != weights(plain)  # control
    assert "ptx_loss" in lines(mixed)[0] and "ptx_loss" not in lines(plain)[0]
    lost = [result(run)["probe"]["after"]["loss"]["value"] for run in (plain, mixed)]
    assert lost[1] < lost[0]
    assert lines(mixed)[0]["targets"] == lines(plain)[0]["targets"]  # text tokens are not in the count


def test_the_run_s_model_is_the_policy_alone(tmp_path: Path):
    run = train(tmp_path, recipe(tmp_path, "ppo", tune={"method": "lora", "rank": 4}))
    tuned = open_tuned(RunDir(run))
    assert not [name for name, _ in tuned.model.named_parameters() if "critic" in name]
    assert result(run)["trainable_parameters"] == tuned.trainable.trainable
    assert any(name.startswith("checkpoints") or ".critic." in name for name in weights(run))  # the critic resumes


def test_the_critic_has_its_own_learning_rate(tmp_path: Path):
    runs = []
    for rate in (1e-6, 3e-3):  # not the policy's own: parameters of one rate are summed together in the gradient's norm
        settings = recipe(tmp_path, "ppo", train={"steps": 1})
        settings["ppo"] = {**settings["ppo"], "minibatches": 1, "critic_learning_rate": rate}
        runs.append(weights(train(tmp_path, settings, f"run{rate}")))
    slow, fast = runs
    critic = [n for n in slow if "model.critic." in n]
    policy = [n for n in slow if "model.backbone." in n]
    assert all(slow[n] == fast[n] for n in policy) and any(slow[n] != fast[n] for n in critic)


def test_rewards_are_clipped_before_the_bonus_of_the_end(tmp_path: Path):
    settings = recipe(tmp_path, "ppo", train={"steps": 1}) | {"reward": {"regex": "[a-e]", "clip": 0.25}}
    rows = lines(train(tmp_path, settings), "rollouts")
    assert {row["reward"] for row in rows} <= {0.0, 0.25} and {row["parts"]["regex"] for row in rows} <= {0.0, 1.0}


def test_what_cannot_be_is_refused_before_the_first_step(tmp_path: Path):
    settings = recipe(tmp_path, "ppo")
    with pytest.raises(RecipeError, match=r"needs `ppo\.ptx_data`"):
        train(tmp_path, settings | {"ppo": {"ptx_coef": 1.0}})
    with pytest.raises(RecipeError, match="needs a reward"):
        train(tmp_path, {k: v for k, v in settings.items() if k != "reward"})
    with pytest.raises(RecipeError, match="there is no file"):
        train(tmp_path, settings | {"reward": {"function": "none.py:reward"}})
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_warning_tells_what_goes_wrong_and_the_metric_that_shows_it(tmp_path: Path):
    said: list[str] = []
    settings = recipe(tmp_path, "ppo", train={"steps": 1}) | {"reward": {"contains": "zebra"}}
    api.train(settings, run=str(tmp_path / "run"), say=said.append)
    assert sum("reward_std 0" in text for text in said) == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["reward_std"] == 0.0


def test_a_reward_run_pays_through_text_and_its_model_starts_the_critic(tmp_path: Path):
    settings = recipe(tmp_path, "ppo", train={"steps": 2})
    pairs = [{"prompt": p, "chosen": "good", "rejected": "text 0"} for p in ("a", "the cat", "two", "mat", "plus")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    scorer = {key: settings[key] for key in ("base", "device", "precision", "tune")} | {
        "stage": "reward", "data": {"train": str(tmp_path / "pairs.jsonl")}, "train": {"steps": 2}
    }  # fmt: skip
    api.train(scorer, run=str(tmp_path / "scorer"))
    said: list[str] = []
    paid = settings | {"reward": {"run": str(tmp_path / "scorer"), "length": {"target": 3}, "weights": {"length": 0.5}}}
    api.train(paid, run=str(tmp_path / "paid"), say=said.append)
    assert any(text.startswith("critic from the reward model of") for text in said)
    rows = lines(tmp_path / "paid", "rollouts")
    scores = [row["parts"]["run"] for row in rows]
    assert len({round(score, 6) for score in scores}) > 1
    tuned = open_tuned(RunDir(tmp_path / "scorer"))
    text = ModelScore(tuned.model, _answered(tuned.tokenizer, False), 256, None, "cpu")
    asked = [Completed(r["prompt"], r["completion"], messages=(Message("user", r["prompt"]),)) for r in rows]
    np.testing.assert_allclose(text(asked), scores, atol=1e-5)


def test_a_classifier_pays_the_log_odds_of_a_label(tmp_path: Path):
    model = tiny_classifier("llama", labels=3)
    save_tiny(model, tmp_path / "judge", tokenizer=tiny_tokenizer(chat=False))
    settings = recipe(tmp_path, "ppo", train={"steps": 1})
    with pytest.raises(RecipeError, match=r"reward\.label is missing.*LABEL_0, LABEL_1, LABEL_2"):
        train(tmp_path, settings | {"reward": {"model": str(tmp_path / "judge")}}, "unnamed")
    reward = {"model": str(tmp_path / "judge"), "label": "LABEL_1"}
    row = lines(train(tmp_path, settings | {"reward": reward}), "rollouts")[0]
    ids = tiny_tokenizer()(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0]
    assert row["reward"] == pytest.approx(float(scores[1] - scores[[0, 2]].logsumexp(0)), abs=1e-4)
