"""Repeat the evidence: all parts, or those that are named.

    python evidence/run.py [PART ...] [--list] [--encoder FOLDER] [--runs FOLDER]

Each part is a script of its own that writes evidence/results/PART.md. Runs are kept: a part that was interrupted goes
on where it stopped, and one that is finished is only written again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = {
    "reliability": "kills, cut-off saves, full disks, damaged files, planted bugs (about 30 minutes)",
    "planted_faults": "faults of each kind in four real sets: planted, found, false alarms, gates (about 2 minutes)",
    "pretrain": "5,000 unlabelled reviews: bits per byte before and after (about 10 minutes)",
    "sft": "1,000 instructions: do completions end by themselves (about 5 minutes)",
    "reward": "reward models on two sets of preferences, against length and a bag of words (about 5 minutes)",
    "dpo": "preferences without a reward model: held-out accuracy and win rate (about 5 minutes)",
    "chain": "sft, reward and ppo from one file, killed twice and resumed; win rates (about 8 minutes)",
    "toy_reward": "grpo and ppo on a task whose optimum is known (about 2 minutes)",
    "ppo": "towards positive reviews: three seeds, three prices of the KL, fluency (about 5 minutes)",
    "grpo": "the same by grpo (about 4 minutes)",
    "row_losses": "5 % of the labels flipped: how many are found by what rows cost (about 8 minutes)",
    "features": "a classifier's head alone, its body run at each step or once; the neighbour's case (about 30 minutes)",
    "quantize": "LoRA beside a base in 32, 8 and 4 bits: loss, memory, seconds a step (about 4 minutes)",
    "author": "three reviewers who sign: each learned apart, all three measured (about 5 minutes)",
    "multitask": "two tasks at once against one after another; a kind of instruction held out (about 10 minutes)",
    "latency": "merged and unmerged forwards, serve over HTTP, predict (about 3 minutes)",
    "memory_limit": "the worked example under limits of memory, down to one that is too low (about 8 minutes)",
    "learning_curve": "100, 300 and 1,000 examples, tuned against from scratch (about 15 minutes)",
    "embedded_base": "the base that comes with the program, beside story models, gzip and 5-grams (about 10 minutes)",
    "plan_error": "the memory plan against real runs, 52 of them (about 25 minutes)",
    "small_beats_large": "small models tuned on reviews against larger ones that are only asked (about 15 minutes)",
    "compare_ways": "five ways to tune, three seeds, with two bases, by `compare` (about 1 hour)",
    "compare_bases": "four bases tuned alike on the same reviews, two seeds, by `compare` (about 25 minutes)",
    "compare_instructions": "three ways to tune on instructions, two rates, two seeds, by `compare` (about 8 minutes)",
    "all_reviews": "all of IMDB against 1,000 reviews, two bases (about 1 hour)",
    "worked_example": "IMDB with LoRA and four other ways to tune (about 2 hours)",
}
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    options, passed = parser.parse_known_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.list:
        print("\n".join(f"{part:16} {what}" for part, what in PARTS.items()))
        return 0
    failed = []
    for part in options.parts or PARTS:
        print(f"== {part}: {PARTS[part]}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{part}.py"), *passed]).returncode != 0:
            failed.append(part)
    print(f"failed: {', '.join(failed)}" if failed else "all parts done", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
