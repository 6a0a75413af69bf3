"""The command line: arguments in, `tunesmith.api` called, results on stdout, talk on stderr, an exit code."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from tunesmith import cli_preferences, cli_rows, cli_trust
from tunesmith.cli_output import (
    Progress,
    check_lines,
    diff_lines,
    evaluation_lines,
    painted,
    quickstart_lines,
    result_lines,
    rows_lines,
    tree_lines,
    visible,
)
from tunesmith.errors import DataError, OutOfMemoryError, RecipeError, RunError, TunesmithError, lacks_memory
from tunesmith.plan.hardware import memory_story
from tunesmith.rundir import installed_version

_OPTIONS: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(name="tunesmith", no_args_is_help=True, **_OPTIONS)
runs_app = typer.Typer(help="The runs under ./runs.", **_OPTIONS)
app.add_typer(runs_app, name="runs")

_COMPLETE = "_TUNESMITH_COMPLETE"
"""Set by the shell's own completion script, which `tunesmith completion SHELL` prints."""

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values over the recipe's.")]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A user's error is one message on stderr, our own a traceback that says so."""
    if _COMPLETE in os.environ:
        from typer.completion import completion_init  # pyright: ignore[reportPrivateImportUsage]

        completion_init()
    try:
        app(args=None if args is None else list(args), prog_name="tunesmith")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 2)
        if code == 130:
            print("interrupted", file=sys.stderr)
    except TunesmithError as error:
        print(f"tunesmith: {visible(_memory_first(error))}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        if lacks_memory(error):
            print(f"tunesmith: {visible(_memory_first(error))}", file=sys.stderr)
            return _flushed(OutOfMemoryError.exit_code)
        traceback.print_exc()
        print("tunesmith: this is a bug in tunesmith, not in what you wrote; please report the lines above",
              file=sys.stderr)  # fmt: skip
        code = 1
    return _flushed(code)


def _memory_first(error: Exception) -> str:
    """The message of `error`, or what is said of memory when that is what it comes from.

    The frames of `error` are let go first: what they hold may be all the memory there is.
    """
    if isinstance(error, OutOfMemoryError) or not lacks_memory(error):
        return str(error)
    traceback.clear_frames(error.__traceback__)
    try:
        story = memory_story(error.with_traceback(None))
    except MemoryError:
        story = "out of memory"
    return f"{story}; raise the limit, close other programs, or take a smaller model or fewer rows at once"


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
        print(installed_version())
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
    _give(result, as_json, result_lines)


@app.command()
def quickstart(
    overrides: Overrides = None,
    *,
    stage: Annotated[
        str, typer.Option("--stage", help="classify, sft, pretrain, reward, dpo, ppo, grpo or chain.")
    ] = "classify",
    to: Annotated[str, typer.Option("--to", help="Where the recipe and its data are left for you.")] = "quickstart",
    as_json: AsJson = False,
) -> None:
    """See fine-tuning work: a small model and data that come with the program, before and after."""
    from tunesmith import api

    progress = Progress(sys.stderr)
    try:
        result = api.quickstart(stage, overrides or (), folder=to, say=progress.say, show=progress.show)
    finally:
        progress.close()
    _give(result, as_json, quickstart_lines)


@app.command()
def init(
    stage: Annotated[str | None, typer.Argument(help="The stage; with --data it may be left out.")] = None,
    *,
    data: Annotated[str | None, typer.Option("--data", help="A data file to look at.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model to start from; the embedded one.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="The new file; STAGE.yaml.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe, for the data file named if there is one."""
    from tunesmith import api

    _give(api.init(stage, data=data, base=base, to=to, say=_say), as_json, tree_lines)


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a model folder or a hub id.")],
    *,
    data: Annotated[str, typer.Option("--data", help="The rows to measure on.")],
    stage: Annotated[str | None, typer.Option("--stage", help="For a bare model: what to measure it as.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="A metric of yours, file.py:function; may be repeated.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", help="A function of the run's reward, file.py:function; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run's model, or any model, on held-out rows."""
    from tunesmith import api

    result = api.evaluate(target, data, stage=stage, metrics=metric or (), rewards=reward or (), say=_say)
    _give(result, as_json, evaluation_lines)


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="RECIPE_OR_DATA", help="A recipe, or a data file.")],
    overrides: Overrides = None,
    *,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Also write it as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a run would train on and notice before its first step, or what a data file is recognised as."""
    from tunesmith import api

    _give(api.check(target, overrides or (), html=html, say=_say), as_json, check_lines)


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

    ask = api.open_chat(run)
    for text in [prompt] if prompt is not None else _prompts():
        answer = ask(text, max_tokens, temperature, seed)
        _give({"run": run, "prompt": text, "completion": answer}, as_json, lambda r: [r["completion"]])


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    text: Annotated[
        str | None, typer.Argument(help="One text; without it and --file, a text a line from stdin.")
    ] = None,
    *,
    file: Annotated[str | None, typer.Option("--file", help="A text a line, or rows of any data format.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="Which column of the rows is the text.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Also a JSONL file to correct and train on.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """Label or answer one text, a file of them, or standard input."""
    from tunesmith import api

    if text is not None and file is not None:
        raise DataError("give one text or --file FILE, not both")
    if to is not None:
        if file is None:
            raise DataError("--to writes the rows of a file back with predictions: name it with --file")
        found = api.annotate(run, file, to, column=column, max_tokens=max_tokens)
        _give(found, as_json, lambda rows: [_one_line(r["answer"]) for r in rows])
        return
    if file is not None:
        texts = api.read_texts(file, column)
    else:
        texts = [text] if text is not None else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError("there is nothing to predict: standard input is empty")
    _give(api.predict(run, texts, max_tokens=max_tokens), as_json, lambda rows: [_one_line(r["answer"]) for r in rows])


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    *,
    to: Annotated[str, typer.Option("--to", help="A new folder.")],
    format: Annotated[str, typer.Option("--format", help="adapter (PEFT) or merged (transformers).")] = "adapter",
    push_to: Annotated[str | None, typer.Option("--push-to", metavar="OWNER/NAME", help="Also to the hub.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the tuned model for other programs, verified first."""
    from tunesmith import api

    _give(api.export(run, to, format, push_to=push_to, say=_say), as_json, tree_lines)


@app.command()
def serve(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a model folder or a hub id.")],
    *,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The most a request may ask for.")] = 1024,
) -> None:
    """Answer over HTTP: OpenAI's completions and chat completions, labels or scores at /predict, /health."""
    from tunesmith import api

    api.serve(target, host=host, port=port, max_tokens=max_tokens, say=_say)


@app.command()
def completion(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print the script that completes verbs and options; add `eval "$(tunesmith completion bash)"` to ~/.bashrc."""
    if shell not in ("bash", "zsh", "fish"):
        raise RecipeError(f"there is no completion for `{shell}`; take bash, zsh or fish")
    from typer.completion import get_completion_script  # pyright: ignore[reportPrivateImportUsage]

    print(get_completion_script(prog_name="tunesmith", complete_var=_COMPLETE, shell=shell))


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

    _give(api.runs_list(), as_json, rows_lines)


@runs_app.command(name="show")
def runs_show(run: str, *, as_json: AsJson = False) -> None:
    """A run's result."""
    from tunesmith import api

    _give(api.runs_show(run), as_json, result_lines)


@runs_app.command(name="diff")
def runs_diff(a: str, b: str, *, as_json: AsJson = False) -> None:
    """What two runs did differently and what came out."""
    from tunesmith import api

    _give(api.runs_diff(a, b), as_json, lambda found: diff_lines(found, a, b))


def _prompts() -> Iterable[str]:
    if not sys.stdin.isatty():
        yield sys.stdin.read().rstrip("\n")
        return
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _one_line(text: str) -> str:
    """An answer on a line of its own, so that the n-th line answers the n-th text."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _say(text: str) -> None:
    print(painted(text, sys.stderr), file=sys.stderr, flush=True)


def _give(value: Any, as_json: bool, lines: Callable[[Any], Iterable[str]]) -> None:
    """The result on stdout: one JSON document on one line, or text."""
    if as_json:
        print(_unprinted(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str)))
        return
    for line in lines(value):
        print(painted(line, sys.stdout))


def _unprinted(text: str) -> str:
    """JSON in which what does not print, such as the controls above 127, is written as JSON's own escapes."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


cli_preferences.register(app, _give, _say)
cli_trust.register(app, _give, _say)
cli_rows.register(runs_app, _give)
