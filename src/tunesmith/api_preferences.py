"""The verbs about preferences: sample completions, rank them, compare systems. `tunesmith.api` has them all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


def _silent(_: Any) -> None:
    return None


def sample(
    run_or_model: str | Path,
    prompts: str | Path,
    *,
    num: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 128,
    seed: int = 0,
    to: str | Path | None = None,
    limit: int | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """`num` completions of every prompt as `{prompt, completions, ...}` rows, in the file `to` or under "rows".

    A file sampled in the same way goes on where it stopped; any other raises `RunError` and stays as it is.
    """
    from tunesmith.stages import sampling

    draws = sampling.Draws(num, temperature, top_p, max_tokens, seed)
    where = None if to is None else Path(to)
    return sampling.sample(run_or_model, str(prompts), draws, to=where, limit=limit, say=say)


def rank(
    file: str | Path,
    *,
    ask: Callable[[str], str | None],
    show: Callable[[str], None],
    to: str | Path | None = None,
    pairs: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Ask for a ranking of each prompt's completions, keeping every answer at once in `to` (FILE.ranked.jsonl).

    `ask(question)` gives the typed line, None to stop; `show(text)` shows a prompt. `pairs` names a file for the same
    as chosen/rejected rows.
    """
    from tunesmith.stages import ranking

    path = Path(file)
    where = Path(to) if to is not None else path.with_name(f"{path.name.removesuffix('.jsonl')}.ranked.jsonl")
    result = ranking.rank(path, where, seed=seed, ask=ask, show=show)
    if pairs is not None:
        result |= {"pairs": ranking.write_pairs(where, Path(pairs)), "pairs_file": str(pairs)}
    return result


def winrate(
    a: str | Path,
    b: str | Path,
    prompts: str | Path,
    judge: str,
    *,
    judge_model: str | None = None,
    judge_key_env: str | None = None,
    judge_label: str | None = None,
    tie_margin: float = 0.0,
    temperature: float = 0.0,
    max_tokens: int = 128,
    seed: int = 0,
    to: str | Path | None = None,
    limit: int | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """How often `judge` prefers system `a` to system `b` on the same prompts, with a 95 % interval.

    A system is a run, a model or a file that `sample` wrote. `judge` is `reward:RUN`, `file.py:function` or the https
    address of an OpenAI-compatible endpoint, whose key comes from the environment variable `judge_key_env`. The judged
    pairs are kept in `to`, and the same call goes on with them.
    """
    from tunesmith.stages import judges, sampling
    from tunesmith.stages import winrate as comparing

    judge_ = judges.open_judge(
        judge, model=judge_model, key_from=judge_key_env, label=judge_label, margin=tie_margin
    )  # fmt: skip
    draws = sampling.Draws(1, temperature, 1.0, max_tokens, seed)
    names = [re.sub(r"[^A-Za-z0-9.-]+", "-", Path(str(name)).name) for name in (a, b)]
    where = Path(to) if to is not None else Path(f"winrate_{names[0]}_{names[1]}.jsonl")
    return comparing.winrate(str(a), str(b), str(prompts), judge_, draws, to=where, limit=limit, say=say)


def elo(files: str | Path | Sequence[str | Path], *, seed: int = 0) -> dict[str, Any]:
    """Elo ratings, averaging 1000, from files of comparisons: `{ratings: {system: {value, low, high, n}}, ...}`.

    A row has `a`, `b` and `winner` (a, b or tie), or is one that `winrate` wrote. Raises `DataError` for rows that are
    none, and for systems that were never compared or never beaten.
    """
    from tunesmith.stages import judgements

    return judgements.elo([files] if isinstance(files, str | Path) else list(files), seed=seed)


def ratings(files: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """Mean ratings from 1 to 7, from rows with `system`, `rating` and perhaps `item`; differences on shared items.

    Returns `{ratings: {system: {value, low, high, n}}, differences: [...], ...}`; `DataError` for a rating outside.
    """
    from tunesmith.stages import judgements

    return judgements.ratings([files] if isinstance(files, str | Path) else list(files))
