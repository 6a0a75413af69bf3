"""dpo: preferences learned without a reward model: held-out accuracy, and a win rate judged by one that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RECIPES, interval, place, rows_of, table, train, write
from pairs import answers, instruction_pairs, length_baseline, read, split, words_baseline

import tunesmith
from tunesmith.evaluate.intervals import bootstrap, mean_statistic

METRICS = ("accuracy", "loss", "margin")


def main() -> None:
    where, options = place("dpo")
    base = where.asset("models/tinystories-656K")
    source = where.asset("data/instruction/instruction-data-with-preference.json")
    files = split(instruction_pairs(source), where.runs / "data")
    run, judge = where.runs / "instruction", options.runs.resolve() / "reward" / "instruction"
    train(run, RECIPES / "dpo.yaml", f"base={base}", f"data.train={files[0]}", f"data.eval={files[1]}")
    sections = [_accuracy(run, *files)]
    if (judge / "result.json").is_file():
        sections.append(_win_rate(run, base, judge, files[1], where.runs))
    write("dpo", "dpo: preferences without a reward model, 656,000 parameters", *sections, _samples(run))


def _accuracy(run: Path, train_file: Path, eval_file: Path) -> str:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    known, held = ([answers(row) for row in read(path)] for path in (train_file, eval_file))
    rows = [(name, *(interval(result[when][name]) for when in ("before", "after"))) for name in METRICS]
    simple = {"length alone": length_baseline(known, held), "bag of words": words_baseline(known, held)}
    rows += [
        (f"accuracy of {name}", "", interval(bootstrap(mean_statistic("accuracy", values)).as_json()))
        for name, values in simple.items()
    ]
    probe = {when: interval(result["probe"][when]["bits_per_byte"]) for when in ("before", "after")}
    rows.append(("bits per byte outside the task", probe["before"], probe["after"]))
    note = (
        f"{len(known):,} training pairs, {len(held):,} held out by prompt; {result['tokens']:,} tokens in "
        f"{result['train_seconds']:.0f} s of steps. A pair is right when the better answer's log-prob has risen more "
        "over the reference's than the worse one's; before training nothing has risen, which counts as one half."
    )
    return f"## Held-out pairs\n\n{note}\n\n{table(('', 'before', 'after'), rows)}"


def _win_rate(run: Path, base: Path, judge: Path, eval_file: Path, folder: Path) -> str:
    found = tunesmith.winrate(
        str(run), str(base), str(eval_file), judge=f"reward:{judge}", max_tokens=64, to=folder / "winrate.jsonl"
    )
    rate = found["win_rate"]
    told = "no measurable difference" if rate["low"] <= 0.5 <= rate["high"] else "a measurable difference"
    counts = f"{found['wins']} wins, {found['ties']} ties, {found['losses']} losses"
    return (
        "## Win rate over its own start\n\nJudge: the reward model of evidence/reward.py; greedy completions of at "
        f"most 64 tokens, a tie counts half. {interval(rate)}: {told} ({counts})."
    )


def _samples(run: Path) -> str:
    parts = ["## The same prompts, before and after"]
    for row in rows_of(run / "samples.jsonl")[:3]:
        blocks = "\n".join(f"{key}: {_one_line(row[key])}" for key in ("prompt", "before", "after"))
        parts.append(f"```text\n{blocks}\n```")
    return "\n\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())[:400]


if __name__ == "__main__":
    main()
