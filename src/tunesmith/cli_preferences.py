"""The commands about preferences: sample, rank, winrate, elo, ratings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any

import typer

from tunesmith.cli_output import cell_text, table, tree_lines, visible

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Prompts = Annotated[str, typer.Option("--prompts", help="A data file with a prompt in each row.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1)]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many prompts.")]
Give = Callable[[Any, bool, Callable[[Any], Iterable[str]]], None]
Say = Callable[[str], None]


def register(app: typer.Typer, give: Give, say: Say) -> None:
    """Add the commands to `app`."""
    _add_sample(app, give, say)
    _add_rank(app, give, say)
    _add_winrate(app, give, say)
    _add_elo(app, give)
    _add_ratings(app, give)


def _add_sample(app: typer.Typer, give: Give, say: Say) -> None:
    @app.command()
    def sample(
        target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a model folder or a hub id.")],
        *,
        prompts: Prompts,
        num: Annotated[int, typer.Option("--num", min=1, help="Completions of each prompt.")] = 4,
        temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 1.0,
        top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
        max_tokens: MaxTokens = 128,
        seed: Seed = 0,
        to: Annotated[str | None, typer.Option("--to", help="A JSONL file; without it, rows go to stdout.")] = None,
        limit: Limit = None,
        as_json: AsJson = False,
    ) -> None:
        """Sample completions of a file of prompts, for ranking or for looking at."""
        from tunesmith import api

        result = api.sample(
            target, prompts, num=num, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, to=to,
            limit=limit, say=say,
        )  # fmt: skip
        give(result, as_json, _sample_lines)


def _add_rank(app: typer.Typer, give: Give, say: Say) -> None:
    @app.command()
    def rank(
        file: Annotated[str, typer.Argument(help="Completions that `sample` wrote.")],
        *,
        to: Annotated[str | None, typer.Option("--to", help="Where rankings go; FILE.ranked.jsonl by itself.")] = None,
        pairs: Annotated[
            str | None, typer.Option("--pairs", help="Also as chosen/rejected rows, in this file.")
        ] = None,
        seed: Seed = 0,
        as_json: AsJson = False,
    ) -> None:
        """Rank the completions of each prompt, best first, ties allowed; stop any time, go on later."""
        from tunesmith import api

        result = api.rank(file, ask=_ask, show=say, to=to, pairs=pairs, seed=seed)
        give(result, as_json, tree_lines)


def _add_winrate(app: typer.Typer, give: Give, say: Say) -> None:
    @app.command()
    def winrate(
        a: Annotated[str, typer.Argument(help="A run, a model, or a file of completions.")],
        b: Annotated[str, typer.Argument(help="Whom it is compared with.")],
        *,
        prompts: Prompts,
        judge: Annotated[
            str, typer.Option("--judge", help="reward:RUN, file.py:function, or an endpoint's https URL.")
        ],
        judge_model: Annotated[
            str | None, typer.Option("--judge-model", help="The model an endpoint is asked for.")
        ] = None,
        judge_key_env: Annotated[
            str | None, typer.Option("--judge-key-env", help="The environment variable that holds the endpoint's key.")
        ] = None,
        judge_label: Annotated[
            str | None, typer.Option("--judge-label", help="A classifier as judge: its good label.")
        ] = None,
        tie_margin: Annotated[float, typer.Option("--tie-margin", min=0.0, help="Scores this near are a tie.")] = 0.0,
        temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
        max_tokens: MaxTokens = 128,
        seed: Seed = 0,
        to: Annotated[str | None, typer.Option("--to", help="A JSONL file for the judged pairs.")] = None,
        limit: Limit = None,
        as_json: AsJson = False,
    ) -> None:
        """Which of two systems a judge prefers on the same prompts, order randomised, with a 95 % interval."""
        from tunesmith import api

        result = api.winrate(
            a, b, prompts, judge, judge_model=judge_model, judge_key_env=judge_key_env, judge_label=judge_label,
            tie_margin=tie_margin, temperature=temperature, max_tokens=max_tokens, seed=seed, to=to, limit=limit,
            say=say,
        )  # fmt: skip
        give(result, as_json, winrate_lines)


def _add_elo(app: typer.Typer, give: Give) -> None:
    @app.command()
    def elo(
        files: Annotated[
            list[str], typer.Argument(help="Judgements: rows with a, b and winner (a, b, tie), or files of `winrate`.")
        ],
        *,
        seed: Seed = 0,
        as_json: AsJson = False,
    ) -> None:
        """Elo ratings of several systems from comparisons of two, with 95 % intervals; the order does not matter."""
        from tunesmith import api

        give(api.elo(files, seed=seed), as_json, elo_lines)


def _add_ratings(app: typer.Typer, give: Give) -> None:
    @app.command()
    def ratings(
        files: Annotated[list[str], typer.Argument(help="Rows with system, rating (1 to 7) and, where known, item.")],
        *,
        as_json: AsJson = False,
    ) -> None:
        """Mean ratings from 1 to 7 with 95 % intervals, and paired differences on the items that two systems share."""
        from tunesmith import api

        give(api.ratings(files), as_json, rating_lines)


def _ask(question: str) -> str | None:
    """A line from the terminal; None when there is no more."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _sample_lines(result: Mapping[str, Any]) -> list[str]:
    if "rows" in result:
        return [json.dumps(row, ensure_ascii=False) for row in result["rows"]]
    return tree_lines(result)


def winrate_lines(result: Mapping[str, Any]) -> list[str]:
    """The counts as a table, then the verdict and what to know about the judge."""
    found = result["win_rate"]
    rate = f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]" if found["low"] is not None else "-"
    rows = [
        ["win rate of A", rate],
        *([name, f"{result[name]:,}"] for name in ("wins", "ties", "losses", "unclear")),
    ]
    lines = [f"A: {visible(result['a'])}", f"B: {visible(result['b'])}", f"judge: {result['judge']}", ""]
    notes = [f"note: {note}" for note in result["notes"]]
    return [*lines, *table(rows), "", result["verdict"], *notes, f"judged pairs: {result['file']}"]


def elo_lines(result: Mapping[str, Any]) -> list[str]:
    """The ratings, best first, then each system against the one below it."""
    left = f", {result['unclear']:,} unclear ones left out" if result["unclear"] else ""
    return [
        *_rated(result, "Elo", "judgements"), "",
        f"{result['judgements']:,} judgements ({result['ties']:,} ties){left}; ratings average 1000",
    ]  # fmt: skip


def rating_lines(result: Mapping[str, Any]) -> list[str]:
    """The mean ratings, best first, then each system against the one below it on the items of both."""
    return [*_rated(result, "mean rating", "items"), "", f"{result['count']:,} ratings from 1 to 7"]


def _rated(result: Mapping[str, Any], what: str, unit: str) -> list[str]:
    rows = [[visible(name), cell_text(entry), f"{entry['n']:,}"] for name, entry in result["ratings"].items()]
    names = list(result["ratings"])
    beside = {(entry["a"], entry["b"]): entry for entry in result["differences"]}
    pairs = [beside[pair] for pair in pairwise(names) if pair in beside]
    compared = [
        f"{visible(one['a'])} - {visible(one['b'])}: {cell_text(one)}, {one['n']:,} {unit} of both, {one['verdict']}"
        for one in pairs
    ]
    return [*table([["system", f"{what} [95 % interval]", unit], *rows]), *(["", *compared] if compared else [])]
