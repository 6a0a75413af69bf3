"""The command line: arguments in, `tunesmith.api` called, results on stdout, talk on stderr, an exit code."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from tunesmith.errors import RecipeError, RunError, TunesmithError

if TYPE_CHECKING:
    from tunesmith.engine.fit import StepReport

_OPTIONS: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(name="tunesmith", no_args_is_help=True, **_OPTIONS)
runs_app = typer.Typer(help="The runs under ./runs.", **_OPTIONS)
app.add_typer(runs_app, name="runs")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values over the recipe's.")]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A user's error is one message on stderr, our own a traceback that says so."""
    try:
        app(args=None if args is None else list(args), prog_name="tunesmith")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 2)
        if code == 130:
            print("interrupted", file=sys.stderr)
    except TunesmithError as error:
        print(f"tunesmith: {visible(str(error))}", file=sys.stderr)
        code = error.exit_code
    except Exception:
        traceback.print_exc()
        print("tunesmith: this is a bug in tunesmith, not in what you wrote; please report the lines above",
              file=sys.stderr)  # fmt: skip
        code = 1
    return _flushed(code)


def _flushed(code: int) -> int:
    """`code`, or 1 when whoever read stdout has gone (`tunesmith runs | head -1`)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("tunesmith"))
        except PackageNotFoundError:
            print("tunesmith, not installed: run from its source")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune language models on one machine, and know whether it helped.

    Exit codes: 0 done, 2 something you can mend, 3 loss not finite, 74 disk full, 130 or 143 stopped with a checkpoint.
    """


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="The recipe, a YAML file.")] = None,
    overrides: Overrides = None,
    *,
    run: Annotated[str | None, typer.Option("--run", help="Name under ./runs, or a folder.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train, measure before and after, write the report."""
    if (recipe is None) == (resume is None) or (resume is not None and run is not None):
        raise RecipeError(
            "write `tunesmith train RECIPE.yaml [key.path=value ...] [--run NAME]` for a new run, or "
            "`tunesmith train --resume RUN` to go on with one, which keeps its own recipe and name"
        )
    from tunesmith import api

    progress = Progress(sys.stderr)
    try:
        if resume is not None:
            result = api.resume(resume, say=progress.say, show=progress.show)
        else:
            assert recipe is not None
            result = api.train(recipe, overrides or (), run=run, say=progress.say, show=progress.show)
    finally:
        progress.close()
    _give(result, as_json, _result_lines)


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a model folder or a hub id.")],
    *,
    data: Annotated[str, typer.Option("--data", help="The rows to measure on.")],
    stage: Annotated[str | None, typer.Option("--stage", help="For a bare model: what to measure it as.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run's model, or any model, on held-out rows."""
    from tunesmith import api

    _give(api.evaluate(target, data, stage=stage, say=_say), as_json, lambda r: _metric_lines({"value": r["metrics"]}))


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="RECIPE_OR_DATA", help="A recipe, or a data file.")],
    overrides: Overrides = None,
    *,
    as_json: AsJson = False,
) -> None:
    """What a run would notice before its first step, or what a data file is recognised as."""
    from tunesmith import api

    _give(api.check(target, overrides or (), say=_say), as_json, _tree)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt; without it, prompts are read.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask the tuned model: one prompt, or one after the other on a terminal; a piped prompt is taken whole."""
    from tunesmith import api

    for text in [prompt] if prompt is not None else _prompts():
        answer = api.chat(run, text, max_tokens=max_tokens, temperature=temperature, seed=seed)
        _give({"run": run, "prompt": text, "completion": answer}, as_json, lambda r: [r["completion"]])


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    *,
    to: Annotated[str, typer.Option("--to", help="A new folder.")],
    format: Annotated[str, typer.Option("--format", help="adapter (PEFT) or merged (transformers).")] = "adapter",
    as_json: AsJson = False,
) -> None:
    """Write the tuned model for other programs, verified first."""
    from tunesmith import api

    _give(api.export(run, to, format, say=_say), as_json, _tree)


@runs_app.callback(invoke_without_command=True)
def _runs(context: typer.Context, *, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        runs_list(as_json=as_json)
    elif as_json:
        raise RunError(f"write --json after the verb: `tunesmith runs {context.invoked_subcommand} ... --json`")


@runs_app.command(name="list")
def runs_list(*, as_json: AsJson = False) -> None:
    """All runs, oldest first."""
    from tunesmith import api

    _give(api.runs_list(), as_json, _rows_lines)


@runs_app.command(name="show")
def runs_show(run: str, *, as_json: AsJson = False) -> None:
    """A run's result."""
    from tunesmith import api

    _give(api.runs_show(run), as_json, _result_lines)


@runs_app.command(name="diff")
def runs_diff(a: str, b: str, *, as_json: AsJson = False) -> None:
    """What two runs did differently and what came out."""
    from tunesmith import api

    _give(api.runs_diff(a, b), as_json, lambda found: _diff_lines(found, a, b))


def _prompts() -> Iterable[str]:
    if not sys.stdin.isatty():
        yield sys.stdin.read()
        return
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


def _give(value: Any, as_json: bool, lines: Callable[[Any], Iterable[str]]) -> None:
    """The result on stdout: one JSON document on one line, or text."""
    if as_json:
        print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str))
        return
    for line in lines(value):
        print(visible(line))


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def visible(text: str) -> str:
    """Text of data and models without the control characters that could drive a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, the first to the left, the others to the right."""
    first, *others = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def _cell(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return _number(entry)
    if entry.get("low") is None:
        return _number(entry.get("value"))
    return f"{_number(entry['value'])} [{_number(entry['low'])}, {_number(entry['high'])}]"


def _metric_lines(columns: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One row a metric, one column a moment, each value with its interval."""
    shown = {title: values for title, values in columns.items() if values}
    names = dict.fromkeys(name for values in shown.values() for name in values)
    if not names:
        return []
    return table([["metric", *shown], *([name, *(_cell(v.get(name)) for v in shown.values())] for name in names)])


def _result_lines(result: Mapping[str, Any]) -> list[str]:
    """A run's result as people read it; the whole of it stands in result.json."""
    lines = _metric_lines({name: result.get(name) for name in ("before", "after", "difference")})
    lines += [""] if lines else []
    keys = ("run", "stage", "method", "trainable_parameters", "total_parameters", "seconds", "tokens_per_second",
            "peak_memory_bytes", "finished", "note", "verdict")  # fmt: skip
    return lines + table([[key, _number(result[key])] for key in keys if result.get(key) is not None] or [["", ""]])


def _tree(value: Mapping[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{indent}{key}:", *_tree(item, indent + "  ")]
        elif isinstance(item, (list, tuple)) and item:
            lines += [f"{indent}{key}:", *(f"{indent}  - {_number(part)}" for part in item)]
        else:
            lines.append(f"{indent}{key}: {'none' if item in (None, [], ()) else _number(item)}")
    return lines


def _rows_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["no runs here; `tunesmith train RECIPE.yaml` makes one under ./runs"]
    keys = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], Mapping)))
    return table([keys, *([_number(row.get(key)) for key in keys] for row in rows)])


def _diff_lines(found: Mapping[str, Mapping[str, Sequence[Any]]], a: str, b: str) -> list[str]:
    lines: list[str] = []
    for part, values in found.items():
        rows = [[key, _number(pair[0]), _number(pair[1])] for key, pair in values.items()]
        lines += table([[part, Path(a).name, Path(b).name], *rows]) if rows else [f"{part}: no difference"]
    return lines


class Progress:
    """The live line on a terminal; elsewhere a plain line at the first step, every ten seconds and at the last."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._clock = clock
        self._last = -math.inf
        self._open = False

    def show(self, report: StepReport) -> None:
        """One finished step."""
        now, last_step = self._clock(), report.step == report.num_steps
        if now - self._last < (0.1 if self._live else 10.0) and not last_step:
            return
        self._last = now
        line = (
            f"step {report.step:,}/{report.num_steps:,}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"{report.tokens_per_second:,.0f} tokens/s  {duration(report.seconds_left)} left"
        )
        print(f"\r{line}\x1b[K" if self._live else line, end="" if self._live else "\n", file=self._stream, flush=True)
        self._open = self._live

    def say(self, text: str) -> None:
        """A line of talk, which the live line makes way for."""
        self.close()
        print(visible(text), file=self._stream, flush=True)

    def close(self) -> None:
        """End the live line, so that the next output begins on its own."""
        if self._open:
            print(file=self._stream, flush=True)
            self._open = False


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`, `3700` -> `1:01:40`; `?` when it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
