"""The style of an author: three reviewers who sign what they write, each learned apart, all three measured each time.

The data set has no column of authors, but some reviewers sign. The base has read the unlabelled reviews, these three
among 50,000 others, so they are trained on and the labelled ones, which it has not read, are held out.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from by_file import Rows, gap, rows_by_file, signed, value, write_rows
from common import RECIPES, Place, place, rows_of, table, train, write

from tunesmith.evaluate.intervals import ratio
from tunesmith.serve.protocol import Ask, Draw
from tunesmith.stages.serving import open_served

AUTHORS = {
    "G. H.": r"\s*Grady Harp\.?\s*$",
    "B. C.": r"\s*(\d[\d.]*\s*/\s*10\.?)?\s*Bethany Cox\.?\s*$",
    "the F.": r"\s*(It rates an? [\d.]+\s*/\s*10 from[.\s]*)?the Fiend :\.\s*$",
}
"""What each signs with, the marks given just before it included: cut off, since they would be learned first."""
SETS = {"train": ("imdb_unsup",), "held": ("imdb_train", "imdb_test")}
SEEDS = (42,)
NUM_REPLICATES = 2000


def main() -> None:
    where, _ = place("author")
    texts = _texts(where)
    files = _files(where.runs / "data", texts)
    runs = {(name, seed): _run(where, name, seed, files) for name in AUTHORS for seed in SEEDS}
    measured = {key: (_rows(run, "before"), _rows(run, "after")) for key, run in runs.items()}
    sections = [_what(texts, runs), _changes(measured), _paired(measured), _samples(where, texts, runs)]
    write("author", "The style of an author: three reviewers who sign their reviews", *sections)


def _texts(where: Place) -> dict[str, dict[str, list[str]]]:
    """Author -> side -> reviews without the signature, each text once."""
    found: dict[str, dict[str, list[str]]] = {name: {side: [] for side in SETS} for name in AUTHORS}
    seen = set[str]()
    for side, names in SETS.items():
        for file in names:
            with gzip.open(where.asset(f"data/imdb/{file}.jsonl.gz"), "rt", encoding="utf-8") as lines:
                texts = [json.loads(line)["text"] for line in lines]
            for text in texts:
                for author, mark in AUTHORS.items():
                    if text not in seen and re.search(mark, text):
                        found[author][side].append(_plain(re.sub(mark, "", text)))
                        seen.add(text)
    return found


def _plain(text: str) -> str:
    """Line breaks as the base has read them."""
    return re.sub(r"\s*<br />\s*(<br />\s*)*", "\n", text).strip()


def _files(folder: Path, texts: dict[str, dict[str, list[str]]]) -> Path:
    for author, sides in texts.items():
        for side, rows in sides.items():
            write_rows(folder / f"{side}-{_short(author)}.jsonl", ({"text": text} for text in rows))
    return folder


def _short(author: str) -> str:
    return re.sub(r"\W", "", author).lower()


def _run(where: Place, author: str, seed: int, files: Path) -> Path:
    run = where.runs / f"{_short(author)}-{seed}"
    train(
        run, RECIPES / "author.yaml", f"data.train={files / f'train-{_short(author)}.jsonl'}",
        f"data.eval={files / 'held-*.jsonl'}", f"seed={seed}",
    )  # fmt: skip
    return run


def _rows(run: Path, when: str) -> Rows:
    """Bits and bytes of each author's held-out reviews."""
    found = rows_by_file(run, when, "bits_per_byte")
    return {author: found[f"held-{_short(author)}"] for author in AUTHORS}


def _what(texts: dict[str, dict[str, list[str]]], runs: dict[tuple[str, int], Path]) -> str:
    rows = []
    for author, sides in texts.items():
        run = runs[author, SEEDS[0]]
        tokens = json.loads((run / "result.json").read_text())["tokens"]
        size = {side: sum(len(text.encode()) for text in found) for side, found in sides.items()}
        counts = [f"{len(sides[side])} ({size[side]:,} bytes)" for side in SETS]
        rows.append((author, *counts, len(rows_of(run / "metrics.jsonl")), f"{tokens:,}"))
    note = (
        "The authors are three people who sign their film reviews in the IMDB set, each with the same words every "
        "time; here they stand by initials. The signature, and the marks given just before it, are cut off. Trained "
        "on: their reviews in the unlabelled part, 24 steps, all 1,377,408 parameters of tunesmith/reviews-1m. Held "
        "out: those in the labelled parts. The base has read the unlabelled part twice, these reviews among 50,000: it "
        "knows film reviews, and none of those held out. So this is one person's manner within one kind of text, on "
        "other films than were trained on; how two books differ is easier to learn. The rate is 2e-4, "
        "the second that was tried: at 1e-3 so few reviews are learned by heart (docs/log.md)."
    )
    return f"{note}\n\n{table(('author', 'trained on', 'held out', 'steps', 'tokens'), rows)}"


def _changes(measured: dict[tuple[str, int], tuple[Rows, Rows]]) -> str:
    """Bits per byte of every author before and after, and how much more one's own fell than each other's."""
    rows = []
    for (trained, seed), (before, after) in measured.items():
        cells = []
        for author in AUTHORS:
            cells.append(signed(gap(before[author], after[author])))
        more = [_more(before, after, trained, other) for other in AUTHORS if other != trained]
        rows.append((trained, seed, *cells, "; ".join(more)))
    start = next(iter(measured.values()))[0]
    bits = ", ".join(f"{author} {value(start[author]):.3f}" for author in AUTHORS)
    note = (
        f"Bits per byte before: {bits}. Below: after minus before on held-out reviews, paired, 95 % intervals over "
        "reviews. Last column: one's own change minus the other author's; the reviews of the two are drawn apart. "
        "An interval below 0 says that the trained author was learned and not film reviews as such."
    )
    head = ("trained on", "seed", *(f"change of {author}" for author in AUTHORS), "own minus the others'")
    return f"## What training on one does to each\n\n{note}\n\n{table(head, rows)}"


def _more(before: Rows, after: Rows, own: str, other: str) -> str:
    def replicates(author: str) -> tuple[float, np.ndarray]:
        a, b = before[author], after[author]
        drawn = np.random.default_rng([0, len(a)]).multinomial(len(a), np.full(len(a), 1 / len(a)), NUM_REPLICATES)
        weights = drawn.astype(np.float64)
        return float((ratio(b.sum(0, keepdims=True)) - ratio(a.sum(0, keepdims=True)))[0]), (
            ratio(weights @ b) - ratio(weights @ a)
        )

    (x, xs), (y, ys) = replicates(own), replicates(other)
    low, high = np.quantile(xs - np.random.default_rng(1).permutation(ys), [0.025, 0.975])
    return f"{other}: {x - y:+.3f} [{low:+.3f}, {high:+.3f}]"


def _paired(measured: dict[tuple[str, int], tuple[Rows, Rows]]) -> str:
    """The same held-out reviews after training on their author and after training on another."""
    rows = []
    for author in AUTHORS:
        for seed in SEEDS:
            own = measured[author, seed][1][author]
            cells: list[Any] = [author, seed, f"{value(own):.3f}"]
            for other in AUTHORS:
                if other == author:
                    cells.append("–")
                    continue
                cells.append(signed(gap(measured[other, seed][1][author], own)))
            rows.append(tuple(cells))
    note = (
        "Bits per byte of an author's held-out reviews after training on that author, and how much less that is than "
        "after training on another: the same reviews, so the difference is paired."
    )
    head = ("author", "seed", "trained on the same", *(f"minus trained on {author}" for author in AUTHORS))
    return f"## The same reviews under each model\n\n{note}\n\n{table(head, rows)}"


def _samples(where: Place, texts: dict[str, dict[str, list[str]]], runs: dict[tuple[str, int], Path]) -> str:
    """A held-out beginning of each author, gone on with by the base and each tuned model; kept in samples.jsonl."""
    beginnings = [" ".join(sides["held"][0].split()[:8]) for sides in texts.values()]
    kept = where.runs / "samples.jsonl"
    if not kept.is_file():
        draw = Draw(max_tokens=48, temperature=0.7, seed=1)
        models = {"the base": "tunesmith/reviews-1m"}
        models |= {f"trained on {author}": str(runs[author, SEEDS[0]]) for author in AUTHORS}
        write_rows(
            kept,
            ({"model": name, "prompt": prompt, "completion": written.text}
             for name, model in models.items()
             for prompt, written in zip(
                 beginnings, open_served(model).complete(Ask(tuple(beginnings), (), draw)).written, strict=True)),
        )  # fmt: skip
    parts = [
        "## Samples, before and after\n\nThe first eight words of a held-out review of each, gone on with at "
        "temperature 0.7, one seed, not chosen; a model this small makes little sense."
    ]
    for author, prompt in zip(texts, beginnings, strict=True):
        lines = [(row["model"], _cell(row["completion"])) for row in rows_of(kept) if row["prompt"] == prompt]
        parts.append(f"**{_cell(prompt)}** … (begun by {author})\n\n{table(('', 'goes on'), lines)}")
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]


if __name__ == "__main__":
    main()
