"""Faults planted in real data: how many of them the pre-flight page tells, what it tells besides, which gates refuse.

    python evidence/planted_faults.py

Nothing is trained, and no model is loaded: the page is made of the data, the tokenizer and the recipe.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Place, place, table, write

from tunesmith.data.check import Finding
from tunesmith.model.load import base_record, load_tokenizer
from tunesmith.recipe import load_recipe
from tunesmith.stages import beforehand
from tunesmith.stages.job import Job
from tunesmith.stages.load import NOTHING
from tunesmith.stages.prepare import base_path, make_inputs, read_sets

SEED, EACH = 7, 20
"""As many faults of each kind as a finding lists places: every one can be held against what was planted."""
Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True, slots=True)
class Set:
    """Rows of one kind. `text` is the column that is read, `answer` the one that is learned."""

    name: str
    stage: str
    base: str
    train: Rows
    held_out: Rows
    text: str
    answer: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """What was told of a set: the page, and the findings about its records."""

    page: Mapping[str, Any]
    findings: Sequence[Finding]

    def told(self, *kinds: str) -> set[str]:
        """The rows that findings of these kinds name: `train.jsonl:7`, of a pair of places the later one."""
        if kinds == ("near",):
            return {text.rpartition(" = ")[2] for text in self.page["duplicates"]["examples"]}
        found = [e for f in self.findings if f.kind in kinds for e in f.examples]
        return {Path(text.rpartition(" = ")[2]).name for text in found}

    def refused(self) -> list[str]:
        """The gates that do not let the run begin."""
        return [gate["gate"] for gate in self.page["gates"] if gate["state"] == "failed"]


def look(folder: Path, data: Set, train: Rows, held_out: Rows, **settings: Any) -> Page:
    """The page of a run on these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("eval", held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    given = {**data.settings, "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), **settings}
    base_name = given.pop("base", data.base)
    resolved = load_recipe({"stage": data.stage, "base": base_name, "data": given})
    recipe = resolved.recipe
    base = base_path(recipe.base, resolved.folder)
    record, tokenizer = base_record(base), load_tokenizer(base)
    sets = read_sets(recipe, folder)
    inputs = make_inputs(recipe, sets, tokenizer, record["context_tokens"], folder=folder, say=lambda text: None)
    job = Job(recipe, tokenizer, inputs, None, NOTHING, "cpu", "float32", base, folder)
    return Page(beforehand.look(job, sets, record), inputs.findings)


def sets_of(where: Place) -> list[Set]:
    """Film reviews, instructions, dialogues in preference pairs, and the reviews that come with the program."""
    own, stories = "tunesmith/reviews-1m", str(where.asset("models/stories260K"))
    cut = {"on_too_long": "truncate_left"}
    embedded = Path(sys.modules["tunesmith"].__file__ or "").parent / "embedded" / "data" / "reviews"
    instructions = json.loads(where.asset("data/instruction/instruction-data.json").read_text())
    asked = [
        {"prompt": " ".join([r["instruction"], r["input"]]).strip(), "completion": r["output"]} for r in instructions
    ]
    asked = _distinct(asked, "prompt")
    with gzip.open(where.asset("data/hh-rlhf/harmless-base-test.jsonl.gz"), "rt", encoding="utf-8") as file:
        pairs = [_pair(json.loads(line)) for line in file]
    pairs = _distinct([pair for pair in pairs if pair is not None], "prompt")
    films = [_lines(where.asset(f"data/imdb/imdb_truncated_{part}.jsonl")) for part in ("train", "validation")]
    films = [[{"text": row["text"], "label": str(row["label"])} for row in rows] for rows in films]
    short = [_lines(next(embedded.glob(f"{part}.*"))) for part in ("train", "eval")]
    return [
        Set(
            "film reviews (IMDB)",
            "classify",
            own,
            films[0][:400],
            films[1][:200],
            "text",
            "label",
            {**cut, "max_length": 256},
        ),
        Set("short reviews (embedded)", "classify", own, short[0], short[1], "text", "label", cut),
        Set("instructions", "sft", stories, asked[:800], asked[800:], "prompt", "completion", cut),
        Set("dialogues (hh-rlhf)", "reward", own, pairs[:500], pairs[500:700], "prompt", "chosen", cut),
    ]


def _lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _pair(row: Mapping[str, str]) -> Row | None:
    """A dialogue's last two answers with what stands before them; None where they are the same or differ earlier."""
    mark = "\n\nAssistant:"
    prompt, _, chosen = row["chosen"].rpartition(mark)
    other, _, rejected = row["rejected"].rpartition(mark)
    if prompt != other or not chosen.strip() or not rejected.strip() or chosen == rejected:
        return None
    return {"prompt": prompt.strip(), "chosen": chosen.strip(), "rejected": rejected.strip()}


def _distinct(rows: Rows, key: str) -> Rows:
    """Without the rows that repeat an input, so that what is found was planted."""
    return list({" ".join(row[key].casefold().split()): row for row in rows}.values())


Plant = Callable[[Set, random.Random], tuple[Rows, Rows, set[str]]]
"""(training rows, held-out rows, places of the faults)."""


def _appended(data: Set, rows: Rows) -> tuple[Rows, Rows, set[str]]:
    start = len(data.train) + 1
    return [*data.train, *rows], data.held_out, {f"train.jsonl:{start + i}" for i in range(len(rows))}


def copies(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """To the letter."""
    return _appended(data, rng.sample(data.train, EACH))


def folded(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """But for case and white space."""
    return _appended(data, [{**r, data.text: "  " + r[data.text].upper()} for r in rng.sample(data.train, EACH)])


def reworded(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """One word of a row of at least 20 is another."""
    long = [row for row in data.train if 20 <= len(row[data.text].split()) <= 150] or sorted(
        data.train, key=lambda row: -len(row[data.text].split())
    )[: 2 * EACH]
    made = []
    for row in rng.sample(long, min(EACH, len(long))):
        words = row[data.text].split(" ")
        words[-2] = "otherwise"
        made.append({**row, data.text: " ".join(words)})
    return _appended(data, made)


def leaked(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """Training rows among the held-out ones, in capitals."""
    rows = [{**row, data.text: row[data.text].upper()} for row in rng.sample(data.train, EACH)]
    start = len(data.held_out) + 1
    return data.train, [*data.held_out, *rows], {f"eval.jsonl:{start + i}" for i in range(EACH)}


def contradicted(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """Another label, another answer, or the pair in the other order."""
    rows = rng.sample(data.train, EACH)
    labels = sorted({row[data.answer] for row in data.train}) if data.stage == "classify" else []
    made = []
    for row in rows:
        if data.stage == "reward":
            made.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
        elif labels:
            made.append({**row, data.answer: next(label for label in labels if label != row[data.answer])})
        else:
            made.append({**row, data.answer: f"Not so: {row[data.answer]}"})
    return _appended(data, made)


def marked(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """The tokenizer's end token in the middle of a text."""
    end = str(load_tokenizer(base_path(data.base, Path.cwd())).eos_token)
    rows, places = list(data.train), set()
    for i in rng.sample(range(len(rows)), EACH):
        words = rows[i][data.text].split(" ")
        words.insert(len(words) // 2, end)
        rows[i] = {**rows[i], data.text: " ".join(words)}
        places.add(f"train.jsonl:{i + 1}")
    return rows, data.held_out, places


def same(data: Set, rng: random.Random) -> tuple[Rows, Rows, set[str]]:
    """Chosen and rejected are the same."""
    rows, places = list(data.train), set()
    for i in rng.sample(range(len(rows)), EACH):
        rows[i] = {**rows[i], "rejected": rows[i]["chosen"]}
        places.add(f"train.jsonl:{i + 1}")
    return rows, data.held_out, places


FAULTS: tuple[tuple[str, Plant, tuple[str, ...], tuple[str, ...]], ...] = (
    ("exact copies", copies, ("duplicates",), ()),
    ("copies but for case and space", folded, ("near_duplicates",), ()),
    ("copies with one word changed", reworded, ("near",), ()),
    ("training rows held out too", leaked, ("overlap", "input_overlap"), ()),
    ("contradictions", contradicted, ("label_noise", "two_answers", "both_orders"), ()),
    ("special tokens as text", marked, ("special_text",), ()),
    ("chosen is rejected", same, ("same_pairs",), ("reward",)),
)


def counted(where: Place, data: Set) -> list[list[str]]:
    """A row for each kind of fault: planted, found, told of other rows, told of the clean file, gates that refuse."""
    clean = look(where.runs / "clean", data, data.train, data.held_out)
    rows = []
    for name, plant, kinds, stages in FAULTS:
        if stages and data.stage not in stages:
            continue
        train, held_out, places = plant(data, random.Random(SEED))
        found = look(where.runs / "planted", data, train, held_out)
        told = found.told(*kinds)
        before = clean.told(*kinds)
        rows.append([
            f"{data.name}: {name}", str(len(places)), str(len(told & places)), str(len(told - places - before)),
            str(len(before)), ", ".join(found.refused()) or "none",
        ])  # fmt: skip
        print(" | ".join(rows[-1]), file=sys.stderr)
    rows.append([f"{data.name}: nothing", "0", "-", "-", "-", ", ".join(clean.refused()) or "none"])
    return rows


def refusals(where: Place, films: Set, instructions: Set, dialogues: Set) -> list[list[str]]:
    """Whole files that are at fault: which gates refuse them."""
    rng = random.Random(SEED)
    positive = [row for row in films.held_out if row["label"] == "1"]
    twice = [row for row in films.train[:100] for _ in range(3)]
    near = [{**row, "text": f"{row['text']} Part {i}."} for row in films.train[:100] for i in range(3)]
    flipped = [{**r, "label": "1" if r["label"] == "0" else "0"} for r in rng.sample(films.train, 100)]
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rng.sample(dialogues.train, 100)]
    spoken = [{**r, "prompt": f"{r['prompt']}</s>"} for r in instructions.train]
    doubled = [{**r, "prompt": f"<s>{r['prompt']}"} for r in instructions.train]
    silent = [{**r, "completion": "Yes."} for r in instructions.train]
    wordless = str(where.asset("models/tinystories-656K"))
    cyrillic = [{**row, "text": "".join(chr(0x430 + ord(c) % 32) for c in row["text"])} for row in films.train]
    cases: list[tuple[str, str, Set, Rows, Rows, dict[str, Any]]] = [
        ("held-out rows of one label (a sorted file)", "one_class", films, films.train, positive, {}),
        ("every row three times", "duplicates", films, twice, films.held_out, {}),
        ("every row three times, each with its own ending", "near_duplicates", films, near, films.held_out, {}),
        ("100 of 400 texts again with the other label", "conflicts", films, films.train + flipped,
         films.held_out, {}),
        ("100 of 500 pairs again in the other order", "conflicts", dialogues, dialogues.train + turned,
         dialogues.held_out, {}),
        ("prompts that end with the end token", "special_text", instructions, spoken, instructions.held_out, {}),
        ("prompts that begin with the begin token", "double_bos", instructions, doubled, instructions.held_out, {}),
        ("one answer to every prompt", "one_class", instructions, silent, instructions.held_out, {}),
        ("answers cut off at 40 tokens", "end_tokens", instructions, instructions.train, instructions.held_out,
         {"max_length": 40, "on_too_long": "truncate_right"}),
        ("rows above 40 tokens dropped", "rows_left", instructions, instructions.train, instructions.held_out,
         {"max_length": 40, "on_too_long": "drop"}),
        ("a script that the tokenizer does not have", "unknown_tokens", films, cyrillic, films.held_out,
         {"base": wordless}),
    ]  # fmt: skip
    rows = []
    for name, gate, data, train, held_out, settings in cases:
        found = look(where.runs / "whole", data, train, held_out, **settings).refused()
        rows.append([f"{data.name}: {name}", gate, "yes" if gate in found else "NO", ", ".join(sorted(found))])
        print(" | ".join(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    where, _ = place("planted_faults")
    started = time.perf_counter()
    every = sets_of(where)
    planted = [row for data in every for row in counted(where, data)]
    whole = refusals(where, every[0], every[2], every[3])
    head = ("faults planted in", "planted", "found", "other rows told", "told of the clean file", "gates that refuse")
    gates = ("a file at fault", "its gate", "refuses", "all that refuse")
    write(
        "planted_faults", "Faults planted in real data, and what the pre-flight page tells of them",
        f"{EACH} faults of each kind at a time, in places drawn by the seed {SEED}; the page is made anew for each. "
        "*Found* are planted rows that the page names, *other rows told* are rows that it names although nothing was "
        "planted there and the clean file did not make it name them. *Told of the clean file* is what the data has of "
        "its own.",
        "A near duplicate shares 80 % of the runs of 5 tokens with an earlier row, or is a row of at most 128 tokens "
        "that differs from it in one place of at most 6 tokens and a sixth of the row. What is missed is a word that "
        "the base's small vocabulary spells in more tokens than that.",
        table(head, planted),
        "Files that are at fault as a whole. Every clean file above passes every gate. `trained_share` needs rows of "
        "more tokens than these bases take, `memory` a larger base: both are tried in tests/unit/test_preflight.py.",
        table(gates, whole),
        f"Made in {time.perf_counter() - started:.0f} seconds.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
