"""The shipped recipe of the worked example holds the article's settings, and they give the article's schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.assets import asset

from tunesmith.data.records import read_records
from tunesmith.engine.optim import rate_at
from tunesmith.recipe import load_recipe
from tunesmith.stages.job import fit_spec
from tunesmith.stages.prepare import labels_of

RECIPE = Path(__file__).parents[2] / "examples" / "imdb_lora" / "recipe.yaml"


def test_the_recipe_holds_the_settings_of_the_article():
    recipe = load_recipe(RECIPE).recipe
    assert (recipe.stage, recipe.base) == ("classify", "distilbert/distilbert-base-uncased")
    assert (recipe.data.train, recipe.data.eval) == (
        "shawhin/imdb-truncated:train", "shawhin/imdb-truncated:validation"
    )  # fmt: skip
    assert (recipe.data.max_length, recipe.data.on_too_long) == (512, "truncate_left")
    tune, train = recipe.tune, recipe.train
    assert (tune.method, tune.rank, tune.alpha, tune.dropout, tune.targets) == ("lora", 4, 32, 0.01, ["q_lin"])
    assert (train.epochs, train.batch_examples, train.learning_rate, train.weight_decay) == (10, 4, 1e-3, 0.01)
    assert (train.optimizer, train.beta1, train.beta2, train.schedule, train.warmup) == (
        "adamw", 0.9, 0.999, "linear", 0
    )  # fmt: skip
    assert recipe.seed == 42 and recipe.train.select_by == "accuracy"
    assert len(recipe.evaluate.sentences) == 5 and recipe.evaluate.sentences[4] == "This one is a pass."


@pytest.mark.parametrize(("done", "rate"), [(500, 8e-4), (1000, 6e-4), (1500, 4e-4), (2000, 2e-4), (2500, 0.0)])
def test_the_rate_falls_as_in_the_article(done, rate):
    spec = fit_spec(load_recipe(RECIPE).recipe, 2500, "cpu").optim
    assert rate_at(spec, done, 2500) == pytest.approx(rate, abs=1e-12)


def test_the_truncated_pair_is_balanced_and_named_by_its_own_labels():
    for part in ("train", "validation"):
        records = read_records(str(asset(f"data/imdb/imdb_truncated_{part}.jsonl")), stage="classify")
        labels = [record.label for record in records]
        assert len(labels) == 1000 and labels.count("1") == 500
        assert labels_of(records) == ("0", "1")
