"""What depends on the stage and the method: defaults, keys that would do nothing, and values that look wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.recipe_alignment import alignment_defaults, alignment_problems
from tunesmith.recipe_metrics import ARGUMENTS, metric_names, metric_problems

DEFAULTS: dict[str, float] = {
    "full": 2e-5, "last_layers": 5e-5, "head": 1e-3, "lora": 2e-4, "bias": 1e-3, "peft": 1e-3
}  # fmt: skip
"""Learning rate by method. An adapter starts at zero and is small, so it wants about ten times the rate of a full
run (LoRA, 2106.09685, appendix D: 5e-6 full and 2e-4 LoRA on GPT-3)."""

_FULL_RATE = {"reward": 9e-6, "dpo": 1e-6, "ppo": 1e-6, "grpo": 1e-6}
"""Rate of a full run where it is not `DEFAULTS["full"]`; other methods keep their ratio to it. InstructGPT's reward
model (2203.02155, appendix C.2), DPO (2305.18290, appendix B), GRPO's policy (2402.03300, 4.2)."""


def default_rate(stage: str, method: str) -> float:
    """The learning rate when the recipe names none. A new head starts at random whatever the stage: it keeps its own.

    A reward model by LoRA gets 9e-5, a policy 1e-5.
    """
    if stage not in _FULL_RATE or method == "head":
        return DEFAULTS[method]
    return float(f"{DEFAULTS[method] * _FULL_RATE[stage] / DEFAULTS['full']:.2g}")


METHOD_KEYS = {
    "layers": {"last_layers"},
    "rank": {"lora"},
    "alpha": {"lora"},
    "dropout": {"lora"},
    "targets": {"lora"},
    "init": {"lora"},
    "rank_stabilized": {"lora"},
    "dora": {"lora"},
    "quantize": {"lora"},
    "adapter": {"lora"},
    "train_also": {"lora", "peft", "bias"},
    "peft": {"peft"},
    "cache_features": {"head"},
}
_ADAPTER_KEYS = ("rank", "alpha", "dropout", "targets", "init", "rank_stabilized", "dora", "train_also")
"""What an adapter that is gone on from has settled already."""
_ASKED = {"sft", "reward", "dpo", "ppo", "grpo"}
_ONLINE = {"ppo", "grpo"}
SCORED = {"sft", "dpo"}
"""Stages that may be selected by the reward of their completions, and do without one otherwise."""
_STAGE_KEYS = {
    "data.template": _ASKED,
    "data.train_on_prompt": {"sft"},
    "data.multi_label": {"classify"},
    "data.mask_rate": {"mlm"},
    "tune.cache_features": {"classify"},
    "train.batch_examples": {"pretrain", "mlm", "sft", "classify", "reward", "dpo"},
    "train.batch_tokens": {"pretrain", "mlm", "sft", "classify", "reward", "dpo"},
    "evaluate.generate": {"sft", "dpo"},
    "evaluate.metrics": set(ARGUMENTS),
    "evaluate.sentences": {"classify"},
    "evaluate.baselines": {"classify", "sft"},
    "evaluate.baseline_rows": {"classify"},
    "evaluate.prompting": {"classify", "sft"},
    "evaluate.row_losses": {"pretrain", "mlm", "sft", "classify", "reward", "dpo"},
    "forget.replay": {"pretrain", "mlm", "sft", "classify"},
    "reward_model": {"reward"},
    "dpo": {"dpo"},
    "reward": _ONLINE | SCORED,
    "sampling": _ONLINE,
    "ppo": {"ppo"},
    "grpo": {"grpo"},
}
OWN_SECTIONS = tuple(key for key in _STAGE_KEYS if "." not in key)
"""Sections that exist for some stages only."""
METRICS = {
    "pretrain": ("loss", "perplexity", "bits_per_byte"),
    "mlm": ("loss", "perplexity"),
    "sft": ("loss", "perplexity", "bits_per_byte"),
    "classify": ("loss", "accuracy", "f1", "mcc"),
    "reward": ("loss", "accuracy", "margin"),
    "dpo": ("loss", "accuracy", "margin"),
    "ppo": ("reward", "kl", "response_length", "ended"),
    "grpo": ("reward", "kl", "response_length", "ended"),
}
_SELECT_BY = {"classify": "accuracy", "reward": "accuracy", "dpo": "accuracy", "ppo": "reward", "grpo": "reward"}
_EPOCHS = {"pretrain": 1.0, "reward": 1.0, "dpo": 1.0, "ppo": 1.0, "grpo": 1.0}
"""A reward model overfits from the second epoch on (InstructGPT, 2203.02155, appendix C.2), preferences likewise."""
_EXAMPLES = 16


BASELINES = {
    "classify": ("majority", "tfidf", "linear_probe", "nearest_neighbour", "zero_shot", "few_shot"),
    "sft": ("nearest_neighbour", "zero_shot", "few_shot"),
}
"""The baselines that a stage has."""
CHEAP_BASELINES = {"classify": BASELINES["classify"][:4], "sft": ("nearest_neighbour",)}
"""Those that are measured when the recipe names none."""


def does_nothing(key: str, stage: str) -> bool:
    """True for a key, or a section, that the stage has no use for."""
    return any(stage not in stages and (key == k or key.startswith(f"{k}.")) for k, stages in _STAGE_KEYS.items())


def method_defaults(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value for what the user left open."""
    method, train = values["tune"]["method"], values["train"]
    found: dict[str, Any] = {"train.learning_rate": default_rate(stage, method)}
    if train["steps"] is None:
        found["train.epochs"] = _EPOCHS.get(stage, 3.0)
    if train["batch_tokens"] is None and not does_nothing("train.batch_examples", stage):
        found["train.batch_examples"] = _EXAMPLES
    if method == "lora":
        found["train.adapter_b_rate_ratio"] = 1.0
    if method == "lora" and values["tune"]["adapter"] is None:
        found |= {
            "tune.rank": 16, "tune.alpha": float(2 * (values["tune"]["rank"] or 16)), "tune.dropout": 0.0,
            "tune.targets": "all-linear", "tune.init": "default", "tune.rank_stabilized": False, "tune.dora": False,
        }  # fmt: skip
    if method == "last_layers":
        found["tune.layers"] = 1
    if _has_eval(values["data"]):
        found["train.select_by"] = _SELECT_BY.get(stage, "loss")
    if values["forget"] is not None:
        found["forget.on_exceed"] = "stop" if stage in _ONLINE else "go_back"
    if stage in _ASKED and len(asked := _part_templates(values["data"])) == 1 and asked != {None}:
        found["data.template"] = next(iter(asked))
    return found | alignment_defaults(values)


def _part_templates(data: Mapping[str, Any]) -> set[str | None]:
    """The templates of a mix's parts, None for a part without one."""
    return {None if part["template"] == "none" else part["template"] for part in data["mix"] or ()}


def _has_eval(data: Mapping[str, Any]) -> bool:
    return data["eval"] is not None or data["split"] is not None


def check_together(raw: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """(problems as (key, text), warnings) from keys that contradict each other or would do nothing."""
    problems = idle_keys(raw, values) + _undone(raw, values) + _contradictions(values) + alignment_problems(values)
    return problems, _warnings(values)


def _given(raw: Mapping[str, Any], key: str, *, null: bool = True) -> bool:
    """Whether the recipe names the key; without `null`, whether it gives it a value."""
    at: Any = raw
    for part in key.split("."):
        if not isinstance(at, dict) or part not in at:
            return False
        at = at[part]
    return null or at is not None


def idle_keys(raw: Mapping[str, Any], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys in `raw` that do nothing under the stage and the method of `values`, as (key, text)."""
    stage, method = values["stage"], values["tune"]["method"]
    problems = []
    for key, methods in METHOD_KEYS.items():
        if _given(raw, f"tune.{key}", null=False) and method not in methods:
            wanted = " or ".join(sorted(methods))
            problems.append((f"tune.{key}", f"`tune.{key}` does nothing with method {method}; it is for {wanted}"))
    for key, stages in _STAGE_KEYS.items():
        if _given(raw, key, null=False) and stage not in stages:
            problems.append((key, f"`{key}` does nothing in stage {stage}; it is for {' or '.join(sorted(stages))}"))
    if _given(raw, "train.adapter_b_rate_ratio") and method != "lora":
        problems.append(("train.adapter_b_rate_ratio", "`train.adapter_b_rate_ratio` is for method lora"))
    return problems


def _undone(raw: Mapping[str, Any], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys in `raw` that another key takes the effect from."""
    problems = []
    for name in _ADAPTER_KEYS if values["tune"]["adapter"] is not None else ():
        if _given(raw, f"tune.{name}", null=False):
            text = f"`tune.{name}` does nothing beside `tune.adapter`: the adapter goes on with its own settings"
            problems.append((f"tune.{name}", text))
    if values["train"]["early_stopping"] and _given(raw, "train.select_by") and values["train"]["select_by"] is None:
        text = "`train.early_stopping` needs a metric that stops improving: name one as `train.select_by`"
        problems.append(("train.select_by", text))
    if values["data"]["max_per_key"] is not None and values["data"]["group_key"] is None:
        problems.append(("data.max_per_key", "`data.max_per_key` counts the rows of each value of a column: name the "
                         "column as `data.group_key`"))  # fmt: skip
    return problems


def _partial(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sources that say how a part is drawn, and not how large it is."""
    sources = [(f"data.{name}", data[name]) for name in ("train", "eval", "test") if isinstance(data[name], dict)]
    sources += [(f"data.mix.{number}", part) for number, part in enumerate(data["mix"] or ())]
    return [
        (f"{key}.{name}", f"`{key}.{name}` is for a part of the rows: say of how many, as `{key}.rows`")
        for key, source in sources
        for name in ("balance", "seed")
        if source["rows"] is None and source[name] not in (None, 0)
    ]


def _contradictions(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, train, stage = values["data"], values["train"], values["stage"]
    problems = []
    if (data["train"] is None) == (data["mix"] is None):
        problems.append(("data", "name the training data once: `data.train: FILE` or `data.mix: [...]`"))
    if train["epochs"] is not None and train["steps"] is not None:
        problems.append(("train.steps", "`train.epochs` and `train.steps` both say how long to train; keep one"))
    if train["batch_examples"] is not None and train["batch_tokens"] is not None:
        problems.append(
            ("train.batch_tokens", "`train.batch_examples` and `train.batch_tokens` both size a step; keep one")
        )
    if stage in _ASKED and data["template"] is None and len(_part_templates(data)) > 1:
        problems.append(("data.mix", "the parts of `data.mix` have different templates: name as `data.template` the "
                         "one of held-out rows and of prompts after training, or `none`"))  # fmt: skip
    if data["on_too_long"] == "split" and stage not in ("pretrain", "mlm"):
        problems.append(("data.on_too_long", f"`split` would cut an answer in two; stage {stage} takes error, "
                         "truncate_left, truncate_right or drop"))  # fmt: skip
    if values["tune"]["method"] == "peft" and not (values["tune"]["peft"] or {}).get("peft_type"):
        problems.append(("tune.peft", "method peft needs `tune.peft: {peft_type: IA3, ...}`"))
    if values["tune"]["method"] == "head" and stage not in ("classify", "reward"):
        problems.append(("tune.method", "method head trains a new output head, which only classify and reward have; "
                         "take last_layers for a language model"))  # fmt: skip
    problems += _partial(data)
    select = train["select_by"]
    measured = METRICS[stage] + (("reward",) if stage in SCORED and values["reward"] else ()) + metric_names(values)
    if select is not None and select not in measured:
        problems.append(("train.select_by", f"`{select}` is not measured in stage {stage}; take {', '.join(measured)}"))
    if (select is not None or train["early_stopping"]) and not _has_eval(data):
        problems.append(
            ("train.select_by", "choosing a checkpoint needs held-out rows: add `data.eval` or `data.split`")
        )
    problems += metric_problems(values, held_out=_has_eval(data)) if stage in ARGUMENTS else []
    problems += _baseline_problems(values)
    problems += _forget_problems(values)
    if train["warmup"] > 1 and train["warmup"] != int(train["warmup"]):
        problems.append(("train.warmup", "`train.warmup` is a share below 1 or a whole number of steps"))
    return problems


def _baseline_problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    evaluate, stage = values["evaluate"], values["stage"]
    asked = evaluate["baselines"]
    problems = []
    for name in asked if isinstance(asked, list) and stage in BASELINES else ():
        if name not in BASELINES[stage]:
            problems.append(("evaluate.baselines", f"stage {stage} has no baseline `{name}`; it has "
                             f"{', '.join(BASELINES[stage])}"))  # fmt: skip
    if asked and values["data"]["multi_label"]:
        problems.append(("evaluate.baselines", "baselines are for rows with one label; `data.multi_label` has several"))
    if isinstance(asked, list) and stage == "sft" and "nearest_neighbour" in asked and evaluate["generate"] is None:
        problems.append(("evaluate.baselines", "nearest_neighbour answers in text: add `evaluate.generate`, by which "
                         "texts are judged"))  # fmt: skip
    if asked and not _has_eval(values["data"]) and values["data"]["test"] is None:
        problems.append(("evaluate.baselines", "baselines need held-out rows: add `data.eval` or `data.split`"))
    template = evaluate["prompting"]["template"]
    if "{text}" not in template or not template.endswith("{label}"):
        problems.append(("evaluate.prompting.template", "it holds `{text}` and ends with `{label}`, which the base is "
                         "asked for"))  # fmt: skip
    return problems


def _forget_problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    forget, problems = values["forget"], []
    if forget is None:
        return []
    if forget["on_exceed"] == "go_back" and values["stage"] in _ONLINE:
        problems.append(("forget.on_exceed", "`go_back` would leave rollouts of weights that are gone; stage "
                         f"{values['stage']} takes stop or go_on"))  # fmt: skip
    replay = forget["replay"]
    if replay is not None and replay["ratio"] > replay["most"]:
        problems.append(("forget.replay.most", f"`most` is {replay['most']:g}, below the ratio it begins with, "
                         f"{replay['ratio']:g}"))  # fmt: skip
    return problems


def _warnings(values: Mapping[str, Any]) -> list[str]:
    stage, rate, method = values["stage"], values["train"]["learning_rate"], values["tune"]["method"]
    full, lora = default_rate(stage, "full"), default_rate(stage, "lora")
    found = []
    if rate is not None and method == "full" and rate >= lora / 2:
        found.append(f"train.learning_rate {rate:g} is an adapter's rate; a full run usually wants {full:g}")
    if rate is not None and method == "lora" and rate < lora / 10:
        found.append(f"train.learning_rate {rate:g} is a full run's rate; LoRA usually wants {lora:g}")
    if not _has_eval(values["data"]):
        found.append("no held-out rows (data.eval or data.split): the run cannot tell whether it helped")
    return found
