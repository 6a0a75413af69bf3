"""Laws of comparing answers: groups are never split, and how a step is cut into micro-batches does not matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.tiny import tiny_causal, tiny_classifier
from torch import nn

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate
from tunesmith.data.source import OfflineSource
from tunesmith.engine.contracts import FitSpec, Objective, Stage
from tunesmith.engine.fit import train_step
from tunesmith.engine.optim import OptimSpec, build_optimizer
from tunesmith.model.language import LanguageModel
from tunesmith.model.score import ScoreModel
from tunesmith.objectives.dpo import Preference
from tunesmith.objectives.reward import BradleyTerry

SPEC = FitSpec(seed=1, optim=OptimSpec(1e-2, optimizer="sgd", clip_norm=None))
SIZES = (2, 3, 2, 4, 2, 3)


class Answers:
    """Samples in memory: groups of 2 to 4 answers of 3 to 20 tokens, ranked 1, 2, 3, 4."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.rows: list[Sample] = []
        for group, size in enumerate(SIZES):
            for rank in range(1, size + 1):
                length = int(draw.integers(3, 20))
                weights = np.ones(length, np.float32)
                weights[:2] = 0
                columns = {"reference_logprobs": -draw.random(length).astype(np.float32) * 5}
                ids = draw.integers(7, 300, length).astype(np.int32)
                self.rows.append(Sample(ids, weights, columns, label=rank, group=group, origin=f"rows.jsonl:{group}"))
        self.lengths = np.asarray([len(row) for row in self.rows])
        self.groups = np.repeat(np.arange(len(SIZES)), SIZES)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]


class Parts:
    """A source of one step whose micro-batches are given."""

    num_steps, steps_per_epoch = 1, 1

    def __init__(self, parts: Sequence[Batch]) -> None:
        self.parts = parts

    def step_batches(self, step: int) -> Sequence[Batch]:
        return self.parts

    def at_boundary(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: object) -> None:
        """Nothing to do."""


def learner(kind: str) -> tuple[nn.Module, Objective]:
    if kind == "reward":
        return ScoreModel(tiny_classifier("llama", labels=1)), BradleyTerry(margin=0.1, center_coef=0.01)
    return LanguageModel(tiny_causal("llama")), Preference("sigmoid" if kind == "dpo" else "orpo")


def after_one_step(kind: str, parts: Sequence[Batch]) -> torch.Tensor:
    model, objective = learner(kind)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    train_step(Stage(kind, model, objective, Parts(parts)), build_optimizer(model, SPEC.optim), SPEC, 1)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def source(micro: int, **settings: int) -> OfflineSource:
    answers = Answers()
    return OfflineSource(
        answers, seed=3, num_steps=4, micro_batch_tokens=micro, groups=answers.groups,
        **({"batch_examples": 6} | settings),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["reward", "dpo", "orpo"])
def test_groups_in_one_batch_or_in_several_are_the_same_step(kind: str) -> None:
    whole = after_one_step(kind, source(10_000).step_batches(1))
    cut = source(45).step_batches(1)
    assert len(cut) > 2
    assert (whole - after_one_step(kind, cut)).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_control_a_split_group_is_another_step(kind: str) -> None:
    rows = Answers().rows
    whole, split = after_one_step(kind, [collate(rows)]), after_one_step(kind, [collate(rows[:4]), collate(rows[4:])])
    assert (whole - split).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("settings", [{"batch_examples": 2}, {"batch_tokens": 60, "batch_examples": None}])
@pytest.mark.parametrize("micro", [1, 30, 70, 10_000])
def test_no_step_and_no_micro_batch_ever_splits_a_group(settings: dict[str, int], micro: int) -> None:
    made = source(micro, **settings)
    seen: list[int] = []
    for step in range(1, made.steps_per_epoch + 1):
        for batch in made.step_batches(step):
            assert batch.groups is not None
            found, counts = batch.groups.unique(return_counts=True)
            assert counts.tolist() == [SIZES[int(group)] for group in found]
            seen += found.tolist()
    assert sorted(seen) == list(range(len(SIZES))), "every group once an epoch"


def test_without_groups_every_sample_is_a_row_of_its_own() -> None:
    answers = Answers()
    made = OfflineSource(answers, seed=3, num_steps=1, batch_examples=4)
    assert made.steps_per_epoch == 4 and len(made.rows_at(1)) == 4
    assert sum(batch.num_segments for batch in made.step_batches(1)) == 4


def test_a_column_stands_beside_what_it_is_about() -> None:
    sample = Sample(
        np.asarray([5, 6, 7], np.int32), np.asarray([0, 1, 1], np.float32),
        {"old": np.asarray([0.0, -1.5, -2.5], np.float32), "top": np.arange(6, dtype=np.float32).reshape(3, 2)},
    )  # fmt: skip
    batch = collate([sample, sample])
    assert batch.targets[0, :2].tolist() == [6, 7]
    assert batch.columns["old"][0].tolist() == [-1.5, -2.5, 0.0] * 2
    assert batch.columns["top"][0, :3].tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]
