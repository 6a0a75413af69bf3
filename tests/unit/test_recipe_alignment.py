"""Keys of the stages reward, dpo, ppo and grpo: defaults by method, and what does nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tunesmith.errors import RecipeError
from tunesmith.recipe import Resolved, load_recipe

BASE: dict[str, Any] = {"base": "some/base", "data": {"train": "rows.jsonl", "split": {"eval": 0.1}}}


def resolve(stage: str, **sections: Any) -> Resolved:
    return load_recipe({**BASE, "stage": stage, **sections})


def refused(stage: str, **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(stage, **sections)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        ("sft", {"train": {"clip_norm": None}}),
        ("reward", {"reward_model": {"margin": 0.5}}),
        ("dpo", {"dpo": {"loss": "simpo"}}),
        ("dpo", {"dpo": {"loss": "orpo"}}),
        ("sft", {"reward": {"contains": "good"}, "train": {"select_by": "reward"}}),
        ("ppo", {"reward": {"contains": "good"}, "ppo": {"value_clip": None}}),
        ("grpo", {"reward": {"regex": "a"}, "grpo": {"variant": "dapo"}}),
    ],
)
def test_a_resolved_recipe_reads_back_as_the_same_recipe(stage: str, sections: dict[str, Any]) -> None:
    first = resolve(stage, **sections)
    assert load_recipe(yaml.safe_load(first.to_yaml())).recipe == first.recipe


def test_a_reward_model_is_trained_one_epoch_at_the_papers_rate() -> None:
    recipe = resolve("reward", tune={"method": "full"}).recipe
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.select_by) == (1.0, 9e-6, "accuracy")
    assert resolve("reward").recipe.train.learning_rate == 9e-5


def test_simpo_takes_its_own_beta_and_a_margin_of_half_of_it() -> None:
    dpo = resolve("dpo", dpo={"loss": "simpo", "beta": 3.0}).recipe.dpo
    assert dpo is not None and (dpo.beta, dpo.gamma) == (3.0, 1.5)
    plain = resolve("dpo").recipe.dpo
    assert plain is not None and (plain.beta, plain.gamma) == (0.1, None)


def test_a_variant_of_grpo_fills_what_is_left_open() -> None:
    grpo = resolve("grpo", reward={"regex": "a"}, grpo={"variant": "dapo", "clip_high": 0.3}).recipe.grpo
    assert grpo is not None
    assert (grpo.clip, grpo.clip_high, grpo.kl_coef, grpo.length_normalisation) == (0.2, 0.3, 0.0, "token")
    assert grpo.overlong_buffer == 12


@pytest.mark.parametrize(
    ("stage", "sections", "words"),
    [
        ("sft", {"dpo": {"beta": 0.1}}, "`dpo` does nothing in stage sft"),
        ("sft", {"train": {"select_by": "reward"}}, "`reward` is not measured in stage sft"),
        ("sft", {"reward": {"clip": 1.0}}, "needs a reward"),
        ("reward", {"reward": {"margin": 1.0}}, "did you mean `reward_model.margin`?"),
        ("dpo", {"dpo": {"bta": 0.1}}, "did you mean `beta`?"),
        ("dpo", {"dpo": {"loss": "ipo", "gamma": 1.0}}, "it is for simpo"),
        ("dpo", {"tune": {"method": "head"}}, "only classify and reward have"),
        ("ppo", {}, "stage ppo needs a reward"),
        ("ppo", {"reward": {"contains": "a"}, "train": {"batch_examples": 4}}, "`train.batch_examples` does nothing"),
        ("ppo", {"reward": {"contains": "a", "weights": {"contain": 1.0}}}, "weighs no part"),
        ("ppo", {"reward": {"contains": "a"}, "ppo": {"ptx_coef": 1.0}}, "needs `ppo.ptx_data`"),
        ("grpo", {"reward": {"regex": "("}}, "not a regular expression"),
        ("grpo", {"reward": {"function": "score"}}, "is not `file.py:name`"),
        ("grpo", {"reward": {"exact": True}, "sampling": {"num_per_prompt": 2}}, "it is `grpo.group`"),
    ],
)
def test_what_does_nothing_or_cannot_work_is_refused(stage: str, sections: dict[str, Any], words: str) -> None:
    assert words in refused(stage, **sections)
