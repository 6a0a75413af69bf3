"""A judge that no model here was trained on: how much of the reference answer's wording a completion has."""

from __future__ import annotations

from tunesmith.evaluate.tasks import rouge_l_statistic


def overlap(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """ROUGE-L of each completion with the row's reference answer."""
    rows = rouge_l_statistic(completions, answer).rows
    return (rows[:, 0] / rows[:, 1]).tolist()
