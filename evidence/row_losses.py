"""Wrong labels found by what rows cost: 5 % of the labels are flipped, and the 5 % least believed rows are looked at.

MiniLM with LoRA on the 1,000 truncated IMDB reviews (their last 128 tokens, three epochs), and the base that comes with
the program on its own reviews; for each the run's own opinion, that of a bag of words, and both as `runs rows` has it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import needs_encoder, place, table, write

from tunesmith.embedded import data_file
from tunesmith.evaluate.row_history import found_among, outside_opinion, read_histories, suspicion

SHARE = 0.05
SEEDS = (0, 1, 2)
OTHER = {"0": "1", "1": "0", "negative": "positive", "positive": "negative"}


def main() -> None:
    where, _ = place("row_losses", argparse.ArgumentParser(description=__doc__))
    where.runs.mkdir(parents=True, exist_ok=True)
    pair = {part: _rows(where.asset(f"data/imdb/imdb_truncated_{part}.jsonl")) for part in ("train", "validation")}
    own = {part: _rows(Path(str(data_file(f"embedded:reviews/{part}")))) for part in ("train", "eval")}
    minilm = {
        "base": str(needs_encoder(where)), "seed": 42, "data": {"max_length": 128, "on_too_long": "truncate_left"},
        "tune": {"method": "lora", "rank": 4, "alpha": 32, "dropout": 0.01, "targets": ["query"]},
        "train": {"epochs": 3, "batch_examples": 4, "learning_rate": 1e-3, "weight_decay": 0.01},
    }  # fmt: skip
    small = {"base": "tunesmith/reviews-1m", "train": {"epochs": 5, "batch_examples": 8, "learning_rate": 1e-3}}
    found = {
        "MiniLM, 1,000 IMDB reviews": [
            _trial(where.runs, "minilm", seed, minilm, pair["train"], pair["validation"]) for seed in SEEDS
        ],
        "embedded base, embedded reviews": [
            _trial(where.runs, "embedded", seed, small, own["train"], own["eval"]) for seed in SEEDS
        ],
    }
    write("row_losses", "Wrong labels, found by what rows cost", _report(found))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Reviews hold line separators of their own, which are no ends of lines here."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _trial(
    runs: Path, name: str, seed: int, recipe: dict[str, Any], train: list[dict[str, Any]], others: list[dict[str, Any]]
) -> tuple[int, int, dict[str, float]]:
    """(rows, flipped, precision by opinion): train on planted labels, once; a finished run is only read."""
    name = f"{name}-{seed}"
    file = runs / f"{name}.jsonl"
    texts, labels, flipped = _planted(train, seed)
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (runs / name / "result.json").is_file():
        whole = {"stage": "classify", **recipe, "data": {**recipe.get("data", {}), "train": file.name}}
        whole["evaluate"] = {"baselines": False}
        (runs / f"{name}.yaml").write_text(json.dumps(whole))
        command = [sys.executable, "-m", "tunesmith", "train", str(runs / f"{name}.yaml"), "--run", str(runs / name)]
        subprocess.run(command, check=True)
    histories = read_histories(runs / name / "train_rows.jsonl")
    origins = [f"{file.name}:{i + 1}" for i in range(len(train))]
    own = [histories[origin].against for origin in origins]
    outside = outside_opinion(texts, labels, [(row["text"], str(row["label"])) for row in others])
    planted = [origins[i] for i in flipped]

    def precision(values: Any) -> float:
        return found_among(dict(zip(origins, map(float, values), strict=True)), planted, SHARE)

    return len(train), len(flipped), {
        "first visit": precision([histories[origin].first for origin in origins]),
        "all visits": precision(own),
        "bag of words": precision(outside),
        "both": precision(suspicion(own, outside)),
    }  # fmt: skip


def _planted(train: list[dict[str, Any]], seed: int) -> tuple[list[str], list[str], set[int]]:
    """(texts, labels, which of them were flipped)."""
    flipped = set(random.Random(seed).sample(range(len(train)), round(SHARE * len(train))))
    labels = [OTHER[str(row["label"])] if i in flipped else str(row["label"]) for i, row in enumerate(train)]
    return [row["text"] for row in train], labels, flipped


def _report(found: dict[str, list[tuple[int, int, dict[str, float]]]]) -> str:
    rows = []
    for name, trials in found.items():
        num_rows, num_flipped, first = trials[0]
        for opinion in first:
            each = [precisions[opinion] for _, _, precisions in trials]
            shown = " ".join(f"{value:.2f}" for value in each)
            rows.append((name, f"{num_rows:,}", num_flipped, opinion, shown, f"{sum(each) / len(each):.3f}"))
    return (
        f"{SHARE:.0%} of the training labels were flipped, others for each of {len(SEEDS)} seeds. The share of truly "
        f"flipped ones among the {SHARE:.0%} of the rows that are least believed; by chance it is {SHARE:.2f}. The "
        "bag of words was chosen on these flips and the weight of the run's own opinion on those of the first seed, "
        "among what docs/log.md tells; other data may give less.\n\n"
        + table(("model and data", "rows", "flipped", "opinion", "each seed", "mean"), rows)
        + "\n\n"
        "First visit: the loss before the row was ever trained on. All visits: mean log-odds against the label over "
        "the run (area under the margin). Bag of words: words and pairs of words, fitted on the other rows in five "
        "folds and on the held-out rows, whose labels were left alone. Both: the two opinions, each over its own "
        "spread, added, the run's own with weight 1/2: what `tunesmith runs rows` lists. Where 50 rows are looked at, "
        "one trial is uncertain by about 0.07."
    )


if __name__ == "__main__":
    main()
