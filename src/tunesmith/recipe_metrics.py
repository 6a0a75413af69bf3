"""Metrics of the user's own as a recipe names them, `file.py:name`; and which way a metric is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})
"""Built-in metrics that are better when they fall."""
LOWER_WORDS = frozenset({
    "brier", "cer", "deviance", "distance", "error", "errors", "loss", "lower", "mae", "mse", "perplexity", "rmse",
    "wer",
})  # fmt: skip
"""A metric whose name ends in one of these words is better when it falls; one that has such a word before its end is
asked to say which way, by ending in `lower` or `higher`."""
RESERVED = LOWER_IS_BETTER | {
    "accuracy", "auc", "bleu", "ended", "exact_match", "f1", "forgetting", "kl", "margin", "mcc", "pearson",
    "precision", "recall", "response_length", "reward", "rouge_l", "share_ended", "win_rate",
}  # fmt: skip
"""Names that are taken: what a metric of the user's own may not be called."""
_COMPLETED = ("prompt", "completion", "answer", "row")
ARGUMENTS = {
    "classify": ("predicted", "label", "probabilities", "row"),
    "sft": _COMPLETED, "dpo": _COMPLETED, "ppo": _COMPLETED, "grpo": _COMPLETED,
}  # fmt: skip
"""What a metric function may ask for by the names of its parameters, by stage."""


def lower_is_better(metric: str) -> bool:
    """Whether the metric is better when it falls: some built-in ones, and names whose last word says so.

    `loss`, `wer` and `rudeness_error` are, `politeness` is not; the parts of a reward (`reward.NAME`) never are.
    """
    return metric in LOWER_IS_BETTER or ("." not in metric and metric.rpartition("_")[2] in LOWER_WORDS)


def named(metrics: str | Sequence[str] | None) -> list[str]:
    """The value of `evaluate.metrics` as a list."""
    return [] if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)


def parts_of(text: str) -> tuple[str, str] | None:
    """(file, function name) of `file.py:name`; None when the text is not of that form."""
    file, colon, name = text.rpartition(":")
    return (file, name) if colon and file.endswith(".py") and name.isidentifier() else None


def metric_name(text: str) -> str:
    """What the metric goes by that `file.py:name` names."""
    parts = parts_of(text)
    return text if parts is None else parts[1]


def name_problems(names: Sequence[str]) -> list[str]:
    """What is wrong with these names of metrics: taken by a built-in one, or given twice."""
    taken = [f"`{name}` is the name of a built-in metric; call the function otherwise" for name in names
             if name in RESERVED]  # fmt: skip
    twice = sorted({name for name in names if names.count(name) > 1})
    return taken + _unclear(names) + [f"two metric functions are called `{name}`; rename one" for name in twice]


def _unclear(names: Sequence[str]) -> list[str]:
    """Names from which nobody can tell which way is better: `word_error_rate`."""
    words = {name: name.split("_") for name in names}
    return [
        f"`{name}` may be better when it falls or when it rises: call the function `{name}_lower` or `{name}_higher`"
        for name, parts in words.items()
        if parts[-1] not in LOWER_WORDS | {"higher"} and LOWER_WORDS & set(parts)
    ]


def direction(metric: str) -> str:
    """What a run says of a metric of the user's own before it chooses or judges by it."""
    return f"metric {metric}: {'lower' if lower_is_better(metric) else 'higher'} is better, as its name says"


def metric_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that the metrics of a recipe's own go by."""
    found = [parts_of(text) for text in named(values["evaluate"]["metrics"])]
    return tuple(parts[1] for parts in found if parts is not None)


def metric_problems(values: Mapping[str, Any], *, held_out: bool) -> list[tuple[str, str]]:
    """(key, text) for metrics of a recipe's own that cannot be measured or told apart."""
    asked = named(values["evaluate"]["metrics"])
    if not asked:
        return []
    problems = [f"`evaluate.metrics`: `{text}` is not `file.py:name`" for text in asked if parts_of(text) is None]
    problems += [f"`evaluate.metrics`: {text}" for text in name_problems(metric_names(values))]
    if not held_out and values["data"]["test"] is None:
        problems.append("`evaluate.metrics` needs held-out rows: add `data.eval` or `data.split`")
    if values["data"]["train_on_prompt"]:
        problems.append("`evaluate.metrics` judges answers to prompts, and `data.train_on_prompt` sets no prompt apart")
    return [("evaluate.metrics", text) for text in problems]
