"""sft: 1,100 instructions, a tenth held out, on the model of evidence/pretrain.py; do its completions end?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RECIPES, interval, place, rows_of, table, train, write

import tunesmith

EPOCHS = (6, 12)
"""Both are measured: a model this small learns late to stop, and goes round in circles until then."""


def main() -> None:
    where, options = place("sft")
    where.runs.mkdir(parents=True, exist_ok=True)
    data = where.asset("data/instruction/instruction-data.json")
    bases = {"models/tinystories-656K": where.asset("models/tinystories-656K")}
    reviews = options.runs.resolve() / "pretrain" / "reviews"
    if (reviews / "result.json").is_file():
        bases["the same after evidence/pretrain.py"] = _exported(reviews, where.runs / "after-pretrain")
    sections, run = [], where.runs
    for name, base in bases.items():
        for epochs in EPOCHS:
            run = where.runs / f"{base.name}-{epochs}"
            train(run, RECIPES / "sft.yaml", f"base={base}", f"data.train={data}", f"train.epochs={epochs}")
            sections.append(_summary(f"{name}, {epochs} epochs", run))
            write("sft", "sft: instructions on a model of 656,000 parameters", *sections, _samples(run))


def _exported(run: Path, to: Path) -> Path:
    if not to.exists():
        tunesmith.export(run, to, "merged")
    return to


def _summary(name: str, run: Path) -> str:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    rows = [
        (metric.replace("_", " "), *(interval(result[when][metric]) for when in ("before", "after")))
        for metric in ("share_ended", "loss", "bits_per_byte", "rouge_l", "bleu", "exact_match")
        if metric in result["after"]
    ]
    ended = result["after"]["share_ended"]
    note = (
        f"{result['tokens']:,} tokens in {result['train_seconds']:.0f} s of steps. Of {ended['n']} held-out prompts, "
        f"{ended['value'] * ended['n']:.0f} completions (greedy, at most 128 tokens) ended by themselves."
    )
    return f"## From {name}\n\n{note}\n\n{table(('metric', 'before', 'after'), rows)}"


def _samples(run: Path) -> str:
    note = "This model is far too small to be right; that it answers and stops is the point."
    parts = [f"## The same prompts, before and after\n\n{note}"]
    for row in rows_of(run / "samples.jsonl")[:4]:
        blocks = "\n".join(f"{key}: {_one_line(row[key])}" for key in ("prompt", "before", "after"))
        parts.append(f"```text\n{blocks}\n```")
    return "\n\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())[:400]


if __name__ == "__main__":
    main()
