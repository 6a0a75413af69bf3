"""reward: reward models on two sets of preferences against chance, length alone and a bag of words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RECIPES, interval, place, table, train, write
from pairs import answers, dialogue_pairs, instruction_pairs, length_baseline, read, split, words_baseline

from tunesmith.evaluate.intervals import bootstrap, mean_statistic

SETS = {
    "instruction": ("data/instruction/instruction-data-with-preference.json", instruction_pairs, ()),
    "hh-rlhf": (
        "data/hh-rlhf/harmless-base-test.jsonl.gz", dialogue_pairs,
        ("data.on_bad_row=skip", "train.epochs=1", "data.max_length=128"),
    ),
}  # fmt: skip
"""File, reader, and what is set otherwise than in the recipe: dialogues are long and many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, action="append", help="only this set of preferences")
    where, options = place("reward", parser)
    base = where.asset("models/tinystories-656K")
    sections = []
    for name in options.set or SETS:
        source, rows_of, settings = SETS[name]
        files = split(rows_of(where.asset(source)), where.runs / f"{name}-data")
        run = where.runs / name
        train(
            run, RECIPES / "reward.yaml", f"base={base}", f"data.train={files[0]}", f"data.eval={files[1]}", *settings
        )
        sections.append(_summary(name, run, *files))
    write("reward", "reward: what a model of 656,000 parameters learns of preferences", *sections)


def _summary(name: str, run: Path, train_file: Path, eval_file: Path) -> str:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    known, held = ([answers(row) for row in read(path)] for path in (train_file, eval_file))
    baselines = {"length alone": length_baseline(known, held), "bag of words": words_baseline(known, held)}
    shares = {n: bootstrap(mean_statistic("accuracy", v)).as_json() for n, v in baselines.items()}
    rows = [
        ("chance", "0.500"),
        *((n, interval(found)) for n, found in shares.items()),
        ("reward model before training", interval(result["before"]["accuracy"])),
        ("reward model after", interval(result["after"]["accuracy"])),
    ]
    tokens = SETS[name][2][-1].rpartition("=")[2] if SETS[name][2] else "256"
    calibration, error = result["calibration"], result["reliability"]["error"]
    note = (
        f"{len(known):,} training pairs, {len(held):,} held out by prompt, cut to their last {tokens} tokens; "
        f"the model saw the {calibration['demonstrations']:,} and {result['after']['accuracy']['n']:,} whose answers "
        "fit, the baselines all. "
        f"{result['tokens']:,} tokens in {result['train_seconds']:.0f} s of steps. {calibration['demonstrations']:,} "
        f"demonstrations averaged {calibration['shift']:+.3f} and average {calibration['mean']:+.0e} after the shift. "
        f"Held-out loss {interval(result['before']['loss'])} before, {interval(result['after']['loss'])} after; "
        f"expected calibration error {error:.3f}."
    )
    best = max(shares, key=lambda n: shares[n]["value"])
    ahead = shares[best]["value"] > result["after"]["accuracy"]["value"]
    note += f" {best.capitalize()} does {'better' if ahead else 'no better'} than this model."
    compared = table(("accuracy on held-out pairs", "value [95 %]"), rows)
    return f"## {name}\n\n{note}\n\n{compared}\n\n{_reliability(result)}"


def _reliability(result: dict[str, Any]) -> str:
    rows = [
        (entry["n"], f"{entry['predicted']:.3f}", f"{entry['observed']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]")
        for entry in result["reliability"]["bins"]
    ]
    return table(("pairs", "sure by", "in the right order [95 %]"), rows)


if __name__ == "__main__":
    main()
