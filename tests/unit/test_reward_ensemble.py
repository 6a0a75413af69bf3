"""Several reward models as one: the mean of their scores, or the least of them; each is asked on the same text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tests.unit.rl import recipe

from tunesmith import api
from tunesmith.data.kinds import Message
from tunesmith.errors import RecipeError
from tunesmith.recipe import load_recipe
from tunesmith.rollout.rewards import Completed
from tunesmith.rundir import RunDir
from tunesmith.stages.rewarding import build_reward, run_score

ASKED = [Completed("the cat", text, messages=(Message("user", "the cat"),)) for text in ("good", "a mat", "0 1 2", "")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], list[Path]]]:
    """A recipe, and the runs of two reward models that differ in their seed."""
    folder = tmp_path_factory.mktemp("ensemble")
    settings = recipe(folder, "grpo")
    pairs = [{"prompt": p, "chosen": "good", "rejected": f"text {i}"} for i, p in enumerate(("a", "the", "two", "mat"))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    shared = {key: settings[key] for key in ("base", "device", "precision", "tune")}
    data = {"train": str(folder / "pairs.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        for seed in (1, 2):
            scorer = shared | {"stage": "reward", "data": data, "train": {"steps": 1}, "seed": seed}
            api.train(scorer, run=str(folder / f"scorer{seed}"))
        yield settings, [folder / "scorer1", folder / "scorer2"]


@pytest.mark.parametrize("ensemble", [None, "mean", "min"])
def test_a_reward_is_the_mean_or_the_least_of_its_models(
    made: tuple[dict[str, Any], list[Path]], ensemble: str | None
) -> None:
    settings, runs = made
    paid: dict[str, Any] = {"run": ",".join(map(str, runs)), "ensemble": ensemble}
    resolved = load_recipe(settings | {"reward": {k: v for k, v in paid.items() if v is not None}})
    job = SimpleNamespace(recipe=resolved.recipe, folder=Path.cwd(), device="cpu", precision="float32")
    found = build_reward(cast(Any, job), [])(ASKED)
    alone = np.array([run_score(RunDir(run), label=None)(ASKED) for run in runs])
    np.testing.assert_allclose(found.total, alone.min(0) if ensemble == "min" else alone.mean(0), atol=1e-6)
    assert np.abs(alone[0] - alone[1]).min() > 1e-3, "control: models that think alike would say nothing"
    assert set(found.parts) == {"run"}


def test_an_ensemble_of_one_is_refused(made: tuple[dict[str, Any], list[Path]]) -> None:
    with pytest.raises(RecipeError, match=r"reward\.ensemble. is for several runs"):
        load_recipe(made[0] | {"reward": {"run": "one", "ensemble": "min"}})
