"""Rankings from a person: the completions of each prompt are shown in random order, and what is typed is kept at once.

A row of the result is `{prompt, completions, ranks}` with the completions in the order they were sampled in, 1 for the
best and equal numbers for ties: what stage reward reads (InstructGPT, 2203.02155, 3.4).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.kinds import comparisons
from tunesmith.errors import DataError, RunError
from tunesmith.rundir import write_whole
from tunesmith.stages.jsonl import append_row, whole_rows

LABELS = string.ascii_uppercase
HELP = (
    "Write all labels from best to worst: B > A = D > C (a space will do for >). "
    "s skips this prompt for now, u shows it again, q stops; everything answered is kept."
)


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to rank: completions as they were sampled, and the order they are shown in (label -> index)."""

    prompt: Any
    completions: tuple[str, ...]
    order: tuple[int, ...]

    @property
    def key(self) -> str:
        """What tells this prompt's answer from others in the file of rankings."""
        return row_key(self.prompt, self.completions)

    def shown(self) -> list[str]:
        """The completions by label."""
        return [self.completions[i] for i in self.order]


def row_key(prompt: Any, completions: Sequence[str]) -> str:
    """A digest of prompt and completions."""
    return sha256(json.dumps([prompt, list(completions)], sort_keys=True).encode()).hexdigest()


def read_tasks(path: Path, *, seed: int) -> list[Task]:
    """The prompts of a file that `sample` wrote, those with two different completions at least.

    Completions that say the same are shown once; empty ones, and those with a NUL, which no data file may hold, not at
    all. `DataError` for anything but such rows.
    """
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; `tunesmith sample RUN --prompts FILE --num 4 --to {path}` writes one"
        )
    tasks, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line), seed)
        except (ValueError, KeyError, TypeError):
            problems.append(f"{path}:{number}: no row of a prompt and its completions")
            continue
        if len(task.completions) > len(LABELS):
            problems.append(
                f"{path}:{number}: {len(task.completions)} completions; at most {len(LABELS)} can be ranked"
            )
        elif len(task.completions) > 1:
            tasks.append(task)
    if problems or not tasks:
        raise DataError("\n".join(problems[:20]) or f"{path}: no prompt has two different completions to rank")
    return tasks


def _task(row: Mapping[str, Any], seed: int) -> Task:
    prompt, texts = row["prompt"], row["completions"]
    if not prompt or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    kept = tuple(dict.fromkeys(text for text in texts if text.strip() and "\0" not in text))
    drawn = int(row_key(prompt, kept)[:12], 16)
    order = np.random.default_rng([seed, drawn]).permutation(len(kept))
    return Task(prompt, kept, tuple(int(i) for i in order))


def parse_ranking(text: str, num: int) -> tuple[list[int] | None, str]:
    """(rank of each label in label order, "") from `B > A = D > C`, or (None, what is wrong). Best is 1.

    `B > A = D > C` gives A 2, B 1, C 3, D 2; between two labels nothing, a space or a comma is as good as `>`.
    """
    labels = LABELS[:num]
    groups: list[str] = []
    pending = ""
    for token in re.findall(r"\S", text.upper().replace(",", " ")):
        if token in LABELS:
            if pending == "=":
                groups[-1] += token
            else:
                groups.append(token)
            pending = ""
        elif token in (">", "=") and groups and not pending:
            pending = token
        else:
            return None, f"`{token}` stands where it cannot; write for example {' > '.join(labels)}"
    named = "".join(groups)
    problems = [f"nothing after `{pending}`"] if pending else []
    problems += [f"{label} is not shown" for label in dict.fromkeys(named) if label not in labels]
    problems += [f"{label} is named twice" for label in dict.fromkeys(named) if named.count(label) > 1]
    problems += [f"{label} is missing" for label in labels if label not in named]
    if problems:
        return None, "; ".join(problems)
    ranks = {label: rank for rank, group in enumerate(groups, 1) for label in group}
    return [ranks[label] for label in labels], ""


def rank(
    path: Path, to: Path, *, seed: int, ask: Callable[[str], str | None], show: Callable[[str], None]
) -> dict[str, Any]:
    """Ask for the ranking of every prompt of `path` that `to` has none of; each answer is kept before the next.

    `ask` gives a typed line, None at the end of input. `RunError` when `to` holds anything but rankings.
    """
    tasks = read_tasks(path, seed=seed)
    done = {row_key(row["prompt"], row["completions"]) for row in read_rankings(to)}
    left = [task for task in tasks if task.key not in done]
    for number, task in enumerate(left, 1):
        show(_screen(task, f"prompt {len(tasks) - len(left) + number} of {len(tasks)}"))
        answer = _answer(task, ask, show)
        if answer is None:
            break
        if answer:
            append_row(to, {"prompt": task.prompt, "completions": list(task.completions), "ranks": answer})
    rows = read_rankings(to)
    keys = {task.key for task in tasks}
    ranked = sum(row_key(row["prompt"], row["completions"]) in keys for row in rows)
    pairs = sum(len(comparisons(row["ranks"])) for row in rows)
    return {"file": str(to), "ranked": ranked, "left": len(tasks) - ranked, "pairs": pairs}


def _screen(task: Task, head: str) -> str:
    prompt = (
        task.prompt if isinstance(task.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in task.prompt)
    )
    parts = [f"== {head} ==", prompt, ""]
    for label, text in zip(LABELS, task.shown(), strict=False):
        parts += [f"-- {label} --", text, ""]
    return "\n".join(parts)


def _answer(task: Task, ask: Callable[[str], str | None], show: Callable[[str], None]) -> list[int] | None:
    """Ranks in the order the completions were sampled in; [] to skip, None to stop."""
    num = len(task.completions)
    while True:
        line = ask(f"{' '.join(LABELS[:num])}, best first (? for help): ")
        word = (line or "").strip().lower()
        if line is None or word in ("q", "quit"):
            return None
        if word in ("s", "skip"):
            return []
        if word in ("?", "h", "help", ""):
            show(HELP)
        elif word == "u":
            show(_screen(task, "once more"))
        else:
            ranks, problem = parse_ranking(line, num)
            if ranks is not None:
                return [ranks[task.order.index(i)] for i in range(num)]
            show(f"not understood: {problem}")


def read_rankings(path: Path) -> list[dict[str, Any]]:
    """The rankings collected so far; none when the file is not there."""
    rows = whole_rows(path)
    for number, row in enumerate(rows, 1):
        texts, ranks = row.get("completions"), row.get("ranks")
        if (
            not isinstance(texts, list)
            or not isinstance(ranks, list)
            or len(texts) != len(ranks)
            or "prompt" not in row
        ):
            raise RunError(f"{path}:{number} is no ranking; it is left as it is: choose another name with --to")
    return rows


def write_pairs(rankings: Path, to: Path) -> int:
    """Every ranking as `{prompt, chosen, rejected}` rows, ties dropped; how many. K = 4 gives 6, K = 9 gives 36."""
    lines = [
        json.dumps({"prompt": row["prompt"], "chosen": row["completions"][i], "rejected": row["completions"][j]},
                   ensure_ascii=False)
        for row in read_rankings(rankings)
        for i, j in comparisons(row["ranks"])
    ]  # fmt: skip
    write_whole(to, "".join(f"{line}\n" for line in lines))
    return len(lines)
