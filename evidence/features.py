"""Head alone beside everything: the frozen body run at each step, run once and kept, and tuned; a neighbour's case too.

IMDB reviews, their last 128 tokens: 2,100 to learn from, 450 held out, 8 a step.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from common import Place, interval, needs_encoder, place, rows_of, step_seconds, table, train, write

from tunesmith.embedded import BASE
from tunesmith.evaluate.tasks import auc

TRAIN, HELD_OUT, TOKENS, BATCH = 2100, 450, 128, 8
WAYS = {
    "head, body kept": ("{method: head, cache_features: true}", 1e-3),
    "head": ("{method: head}", 1e-3),
    "full": ("{method: full}", 5e-5),
}
"""Way -> (the recipe's `tune` section, learning rate)."""
EPOCHS = {BASE: 3, "MiniLM": 1}
HEAD = (
    "base",
    "way",
    "epochs",
    "trainable",
    "s/step",
    "training s/epoch",
    "CPU s in all",
    "peak MiB",
    "accuracy",
    "AUC",
)
NOTE = (
    "`s/step` is the median by the clock, on a machine that did other work besides. `CPU s in all` is the processor's "
    "time of the whole command: starting, the pass over all rows, training, measuring before, after and every epoch, "
    "saving. The dropout of the encoder's body is set to 0 in all ways: kept features know none. Its head keeps 0.1."
)


def main() -> None:
    where, _ = place("features")
    encoder = needs_encoder(where)
    where.runs.mkdir(parents=True, exist_ok=True)
    os.environ["TUNESMITH_CACHE"] = str(where.runs / "cache")
    recipe = _recipe(where)
    bases = {BASE: BASE, "MiniLM": str(_without_dropout(encoder, where.runs / "MiniLM-without-dropout"))}
    runs = {(name, way): _run(where, recipe, name, base, way) for name, base in bases.items() for way in WAYS}
    write(
        "features", "A frozen body, run once and kept",
        f"{TRAIN:,} reviews, {HELD_OUT} held out, the last {TOKENS} tokens, {BATCH} a step, one seed.",
        "## Three ways", NOTE, table(HEAD, [_row(*key, run) for key, run in runs.items()]),
        "## Kept and not kept are the same", "\n".join(_same(runs, name) for name in bases),
        "## The neighbour's case", _neighbour(where, recipe, bases["MiniLM"]),
    )  # fmt: skip


def _recipe(where: Place) -> Path:
    draw = random.Random(0)
    for name, source, size in (("train", "train", TRAIN), ("eval", "test", HELD_OUT)):
        with gzip.open(where.asset(f"data/imdb/imdb_{source}.jsonl.gz"), "rt", encoding="utf-8") as file:
            rows = draw.sample([json.loads(line) for line in file], size)
        kept = [{"text": row["text"].replace("<br />", "\n"), "label": row["label"]} for row in rows]
        (where.runs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    recipe = {
        "stage": "classify",
        "base": BASE,
        "precision": "float32",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": TOKENS, "on_too_long": "truncate_left"},
        "train": {"batch_examples": BATCH, "select_by": None},
        "evaluate": {"baselines": False},
    }
    path = where.runs / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def _without_dropout(encoder: Path, folder: Path) -> Path:
    """A copy of the encoder whose body has no dropout; that of the head stays."""
    if not (folder / "config.json").is_file():
        folder.mkdir(exist_ok=True)
        for path in encoder.iterdir():
            if path.suffix in (".safetensors", ".json", ".txt"):
                shutil.copy(path, folder)
        config = json.loads((encoder / "config.json").read_text())
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        none["classifier_dropout"] = config["hidden_dropout_prob"]
        (folder / "config.json").write_text(json.dumps(config | none))
    return folder


def _run(where: Place, recipe: Path, name: str, base: str, way: str) -> Path:
    """Each run pays for its own pass over the rows."""
    tune, rate = WAYS[way]
    run = where.runs / f"{Path(name).name}-{way.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(where.runs / "cache" / "features", ignore_errors=True)
    settings = f"base={base}", f"tune={tune}", f"train.learning_rate={rate}", f"train.epochs={EPOCHS[name]}"
    _counted(run, recipe, *settings)
    return run


def _counted(run: Path, recipe: Path, *settings: str) -> dict[str, Any]:
    """The run's result; the processor's seconds that it took stand beside its folder."""
    path, before = run.with_name(f"{run.name}.cpu"), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = (run / "result.json").is_file()
    result, after = train(run, recipe, *settings), resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done:
        path.write_text(f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f}")
    return result


def _cpu_seconds(run: Path) -> float:
    return float(run.with_name(f"{run.name}.cpu").read_text())


def _result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def _row(name: str, way: str, run: Path) -> tuple[Any, ...]:
    result = _result(run)
    return (
        name, way, EPOCHS[name], f"{result['trainable_parameters']:,}", f"{step_seconds(run):.4f}",
        f"{result['train_seconds'] / EPOCHS[name]:.1f}", f"{_cpu_seconds(run):.0f}",
        f"{result['peak_memory_bytes'] / 2**20:.0f}", interval(result["after"]["accuracy"]), f"{_auc(run):.3f}",
    )  # fmt: skip


def _held_out(run: Path) -> dict[str, Any]:
    return json.loads((run / "after.json").read_text())["held_out"]


def _auc(run: Path) -> float:
    rows = _held_out(run)["predictions"]
    names = sorted({row["label"] for row in rows})
    share = [row["probability"] if row["predicted"] == names[1] else 1 - row["probability"] for row in rows]
    return auc([row["label"] == names[1] for row in rows], share)


def _same(runs: dict[tuple[str, str], Path], name: str) -> str:
    kept, anew = (_held_out(runs[name, way]) for way in ("head, body kept", "head"))
    losses = [np.asarray([row[0] for row in found["rows"]["loss"]]) for found in (kept, anew)]
    other = sum(a["predicted"] != b["predicted"] for a, b in zip(kept["predictions"], anew["predictions"], strict=True))
    steps, furthest = len(rows_of(runs[name, "head"] / "metrics.jsonl")), np.abs(losses[0] - losses[1]).max()
    return f"- {name}: {other} of {HELD_OUT} labels differ after {steps} steps, a row's loss by {furthest:.1e} at most."


def _neighbour(where: Place, recipe: Path, encoder: str) -> str:
    """Pooler and head alone, 10 epochs at 2e-4."""
    run = where.runs / "neighbour"
    result = _counted(run, recipe, f"base={encoder}", f"tune={WAYS['head, body kept'][0]}", "train.learning_rate=2e-4",
                   "train.epochs=10", "train.select_by=accuracy")  # fmt: skip
    said = (
        f"The encoder as above (22.7M), only pooler and head trained ({result['trainable_parameters']:,} parameters), "
        "rate 2e-4, 10 epochs, the best by accuracy. A neighbouring example, BERT (110M) with rows of its own, reports "
        "0.893 and 0.945."
    )
    head = ("accuracy before", "accuracy", "AUC", "best step", "training s", "CPU s in all")
    row = (interval(result["before"]["accuracy"]), interval(result["after"]["accuracy"]), f"{_auc(run):.3f}",
           result["best_step"], f"{result['train_seconds']:.1f}", f"{_cpu_seconds(run):.0f}")  # fmt: skip
    return f"{said}\n\n{table(head, [row])}"


if __name__ == "__main__":
    main()
