"""The rows of a run by what they cost: dearest, never learned, probably mislabelled, repeated; with their texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.edits import WORDS
from tunesmith.data.kinds import Labelled, Record, full_text, input_text, normalised, output_text
from tunesmith.data.naming import place, short_names
from tunesmith.data.similar import similar_rows
from tunesmith.errors import RunError, TunesmithError
from tunesmith.evaluate.row_history import (
    History,
    expensive,
    never_learned,
    outside_opinion,
    read_histories,
    suspicion,
)
from tunesmith.recipe import load_resolved
from tunesmith.rundir import RunDir
from tunesmith.stages.prepare import read_sets

Json = dict[str, Any]
SNIPPET = 160
"""Characters of a row's text that are shown."""
JUDGED = ("classify", "reward", "dpo")
"""Stages whose rows say what is right and may be wrong about it."""


@dataclass(frozen=True, slots=True)
class _Text:
    """What the data says of a row: its text on one line, all of it folded, its label."""

    shown: str
    folded: str
    label: str | None


def list_rows(run: RunDir, *, top: int = 10, which: str = "train") -> Json:
    """`{run, set, rows, expensive, never_learned, mislabelled, duplicates, notes}`; lists hold at most `top` rows.

    Raises `RunError` when the run kept no losses by row.
    """
    recipe = load_resolved(run.file("recipe"))
    histories = read_histories(run.file(f"{which}_rows"))
    if not histories:
        raise RunError(f"{run.path} has no losses by row: {_why(run, recipe.stage, recipe.evaluate.row_losses, which)}")
    final = read_histories(run.file("final_rows")) if which == "train" else {}
    rows = [_with_final(row, final.get(row.origin)) for row in histories.values()]
    texts, others, notes = _texts(run, which, set(histories))
    judged = _judge(recipe.stage, rows, texts, others) if recipe.stage in JUDGED and not recipe.data.multi_label else []
    ranked = sorted(judged, key=lambda pair: (-pair[1], pair[0].origin))
    found = [{**_as_json(row, texts), "suspicion": round(float(value), 4)} for row, value in ranked[:top]]
    return {
        "run": run.name, "stage": recipe.stage, "set": which, "rows": len(rows),
        "expensive": [_as_json(row, texts) for row in expensive(rows)[:top]],
        "never_learned": [_as_json(row, texts) for row in never_learned(rows)[:top]],
        "mislabelled": found,
        "duplicates": _duplicates(histories, texts)[:top],
        "notes": notes,
    }  # fmt: skip


def _why(run: RunDir, stage: str, kept: str, which: str) -> str:
    if stage in ("ppo", "grpo"):
        return f"stage {stage} keeps its rollouts, in {run.file('rollouts').name}"
    if kept == "none":
        return "its recipe has evaluate.row_losses: none"
    return "nothing was evaluated" if which == "eval" else "no step was finished"


def _with_final(row: History, final: History | None) -> History:
    """The row with its loss under the weights that were kept as the last visit."""
    if final is None:
        return row
    return History(row.origin, (*row.steps, final.steps[-1]), (*row.losses, final.losses[-1]))


def _texts(run: RunDir, which: str, origins: set[str]) -> tuple[dict[str, _Text], list[_Text], list[str]]:
    """(origin -> what the data says of the rows, what the other of train and eval holds, notes)."""
    recipe, inputs = load_resolved(run.file("recipe")), run.read_json("inputs")
    try:
        sets = read_sets(recipe, Path(inputs["recipe_folder"]))
        records = getattr(sets, which)
        known = [s for s in (sets.train, sets.eval, sets.test) if s is not None]
        called = short_names([name for s in known for name in s.files])
        found = {origin: _text(r) for r in records or () if (origin := place(r.origin, called)) in origins}
        beside = sets.eval if which == "train" else sets.train
        others = [_text(record) for record in beside or ()] if recipe.stage == "classify" else []
    except (TunesmithError, OSError) as error:
        why = str(error).splitlines()[0]
        return {}, [], [f"the data cannot be read any more: no texts, and labels judged by the run alone ({why})"]
    missing = len(origins) - len(found)
    return found, others, [f"{missing:,} rows are not in the data any more: it has changed since"] if missing else []


def _text(record: Record) -> _Text:
    label = output_text(record) if isinstance(record, Labelled) else None
    whole = input_text(record) if label is not None else full_text(record)
    shown = " ".join(whole.split())
    shown = shown if len(shown) <= SNIPPET else f"{shown[: SNIPPET - 1]}…"
    return _Text(shown, normalised(input_text(record) if label is not None else whole), label)


def _as_json(row: History, texts: dict[str, _Text]) -> Json:
    text = texts.get(row.origin)
    return {
        "origin": row.origin, "first": row.first, "last": row.last, "mean": round(row.mean, 6),
        "visits": len(row.losses), "label": text and text.label, "text": text and text.shown,
    }  # fmt: skip


def _judge(
    stage: str, rows: Sequence[History], texts: dict[str, _Text], others: Sequence[_Text]
) -> list[tuple[History, float]]:
    """(row, how much speaks against its label)."""
    own = [row.against for row in rows]
    known = [texts.get(row.origin) for row in rows]
    labels = [text.label for text in known if text is not None and text.label is not None]
    if stage != "classify" or len(labels) < len(rows) or len(set(labels)) < 2:
        return list(zip(rows, suspicion(own), strict=True))
    also = [(text.folded, text.label) for text in others if text.label is not None]
    outside = outside_opinion([text.folded for text in known if text is not None], labels, also)
    return list(zip(rows, suspicion(own, outside), strict=True))


def _duplicates(histories: dict[str, History], texts: dict[str, _Text]) -> list[Json]:
    """Groups of rows with the same text, and pairs that nearly have; those whose labels differ first."""
    groups: dict[str, list[str]] = {}
    for origin, text in texts.items():
        groups.setdefault(text.folded, []).append(origin)
    found = [_group("same", origins, histories, texts) for origins in groups.values() if len(origins) > 1]
    firsts = [origins[0] for origins in groups.values()]
    near = [_group("nearly the same", [firsts[b], firsts[a]], histories, texts) for a, b in _near(groups)]
    return sorted(found + near, key=lambda group: (not group["conflict"], group["kind"] != "same", -len(group["rows"])))


def _near(folded: Iterable[str]) -> list[tuple[int, int]]:
    """(row, an earlier one it is nearly the same as), by runs of words."""
    words: dict[str, int] = {}
    rows = [[words.setdefault(word, len(words)) for word in text.split()] for text in folded]
    rows = [row or [0] for row in rows]
    bounds = np.cumsum([0, *(len(row) for row in rows)])
    ids = np.asarray([i for row in rows for i in row], np.int64)
    return [(a, b) for a, b in similar_rows(ids, bounds, len(rows), WORDS).pairs.tolist()]


def _group(kind: str, origins: Sequence[str], histories: dict[str, History], texts: dict[str, _Text]) -> Json:
    labels = {texts[origin].label for origin in origins}
    return {
        "kind": kind, "conflict": len(labels) > 1, "rows": list(origins),
        "labels": [texts[origin].label for origin in origins],
        "last": [histories[origin].last for origin in origins], "text": texts[origins[0]].shown,
    }  # fmt: skip
