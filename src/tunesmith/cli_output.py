"""What the command line shows: tables and lines for people, the live line of a training run."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tunesmith.plan.page import Painted, page_lines

if TYPE_CHECKING:
    from tunesmith.engine.fit import StepReport


def visible(text: str) -> str:
    """Text of data and models without the control characters that could drive a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


_STYLES = {"trained": "32", "end": "7;32", "user": "36", "system": "35", "tool": "34", "soft": "2", "bad": "31",
           "warn": "33"}  # fmt: skip
"""ANSI codes of the styles of a `Painted` line: what is learned is green, its end tokens reversed."""


def painted(line: str, stream: TextIO) -> str:
    """A line as `stream` shows it: in colours on a terminal, unless the user's NO_COLOR is set."""
    if not isinstance(line, Painted) or not _in_colour(stream):
        return visible(line)
    return "".join(
        f"\x1b[{_STYLES[style]}m{visible(text)}\x1b[0m" if style in _STYLES else visible(text)
        for style, text in line.parts
    )


def _in_colour(stream: TextIO) -> bool:
    """https://no-color.org"""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The pre-flight page of a recipe, or of each stage of a chain; what a data file is recognised as."""
    if "chain" in found:
        return [line for name, page in found["chain"].items() for line in [f"== {name}", *check_lines(page), ""]]
    if "preflight" not in found:
        return tree_lines(found)
    head = f"{found['stage']} of {found['base']['name']}: {found['trainable_parameters']:,} of "
    notes = [f"  {note}" for note in found["notes"]]
    return [
        f"{head}{found['total_parameters']:,} parameters train, {found['precision']} on {found['device']}", "",
        *page_lines(found["preflight"]), *(["", "noticed", *notes] if notes else []),
    ]  # fmt: skip


def table(rows: Sequence[Sequence[str]], *, right: bool = True) -> list[str]:
    """Columns side by side, the first to the left, the others to the right or, as text, to the left."""
    first, *others = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    side = str.rjust if right else str.ljust
    return [
        "  ".join([row[0].ljust(first), *(side(c, w) for c, w in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]


def number_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def cell_text(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return number_text(entry)
    if entry.get("low") is None:
        return number_text(entry.get("value"))
    return f"{number_text(entry['value'])} [{number_text(entry['low'])}, {number_text(entry['high'])}]"


def metric_lines(columns: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One row a metric, one column a moment, each value with its interval."""
    shown = {title: values for title, values in columns.items() if values}
    names = dict.fromkeys(name for values in shown.values() for name in values)
    if not names:
        return []
    return table([["metric", *shown], *([name, *(cell_text(v.get(name)) for v in shown.values())] for name in names)])


def evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    """One row a metric: its value with its interval, and the number of rows."""
    rows = [[name, cell_text(entry), number_text(entry.get("n"))] for name, entry in result["metrics"].items()]
    return table([["metric", "value [95 % interval]", "n"], *rows])


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """A run's result as people read it; the whole of it stands in result.json."""
    lines = metric_lines({name: result.get(name) for name in ("before", "after", "difference")})
    lines += [""] if lines else []
    keys = ("run", "stage", "method", "trainable_parameters", "total_parameters", "seconds", "tokens_per_second",
            "peak_memory_bytes", "finished", "note", "verdict")  # fmt: skip
    lines += table([[key, number_text(result[key])] for key in keys if result.get(key) is not None] or [["", ""]])
    lines += baseline_lines(result)
    stages = result.get("stages")
    lines += ["", *tree_lines(stages)] if isinstance(stages, Mapping) else []
    return [*lines, "", *result["tree"]] if result.get("tree") else lines


def baseline_lines(result: Mapping[str, Any]) -> list[str]:
    """The tuned model beside simple systems, on the test rows where there are some."""
    from tunesmith.evaluate.report_baselines import baselines_text

    part = result.get("test")
    source = part if isinstance(part, Mapping) and part.get("baselines") else result
    head, rows = baselines_text(source)
    said = [str(source["worth"])] if source.get("worth") else []
    return ["", *table([head, *rows], right=False), *said] if rows else []


def quickstart_lines(result: Mapping[str, Any]) -> list[str]:
    """The figures that matter to a newcomer, some examples, and what to do next."""
    held_out = result["test"] if isinstance(result.get("test"), Mapping) else result
    lines = _beside(held_out) if held_out.get("baselines") else result_lines(result)
    lines += ["", *_example_lines(result.get("examples") or ())]
    lines += [f"report  {result['report']}", f"recipe  {result['recipe']}", "", "next:"]
    return lines + table([[f"  {command}", "# " + why] for command, why in result["next"]], right=False)


def _beside(held_out: Mapping[str, Any]) -> list[str]:
    """Accuracy of the tuned model, of its base and of simple systems, one below the other."""
    entries = {"the base, with a new head": held_out["before"], "tuned": held_out["after"],
               "  the difference, row by row": held_out["difference"]}  # fmt: skip
    entries |= {name: entry["metrics"] for name, entry in held_out["baselines"].items()}
    rows = [[name, cell_text(metrics["accuracy"])] for name, metrics in entries.items()]
    count = held_out["after"]["accuracy"]["n"]
    head = [f"accuracy on {count:,} rows used for nothing else", "with 95 % interval"]
    return [*table([head, *rows], right=False), "", str(held_out.get("worth", ""))]


def _example_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels side by side; completions one below the other."""
    labelled = [row for row in rows if "label" in row]
    if labelled:
        head = ["before", "after", "right", "text"]
        body = [[str(row[key]) for key in ("before", "after", "label", "prompt")] for row in labelled]
        return [*table([head, *body], right=False), ""]
    lines: list[str] = []
    for row in rows[:4]:
        lines += [f"{title}: {_one_line(row.get(key))}" for title, key in _TITLES if row.get(key)] + [""]
    return lines


_TITLES = (("prompt", "prompt"), ("before", "before"), ("after ", "after"), ("wanted", "reference"))


def _one_line(text: Any, width: int = 140) -> str:
    flat = " ".join(re.sub(r"<\|\w+\|>", " ", str(text)).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def tree_lines(value: Mapping[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{indent}{key}:", *tree_lines(item, indent + "  ")]
        elif isinstance(item, (list, tuple)) and item:
            lines += [f"{indent}{key}:", *(f"{indent}  - {number_text(part)}" for part in item)]
        else:
            lines.append(f"{indent}{key}: {'none' if item in (None, [], ()) else number_text(item)}")
    return lines


def rows_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["no runs here; `tunesmith train RECIPE.yaml` makes one under ./runs"]
    keys = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], Mapping)))
    return table([keys, *([number_text(row.get(key)) for key in keys] for row in rows)])


def diff_lines(found: Mapping[str, Mapping[str, Sequence[Any]]], a: str, b: str) -> list[str]:
    lines: list[str] = []
    for part, values in found.items():
        rows = [[key, number_text(pair[0]), number_text(pair[1])] for key, pair in values.items()]
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
        print(painted(text, self._stream), file=self._stream, flush=True)

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
