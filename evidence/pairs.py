"""Preferences for evidence/reward.py and evidence/dpo.py: seeded splits, and what simple baselines make of them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEED = 42
HELD_OUT = 0.2
MARK = "\n\nAssistant:"
Pair = tuple[str, str]


def instruction_pairs(source: Path) -> list[dict[str, str]]:
    """Rows of the instruction preferences as prompt, chosen, rejected; pairs of one text are left out."""
    rows = []
    for row in json.loads(source.read_text()):
        prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        if row["chosen"] != row["rejected"]:
            rows.append({"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]})
    return rows


def dialogue_pairs(source: Path) -> list[dict[str, str]]:
    """Rows of hh-rlhf as they stand, if their two dialogues differ in the last answer and in nothing else."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cut = [[text.rpartition(MARK) for text in (row["chosen"], row["rejected"])] for row in rows]
    return [row for row, (a, b) in zip(rows, cut, strict=True) if a[0] == b[0] and a[2].strip() != b[2].strip()]


def split(rows: Sequence[dict[str, str]], folder: Path) -> tuple[Path, Path]:
    """A fifth held out by seed; no prompt stands on both sides."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted({key_of(row) for row in rows})
    random.Random(SEED).shuffle(keys)
    held = set(keys[: round(HELD_OUT * len(keys))])
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, inside in zip(paths, (False, True), strict=True):
        kept = [row for row in rows if (key_of(row) in held) is inside]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return paths


def key_of(row: dict[str, str]) -> str:
    """What the two answers reply to."""
    return row["prompt"] if "prompt" in row else row["chosen"].rpartition(MARK)[0]


def answers(row: dict[str, str]) -> Pair:
    """(better, worse), without what both begin with."""
    if "prompt" in row:
        return row["chosen"], row["rejected"]
    return row["chosen"].rpartition(MARK)[2], row["rejected"].rpartition(MARK)[2]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def length_baseline(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[float]:
    """1 per held-out pair in the right order by length alone, the direction learned from the training pairs."""
    longer = sum(len(a) > len(b) for a, b in train) >= sum(len(a) < len(b) for a, b in train)
    return [0.5 if len(a) == len(b) else float((len(a) > len(b)) is longer) for a, b in held_out]


def words_baseline(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[float]:
    """The same by logistic regression on the difference of TF-IDF word vectors (Bradley-Terry, linear in words)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    texts.fit([text for pair in train for text in pair])

    def gaps(pairs: Sequence[Pair]) -> Any:
        return texts.transform([a for a, _ in pairs]) - texts.transform([b for _, b in pairs])

    x = gaps(train)
    signs = np.where(np.arange(x.shape[0]) % 2 == 0, 1, -1)
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(x.multiply(signs[:, None]).tocsr(), signs)
    found = gaps(held_out) @ model.coef_[0]
    return [0.5 if gap == 0 else float(gap > 0) for gap in found]
