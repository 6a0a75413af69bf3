"""Two systems on the same prompts: each answers once with the same seeds, a judge sees both in random order.

The judged pairs are kept as they come, so an interrupted comparison goes on where it stopped. Two answers that say the
same are a tie without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.engine.durable import file_sha256
from tunesmith.errors import DataError, RunError
from tunesmith.evaluate.winrate import count, first_shown, verdict_of
from tunesmith.recipe import Recipe
from tunesmith.rollout.rewards import Completed
from tunesmith.rundir import model_run, open_run
from tunesmith.stages import from_run
from tunesmith.stages.jsonl import append_row, whole_rows
from tunesmith.stages.judges import Judge, Match, Opinion
from tunesmith.stages.prepare import locate
from tunesmith.stages.sampling import Asked, Draws, Say, complete, open_speaker, read_prompts


@dataclass(frozen=True, slots=True)
class System:
    """One side: who it is, its content, its answers to all prompts, and the run's recipe and folder if it is a run."""

    name: str
    content: str
    answers: Callable[[Sequence[Asked], int], Iterator[str]]
    recipe: Recipe | None = None
    recipe_folder: Path | None = None


def open_system(target: str, draws: Draws) -> System:
    """A run, a model folder or hub id, or a file of completions that `sample` (or anyone) wrote."""
    path = Path(target)
    if path.suffix == ".jsonl" and path.is_file():
        return System(target, file_sha256(path), _written(path))
    speaker = open_speaker(target)

    def answers(asked: Sequence[Asked], first: int) -> Iterator[str]:
        return (texts[0] for _, texts, _ in complete(speaker, asked, replace(draws, num=1), first=first))

    folder = None if speaker.folder is None else _recipe_folder(speaker.folder)
    return System(target, speaker.content, answers, speaker.recipe, folder)


def _recipe_folder(run: Path) -> Path:
    return Path(open_run(run).read_json("inputs")["recipe_folder"])


def _written(path: Path) -> Callable[[Sequence[Asked], int], Iterator[str]]:
    """The first completion that the file has for each prompt."""
    rows = whole_rows(path)

    def answers(asked: Sequence[Asked], first: int) -> Iterator[str]:
        known = [(row.get("prompt"), row.get("completions")) for row in rows]
        for one in asked[first:]:
            texts = next((texts for prompt, texts in known if prompt == one.as_json), None)
            if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
                raise DataError(f"{path} has no completion for the prompt at {one.record.origin}")
            yield texts[0]

    return answers


def winrate(
    a: str, b: str, prompts: str, judge: Judge, draws: Draws, *, to: Path, limit: int | None, say: Say
) -> dict[str, Any]:
    """`{a, b, judge, win_rate: {value, low, high, n}, wins, ties, losses, unclear, notes, verdict, file}`.

    `RunError` when `to` holds pairs of another comparison: it is never overwritten.
    """
    asked = read_prompts(prompts, limit=limit)
    first, second = open_system(a, draws), open_system(b, draws)
    settings = {
        "a": a, "a_content": first.content, "b": b, "b_content": second.content, "judge": judge.name,
        "judge_content": judge.content, **asdict(draws),
    }  # fmt: skip
    rows = _kept(to, asked, settings)
    say(f"{a} against {b}: {len(asked) - len(rows):,} pairs to judge by {judge.name}")
    for row in _judged(asked, first, second, judge, draws.seed, len(rows)):
        append_row(to, row | {"judged": settings})
        rows.append(row)
    found = count(rows)
    notes = _notes(judge, (first, second), found.unclear)
    for note in notes:
        say(f"note: {note}")
    return {
        "a": a, "b": b, "judge": judge.name, "prompts": len(asked), "win_rate": found.estimate.as_json(),
        "wins": found.wins, "ties": found.ties, "losses": found.losses, "unclear": found.unclear, "notes": notes,
        "verdict": found.sentence(a, b), "file": str(to),
    }  # fmt: skip


def _kept(to: Path, asked: Sequence[Asked], settings: dict[str, Any]) -> list[dict[str, Any]]:
    rows = whole_rows(to)
    for number, row in enumerate(rows):
        if row.get("judged") != settings or number >= len(asked) or row.get("prompt") != asked[number].as_json:
            raise RunError(
                f"{to}:{number + 1} is of another comparison (other models, prompts, judge or settings); it is left as "
                "it is: choose another name with --to"
            )
    return rows


def _judged(
    asked: Sequence[Asked], a: System, b: System, judge: Judge, seed: int, start: int
) -> Iterator[dict[str, Any]]:
    """A row for every prompt from number `start` on, in order."""
    part = 32
    answers = zip(a.answers(asked, start), b.answers(asked, start), strict=True)
    for low in range(start, len(asked), part):
        numbers = range(low, min(low + part, len(asked)))
        texts = [next(answers) for _ in numbers]
        order = [first_shown(seed, i) for i in numbers]
        differ = [i for i, (one, other) in enumerate(texts) if one != other]
        matches = [_match(asked[low + i], low + i, texts[i], order[i]) for i in differ]
        opinions = judge.judge(matches)
        for i, number in enumerate(numbers):
            opinion = next(opinions) if i in differ else Opinion(0.5, {"same": True})
            verdict = "unclear" if opinion.first is None else verdict_of(opinion.first, order[i])
            yield {
                "prompt": asked[number].as_json, "a": texts[i][0], "b": texts[i][1], "first": order[i],
                "verdict": verdict, **opinion.detail,
            }  # fmt: skip


def _match(asked: Asked, number: int, texts: tuple[str, str], first: str) -> Match:
    record = asked.record
    sides = [
        Completed(
            asked.text, text, answer=record.answer, columns=record.columns, messages=record.messages,
            origin=record.origin, number=number,
        )
        for text in (texts if first == "a" else texts[::-1])
    ]  # fmt: skip
    return Match(*sides)


def _notes(judge: Judge, systems: Sequence[System], unclear: int) -> list[str]:
    """What a reader must know: the judge was a system's own reward, or did not always answer."""
    notes = [
        f"the judge is the reward that {system.name} was trained on: this says how well it met its reward, and not "
        "whether a person would prefer it"
        for system in systems
        if judge.content in _rewards_of(system)
    ]
    return notes + ([f"{unclear} replies of the judge named no verdict; they are left out"] if unclear else [])


def _rewards_of(system: System) -> list[str]:
    """The contents of the reward runs and functions that a run's recipe names."""
    reward = None if system.recipe is None else system.recipe.reward
    if reward is None or system.recipe_folder is None:
        return []
    found = []
    for name in (reward.run or "").split(","):
        if name.strip():
            found.append(from_run.content(model_run(open_run(locate(name.strip(), system.recipe_folder)))))
    functions = [reward.function] if isinstance(reward.function, str) else reward.function or []
    for text in functions:
        file, _, name = text.rpartition(":")
        path = Path(locate(file, system.recipe_folder))
        found += [f"{file_sha256(path)}:{name}"] if path.is_file() else []
    return found
