"""How cost grows: speed, memory and time to the first step as data, rows, vocabulary and rollouts grow.

    python benchmarks/growth.py [--threads 2]

Writes benchmarks/results/growth.md. Each line is one run of `tunesmith train` in a process of its own, on the 15M
shape; nothing is cached between them.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from contest import Contestant, Outcome, Work, run_contest
from material import SHAPES, Shape, model_folder, rows_file

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".bench"
US = Contestant("tunesmith")


def measured(work: Work) -> Outcome:
    """One run; stops the script where it fails."""
    outcome = run_contest(work, [US], rounds=1)["tunesmith"][0]
    if outcome.error:
        raise SystemExit(f"{work.name}: {outcome.error}")
    return outcome


def line(label: str, outcome: Outcome) -> str:
    """A row of a table."""
    return (f"| {label} | {outcome.tokens_per_second:,.0f} | {outcome.peak_memory_bytes / 1e6:,.0f} "
            f"| {outcome.first_step_seconds:.1f} |")  # fmt: skip


def table(what: str, lines: Sequence[str]) -> str:
    """A table of one thing that grows."""
    head = f"| {what} | tokens/s | peak memory MB | command to first step, s |\n|--:|--:|--:|--:|\n"
    return head + "\n".join(lines)


def work_of(shape: str, kind: str, rows: int, batch: int, threads: int, steps: int = 8) -> Work:
    """LoRA sft on synthetic rows."""
    data = rows_file(CACHE, kind, rows, SHAPES[shape].vocabulary)
    return Work(f"growth {shape}", "sft", model_folder(CACHE, shape), data, "lora", batch, steps=steps, threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    CACHE.mkdir(exist_ok=True)
    for vocabulary in (8000, 64000, 128000):
        SHAPES[f"15M-{vocabulary}"] = replace(SHAPES["15M"], vocabulary=vocabulary)
    data = [line(f"{rows:,} rows", measured(work_of("15M", "pairs", rows, 16, threads))) for rows in (200, 2000, 20000)]
    batch = [
        line(f"{rows} rows a step", measured(work_of("15M", "pairs", 2000, rows, threads))) for rows in (8, 32, 128)
    ]
    words = [
        line(f"{shape.vocabulary:,} tokens", measured(work_of(name, "pairs", 200, 16, threads)))
        for name, shape in _by_vocabulary()
    ]
    prompts = rows_file(CACHE, "prompts", 512, SHAPES["15M"].vocabulary)
    rolled = [
        line(f"{count} rollouts", measured(
            Work("growth grpo", "grpo", model_folder(CACHE, "15M"), prompts, "lora", count, steps=3, threads=threads)
        ))
        for count in (16, 64, 256)
    ]  # fmt: skip
    text = "\n\n".join([
        "# How cost grows",
        f"`python benchmarks/growth.py --threads {threads}` on {datetime.date.today()}; 15M Llama shape, LoRA r=16 on "
        "all linears, bfloat16; one run a line, medians of its steps after the second.",
        "## Data", table("training rows", data), "## Rows in a step", table("batch", batch),
        "## Vocabulary", table("vocabulary", words), "## Rollouts in a step of grpo, 64 tokens each",
        table("rollouts", rolled),
    ])  # fmt: skip
    path = Path(__file__).parent / "results" / "growth.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def _by_vocabulary() -> list[tuple[str, Shape]]:
    return sorted(((n, s) for n, s in SHAPES.items() if n.startswith("15M")), key=lambda item: item[1].vocabulary)


if __name__ == "__main__":
    main()
