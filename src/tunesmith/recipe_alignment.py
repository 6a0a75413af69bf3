"""Defaults and contradictions of the stages that learn from preferences and rewards: reward, dpo, ppo, grpo."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Problems = list[tuple[str, str]]

_DPO_KEYS = {
    "label_smoothing": {"sigmoid"},
    "length_normalized": {"sigmoid", "hinge", "ipo"},
    "gamma": {"simpo"},
    "sft_coef": {"sigmoid", "hinge", "ipo", "simpo"},
}
_DPO_BETA = {"sigmoid": 0.1, "ipo": 0.1, "hinge": 0.1, "orpo": 0.1, "simpo": 2.0}
"""DPO 2305.18290, appendix B: 0.1. ORPO 2403.07691, 5: lambda 0.1 to 0.2. SimPO 2405.14734, 4: beta 2 to 2.5, gamma
half of it. IPO's tau and SLiC's slope are taken like DPO's beta."""

_GRPO: dict[str, dict[str, Any]] = {
    "grpo": {"clip": 0.2, "clip_high": 0.2, "kl_coef": 0.04, "baseline": "mean", "normalise": "std",
             "length_normalisation": "completion", "overlong": "keep", "filter_groups": False},
    "dapo": {"clip": 0.2, "clip_high": 0.28, "kl_coef": 0.0, "baseline": "mean", "normalise": "std",
             "length_normalisation": "token", "overlong": "penalty", "filter_groups": True},
    "dr_grpo": {"clip": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "baseline": "mean", "normalise": "none",
                "length_normalisation": "constant", "overlong": "keep", "filter_groups": False},
    "rloo": {"clip": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "baseline": "leave_one_out", "normalise": "none",
             "length_normalisation": "sum", "overlong": "keep", "filter_groups": False},
}  # fmt: skip
"""DeepSeekMath 2402.03300, 4.2 (clip as in PPO, KL 0.04); DAPO 2503.14476, 3; Dr. GRPO 2503.20783, 3.2; RLOO
2402.14740, 3."""

PARTS = ("run", "model", "function", "contains", "regex", "exact", "length")
"""Keys of `reward` that earn something."""


def alignment_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value for what the user left open in the stage's own sections."""
    return _DEFAULTS[values["stage"]](values) if values["stage"] in _DEFAULTS else {}


def _dpo_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    loss, beta = values["dpo"]["loss"], values["dpo"]["beta"]
    found: dict[str, Any] = {"label_smoothing": 0.0, "length_normalized": False, "sft_coef": 0.0}
    if loss == "simpo":
        found["gamma"] = (_DPO_BETA[loss] if beta is None else beta) / 2
    useful = {name: value for name, value in found.items() if loss in _DPO_KEYS[name]}
    return {f"dpo.{name}": value for name, value in ({"beta": _DPO_BETA[loss]} | useful).items()}


def _ppo_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """InstructGPT trains its critic at 9e-6 (2203.02155, appendix C.4); an adapter wants about ten times that."""
    found: dict[str, Any] = {"sampling.num_per_prompt": 1}
    if values["ppo"]["critic"] == "own":
        found["ppo.critic_learning_rate"] = 9e-6 if values["tune"]["method"] == "full" else 1e-4
    return found


def _grpo_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    grpo = values["grpo"]
    found = dict(_GRPO[grpo["variant"]])
    if grpo["clip"] is not None and grpo["variant"] != "dapo":
        found["clip_high"] = grpo["clip"]
    if (grpo["overlong"] or found["overlong"]) == "penalty":
        found["overlong_buffer"] = max(1, values["sampling"]["max_tokens"] // 5)
    return {f"grpo.{name}": value for name, value in found.items()}


_DEFAULTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "dpo": _dpo_defaults, "ppo": _ppo_defaults, "grpo": _grpo_defaults
}  # fmt: skip


def alignment_problems(values: Mapping[str, Any]) -> Problems:
    """(key, text) for keys of the stage's own sections that contradict each other or would do nothing."""
    stage = values["stage"]
    if stage in ("sft", "dpo"):
        own = _dpo_problems(values["dpo"] or {}) if stage == "dpo" else []
        return own + ([] if values["reward"] is None else _reward_problems(values["reward"], stage))
    if stage in ("ppo", "grpo"):
        own = _ppo_problems(values) if stage == "ppo" else _grpo_problems(values)
        if values["tune"]["dropout"]:
            own.append(("tune.dropout", f"stage {stage} trains without dropout: a ratio of probabilities of the same "
                        "weights must be 1, which a drawn mask would spoil; leave it out"))  # fmt: skip
        return _reward_problems(values["reward"] or {}, stage) + own
    return []


def _dpo_problems(dpo: Mapping[str, Any]) -> Problems:
    loss = dpo.get("loss", "sigmoid")
    problems: Problems = []
    for key, losses in _DPO_KEYS.items():
        if dpo.get(key) is not None and loss not in losses:
            wanted = " or ".join(sorted(losses))
            problems.append((f"dpo.{key}", f"`dpo.{key}` does nothing with loss {loss}; it is for {wanted}"))
    return problems


def _reward_problems(reward: Mapping[str, Any], stage: str) -> Problems:
    parts = reward_parts(reward)
    problems: Problems = []
    if not parts:
        problems.append(("reward", f"stage {stage} needs a reward: `reward: {{run: RUN}}`, "
                         "`{function: file.py:name}`, or one of model, contains, regex, exact, length"))  # fmt: skip
    if reward.get("ensemble") and "," not in (reward.get("run") or ""):
        problems.append(("reward.ensemble", "`reward.ensemble` is for several runs: name them in `reward.run`, "
                         "separated by commas"))  # fmt: skip
    for name in reward.get("weights") or {}:
        if name not in parts:
            known = ", ".join(parts) or "none"
            problems.append(
                (f"reward.weights.{name}", f"`reward.weights.{name}` weighs no part; the parts are {known}")
            )
    if len(set(parts)) != len(parts):
        problems.append(("reward.function", "two reward functions have the same name; rename one"))
    for text in _functions(reward):
        file, colon, name = text.rpartition(":")
        if not colon or not file.endswith(".py") or not name.isidentifier():
            problems.append(("reward.function", f"`{text}` is not `file.py:name`"))
    for key in ("regex", "answer_pattern"):
        try:
            re.compile(reward.get(key) or "")
        except re.error as error:
            problems.append((f"reward.{key}", f"`reward.{key}` is not a regular expression: {error}"))
    if reward.get("answer_pattern") and not reward.get("exact"):
        problems.append(("reward.answer_pattern", "`reward.answer_pattern` is for `reward.exact: true`"))
    return problems


def reward_parts(reward: Mapping[str, Any]) -> list[str]:
    """The names of a reward's parts, in the order they are logged; a function goes by its own name."""
    names: list[str] = []
    for key in PARTS:
        if key == "function":
            names += [text.rpartition(":")[2] for text in _functions(reward)]
        elif reward.get(key) not in (None, False, [], ""):
            names.append(key)
    return names


def _functions(reward: Mapping[str, Any]) -> list[str]:
    found = reward.get("function") or []
    return [found] if isinstance(found, str) else list(found)


def _ppo_problems(values: Mapping[str, Any]) -> Problems:
    ppo = values["ppo"] or {}
    problems: Problems = []
    if ppo.get("minibatches", 1) > ppo.get("rollouts", 64):
        problems.append(("ppo.minibatches", "`ppo.minibatches` is more than `ppo.rollouts`; a step needs a rollout"))
    if ppo.get("critic") == "shared" and ppo.get("critic_learning_rate") is not None:
        problems.append(("ppo.critic_learning_rate", "`ppo.critic_learning_rate` does nothing with a shared critic"))
    if ppo.get("ptx_coef", 0) > 0 and ppo.get("ptx_data") is None:
        problems.append(("ppo.ptx_data", "`ppo.ptx_coef` needs `ppo.ptx_data`: text to mix in"))
    if ppo.get("ptx_data") is not None and ppo.get("ptx_coef", 0) == 0:
        problems.append(("ppo.ptx_coef", "`ppo.ptx_data` does nothing while `ppo.ptx_coef` is 0"))
    if ppo.get("kl_target") is not None and ppo.get("kl_coef") == 0:
        problems.append(("ppo.kl_target", "`ppo.kl_target` cannot adapt a `ppo.kl_coef` of 0"))
    num = (values["sampling"] or {}).get("num_per_prompt") or 1
    if ppo.get("rollouts", 64) % num:
        problems.append(("ppo.rollouts", f"`ppo.rollouts` must be a multiple of `sampling.num_per_prompt`, {num}"))
    return problems


def _grpo_problems(values: Mapping[str, Any]) -> Problems:
    grpo = values["grpo"] or {}
    problems: Problems = []
    if (values["sampling"] or {}).get("num_per_prompt") is not None:
        problems.append(("sampling.num_per_prompt", "`sampling.num_per_prompt` does nothing in stage grpo; it is "
                         "`grpo.group`"))  # fmt: skip
    if grpo.get("minibatches", 1) > grpo.get("prompts", 8):
        problems.append(("grpo.minibatches", "`grpo.minibatches` is more than `grpo.prompts`; groups are not split"))
    overlong = grpo.get("overlong") or _GRPO[grpo.get("variant", "grpo")]["overlong"]
    if grpo.get("overlong_buffer") is not None and overlong != "penalty":
        problems.append(("grpo.overlong_buffer", "`grpo.overlong_buffer` is for `grpo.overlong: penalty`"))
    return problems
