"""Losses equal to TRL's on the same numbers; `make_trl_numbers.py` made the file, TRL itself is not needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.batch import Batch, Outputs, Sample
from tunesmith.data.batches import collate
from tunesmith.objectives.dpo import Preference
from tunesmith.objectives.grpo import Grpo
from tunesmith.objectives.reward import BradleyTerry

MADE: dict[str, Any] = json.loads(Path(__file__).with_name("trl_numbers.json").read_text(encoding="utf-8"))
INPUTS, LOSSES = MADE["inputs"], MADE["losses"]
PROMPT = 3
TOLERANCE = 2e-6
"""Both sides compute in fp32."""


def token_rows(name: str) -> list[np.ndarray]:
    """The completions' numbers, each at its own length, behind a prompt of three tokens."""
    return [
        np.r_[np.zeros(PROMPT), row[:length]].astype(np.float32)
        for row, length in zip(INPUTS[name], INPUTS["lengths"], strict=True)
    ]


def batch_of(order: list[int], groups: list[int], labels: list[int]) -> tuple[Batch, Outputs]:
    """TRL's rows as packed segments, and a model that answers with the policy's log-probs."""
    policy, reference, old = (token_rows(name) for name in ("policy", "reference", "old"))
    samples = []
    for i, group, label in zip(order, groups, labels, strict=True):
        length = len(policy[i])
        weights = np.r_[np.zeros(PROMPT), np.ones(length - PROMPT)].astype(np.float32)
        columns = {
            "policy": policy[i], "reference_logprobs": reference[i], "old_logprobs": old[i],
            "advantages": np.full(length, INPUTS["advantages"][i], np.float32),
        }  # fmt: skip
        samples.append(Sample(np.full(length, 5, np.int32), weights, columns, label=label, group=group))
    batch = collate(samples)
    return batch, Outputs(logprobs=batch.columns["policy"])


def pairs() -> tuple[Batch, Outputs]:
    """Three chosen and three rejected, pair by pair."""
    return batch_of([0, 3, 1, 4, 2, 5], [0, 0, 1, 1, 2, 2], [1, 2] * 3)


def mean(objective: Any, outputs: Outputs, batch: Batch) -> float:
    return float(objective.loss(outputs, batch).sum) / objective.count(batch)


PREFERENCES = {
    "sigmoid": Preference("sigmoid"),
    "hinge": Preference("hinge"),
    "ipo": Preference("ipo", length_normalized=True),
    "sigmoid_norm": Preference("sigmoid", length_normalized=True),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_dpo_and_its_relatives(name: str) -> None:
    batch, outputs = pairs()
    assert mean(PREFERENCES[name], outputs, batch) == pytest.approx(LOSSES["dpo"][name], rel=TOLERANCE)


def test_control_another_beta_is_another_loss() -> None:
    batch, outputs = pairs()
    assert abs(mean(Preference(beta=0.2), outputs, batch) - LOSSES["dpo"]["sigmoid"]) > 1e-3


def test_orpo_without_its_likelihood_term_is_the_odds_ratio_loss() -> None:
    batch, outputs = pairs()
    chosen = [np.mean(row[:n]) for row, n in zip(INPUTS["policy"][:3], INPUTS["lengths"][:3], strict=True)]
    odds = mean(Preference("orpo", beta=0.1), outputs, batch) + float(np.mean(chosen))
    assert odds == pytest.approx(LOSSES["orpo_odds_ratio"], rel=2e-5)


def test_simpo() -> None:
    batch, outputs = pairs()
    assert mean(Preference("simpo", beta=2.0, gamma=1.0), outputs, batch) == pytest.approx(LOSSES["simpo"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("plain", BradleyTerry()),
        ("margin", BradleyTerry(margin=0.5)),
        ("centred", BradleyTerry(center_coef=0.01)),
    ],
)
def test_reward(name: str, objective: BradleyTerry) -> None:
    batch, _ = pairs()
    scores = torch.tensor(INPUTS["scores"])[[0, 3, 1, 4, 2, 5]][:, None]
    assert mean(objective, Outputs(scores=scores), batch) == pytest.approx(LOSSES["reward"][name], rel=TOLERANCE)
    turned = mean(objective, Outputs(scores=-scores), batch)
    assert abs(turned - LOSSES["reward"][name]) > 1e-3, "control: the sign matters"


@pytest.mark.parametrize("key", sorted(LOSSES["grpo"]))
def test_grpo_and_its_variants(key: str) -> None:
    name, beta = key.split()
    how = {"grpo": "completion", "dapo": "token", "dr_grpo": "constant"}
    batch, outputs = batch_of(list(range(6)), [0] * 6, [1] * 6)
    objective = Grpo(0.2, 0.28, float(beta), how[name], 16)  # type: ignore[arg-type]
    assert mean(objective, outputs, batch) == pytest.approx(LOSSES["grpo"][key], rel=1e-5)
    other = Grpo(0.05, 0.05, float(beta), how[name], 16)  # type: ignore[arg-type]
    assert abs(mean(other, outputs, batch) - LOSSES["grpo"][key]) > 1e-5, "control: the clip matters"
