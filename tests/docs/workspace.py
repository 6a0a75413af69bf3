"""A folder in which the commands of the pages run: tiny models under the hub ids that pages name, and small data.

A recipe's `base:` is first looked for beside the recipe, so a folder `HuggingFaceTB/SmolLM2-135M-Instruct` stands in
for the model of that name and no page is rewritten. The same goes for the embedded base, which would take minutes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.tiny import save_tiny, tiny_causal, tiny_masked, tiny_tokenizer

_THINGS = (
    "film", "book", "soup", "lamp", "phone", "hotel", "song", "chair", "train", "game", "play", "cake", "coat", "pen",
    "radio", "garden", "bridge", "museum", "market", "river", "kettle", "stove", "boat", "bike", "clock",
)  # fmt: skip


def fill(folder: Path) -> None:
    """Put the stand-ins and the data files that pages speak of into `folder`."""
    save_tiny(tiny_causal("llama"), folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    save_tiny(tiny_causal("llama"), folder / "HuggingFaceTB" / "SmolLM2-135M", tokenizer=tiny_tokenizer(chat=False))
    save_tiny(tiny_causal("llama"), folder / "tunesmith" / "reviews-1m")
    save_tiny(tiny_masked("distilbert"), folder / "distilbert" / "distilbert-base-uncased")
    _write_jsonl(folder / "rows.jsonl", _sums(1, 12))
    _write_jsonl(folder / "held_out.jsonl", _sums(31, 2))
    _write_csv(folder / "reviews.csv", _reviews(1, 20))
    _write_csv(folder / "held_out.csv", _reviews(90, 5))
    _write_jsonl(folder / "pairs.jsonl", _pairs())
    _write_jsonl(
        folder / "prompts.jsonl", ({"prompt": f"What is {n} plus 2?", "answer": str(n + 2)} for n in range(20))
    )
    _write_jsonl(folder / "general.jsonl", ({"text": f"The {thing} stands by the door."} for thing in _THINGS))
    (folder / "notes").mkdir()
    for number in range(8):
        words = " ".join(f"The {thing} of day {number} is number {i}." for i, thing in enumerate(_THINGS))
        (folder / "notes" / f"day{number}.txt").write_text(words + "\n", encoding="utf-8")


def _sums(start: int, count: int) -> Iterable[Mapping[str, str]]:
    for left in range(start, start + count):
        for right in range(5):
            yield {"question": f"What is {left} plus {right}?", "answer": f"{left + right}"}


def _reviews(start: int, count: int) -> Iterable[Mapping[str, str]]:
    for number in range(start, start + count):
        thing = _THINGS[number % len(_THINGS)]
        yield {"text": f"The {thing} of year {number} is good, I like it.", "label": "positive"}
        yield {"text": f"The {thing} of year {number} is bad, I want my money back.", "label": "negative"}


def _pairs() -> Iterable[Mapping[str, str]]:
    for thing in _THINGS:
        better, worse = f"Yes, the {thing} is over there.", "Go away."
        yield {"prompt": f"Is there a {thing} here?", "chosen": better, "rejected": worse}


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    every = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(every[0]))
        writer.writeheader()
        writer.writerows(every)
