"""Two tasks at once against one after another, and a kind of instruction that training never saw."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
from by_file import Rows, gap, rows_by_file, signed, value, write_rows
from common import RECIPES, Place, place, table, train, write

TASKS = ("instructions", "sentiment")
SEEDS = (42,)
ROWS = 800
"""Rows of each task in the mix, and in each of two stages one after another."""
HELD_OUT = {"instructions": 110, "sentiment": 200}
BATCH = 16
WORDS = 30
"""Last words kept of a review."""
KINDS = ("Rewrite", "Convert")
"""First words of the instructions that are left out, one at a time."""
WAYS = {"both at once": None, "instructions, then sentiment": TASKS, "sentiment, then instructions": TASKS[::-1]}
Row = dict[str, str]


def main() -> None:
    where, _ = place("multitask")
    data = where.runs / "data"
    sizes = _files(where, data)
    runs = {(way, seed): _run(where.runs, data, sizes, way, seed) for way in WAYS for seed in SEEDS}
    kinds = _kinds(where, where.runs / "kinds")
    title = "Two tasks at once against one after another; a kind of instruction held out"
    write("multitask", title, *_tasks(runs, sizes), _kind_section(*kinds))


def _instructions(where: Place) -> list[Row]:
    """Each prompt once, in a seeded order."""
    found: dict[str, Row] = {}
    for row in json.loads(where.asset("data/instruction/instruction-data.json").read_text()):
        prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        if row["output"].strip():
            found.setdefault(prompt, {"prompt": prompt, "completion": row["output"]})
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    return rows


def _sentiment(where: Place) -> list[Row]:
    with gzip.open(where.asset("data/imdb/imdb_train.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    found: dict[str, Row] = {}
    for row in rows:
        words = row["text"].replace("<br />", " ").split()[-WORDS:]
        prompt = f"{' '.join(words)}\n\nIs this review positive?"
        answer = f"The review is {'positive' if row['label'] else 'negative'}."
        found.setdefault(prompt, {"prompt": prompt, "completion": answer})
    return list(found.values())[: ROWS + HELD_OUT["sentiment"]]


def _files(where: Place, data: Path) -> dict[str, int]:
    """Training rows there are of each task."""
    sizes = {}
    for task, rows in (("instructions", _instructions(where)), ("sentiment", _sentiment(where))):
        held = HELD_OUT[task]
        write_rows(data / f"held-{task}.jsonl", rows[:held])
        write_rows(data / f"train-{task}.jsonl", rows[held:])
        sizes[task] = len(rows) - held
    return sizes


def _run(runs: Path, data: Path, sizes: dict[str, int], way: str, seed: int) -> Path:
    """The folder that holds what the way ends with."""
    order = WAYS[way]
    run = runs / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    common = [f"data.eval={data / 'held-*.jsonl'}", f"seed={seed}"]
    if order is None:
        parts = ", ".join(f"{{path: {data / f'train-{task}.jsonl'}, weight: 1}}" for task in TASKS)
        train(
            run, RECIPES / "multitask.yaml", f"data.mix=[{parts}]", "train.epochs=null",
            f"train.steps={2 * ROWS // BATCH}", *common,
        )  # fmt: skip
        return run
    for stage, task in zip(("first", "second"), order, strict=True):
        common += [f"stages.{stage}.data.train={data / f'train-{task}.jsonl'}",
                   f"stages.{stage}.train.epochs={ROWS / sizes[task]}"]  # fmt: skip
    train(run, RECIPES / "one_after_another.yaml", *common)
    return run / "2-second"


def _tasks(runs: dict[tuple[str, int], Path], sizes: dict[str, int]) -> list[str]:
    rows, losses = [], {key: rows_by_file(run, "after", "loss") for key, run in runs.items()}
    for (way, seed), run in runs.items():
        right = rows_by_file(run, "after", "exact_match")["held-sentiment"]
        ended = [value(losses[way, seed][f"held-{task}"]) for task in TASKS]
        stages = [run] if WAYS[way] is None else [run.parent / "1-first", run]
        tokens = sum(json.loads((stage / "result.json").read_text())["tokens"] for stage in stages)
        rows.append((way, seed, f"{tokens:,}", *(f"{loss:.3f}" for loss in ended), f"{value(right):.3f}"))
    mix = next(iter(runs.values()))
    start = {task: value(rows_by_file(mix, "before", "loss")[f"held-{task}"]) for task in TASKS}
    untuned = (
        "the base", "–", "–", *(f"{start[task]:.3f}" for task in TASKS),
        f"{value(rows_by_file(mix, 'before', 'exact_match')['held-sentiment']):.3f}",
    )  # fmt: skip
    head = ("way", "seed", "tokens", *(f"loss, {task}" for task in TASKS), "sentiment right")
    note = (
        f"tunesmith/reviews-1m, all 1,377,408 parameters. Instructions: data/instruction, {sizes['instructions']} "
        f"rows to train on. Sentiment: IMDB reviews (their last {WORDS} words) and a question, {sizes['sentiment']:,} "
        f"rows. Every way reads {ROWS:,} rows of each task: at once in a mix of weight 1 to 1, or one task after the "
        f"other in two stages of a chain, each with its own schedule. {BATCH} rows a step, rate 1e-3. Held out: "
        f"{HELD_OUT['instructions']} instructions, {HELD_OUT['sentiment']} reviews. Loss in nats a token of the "
        "answer; right is greedy and letter for letter."
    )
    return [f"## At once or one after another\n\n{note}\n\n{table(head, [untuned, *rows])}", _claim(losses)]


def _claim(losses: dict[tuple[str, int], Rows]) -> str:
    """Does the mix lose less on the task that came first? And what of the one that came last?"""
    rows = []
    for way, order in WAYS.items():
        for seed in SEEDS if order else ():
            cells = [signed(gap(losses[way, seed][f"held-{task}"], losses["both at once", seed][f"held-{task}"]))
                     for task in order or ()]  # fmt: skip
            rows.append((way, seed, *cells))
    head = ("one after another", "seed", "first task: loss of the mix minus it", "second task: the same")
    note = (
        "Loss after both at once, minus that after one task and then the other, on the same held-out rows, paired, "
        "95 % intervals. Below 0 the mix is better. The claim is about the first task, which the second one takes from."
    )
    return f"### The mix against each order\n\n{note}\n\n{table(head, rows)}"


def _kinds(where: Place, folder: Path) -> tuple[dict[str, Path], dict[str, int], int]:
    """A run without each kind and one with all; half of each kind's rows are held out from all of them."""
    rows = _instructions(where)
    by_kind = {kind: [row for row in rows if row["prompt"].split()[0] == kind] for kind in KINDS}
    tests = {kind: found[: len(found) // 2] for kind, found in by_kind.items()}
    others = [row for row in rows if row["prompt"].split()[0] not in KINDS]
    write_rows(folder / "held-others.jsonl", others[: HELD_OUT["instructions"]])
    for kind, found in tests.items():
        write_rows(folder / f"held-{kind.lower()}.jsonl", found)
    kept = others[HELD_OUT["instructions"] :]
    runs = {}
    for left_out in (None, *KINDS):
        known = [row for kind in KINDS if kind != left_out for row in by_kind[kind][len(tests[kind]) :]]
        name = f"without-{left_out.lower()}" if left_out else "all"
        path = write_rows(folder / f"train-{name}.jsonl", [*kept, *known])
        run = folder / name
        train(
            run, RECIPES / "held_out_kind.yaml", f"data.train={path}", f"data.eval={folder / 'held-*.jsonl'}", "seed=42"
        )
        runs[left_out or "all"] = run
    return runs, {kind: len(found) - len(tests[kind]) for kind, found in by_kind.items()}, len(kept)


def _kind_section(runs: dict[str, Path], trained: dict[str, int], others: int) -> str:
    after = {name: rows_by_file(run, "after", "loss") for name, run in runs.items()}
    before = rows_by_file(runs["all"], "before", "loss")
    rows = []
    for kind in KINDS:
        seen, unseen, base = (found[f"held-{kind.lower()}"] for found in (after["all"], after[kind], before))
        seen_kinds = np.concatenate([v for k, v in after[kind].items() if k != f"held-{kind.lower()}"])
        start = np.concatenate([v for k, v in before.items() if k != f"held-{kind.lower()}"])
        rows.append(
            (f"{kind} ({len(base)})", f"{value(base):.3f}", f"{value(unseen):.3f}", signed(gap(base, unseen)),
             signed(gap(base, seen)), signed(gap(seen, unseen)), signed(gap(start, seen_kinds)))
        )  # fmt: skip
    head = ("kind left out (held-out rows)", "before", "after, kind left out", "change, kind left out",
            "change, kind trained on", "cost of not having seen it", "change on the kinds seen")  # fmt: skip
    counts = ", ".join(f"{kind} {num}" for kind, num in trained.items())
    note = (
        "The first word of an instruction is its kind. Runs of 2 epochs from tunesmith/reviews-1m: one with all "
        f"kinds ({others} rows of other kinds and {counts}), and one without each of those. The same held-out rows "
        "each time. Loss in nats a token of the answer, paired differences, 95 % intervals, one seed."
    )
    return f"## A kind of instruction that was never seen\n\n{note}\n\n{table(head, rows)}"


if __name__ == "__main__":
    main()
