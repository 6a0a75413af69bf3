"""Trains every example and writes what came out beside its recipe: `python examples/expected.py [NAME ...]`.

The figures of `expected.md` are one run's, on one machine; another CPU sums in another order and differs a little.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.cli_output import metric_lines

HERE = Path(__file__).resolve().parent
FETCHED = ("imdb_lora", "mlm")
"""Examples whose base has to be fetched first."""


def names() -> list[str]:
    """Every example with a recipe, in alphabetical order."""
    return sorted(path.parent.name for path in HERE.glob("*/recipe.yaml"))


def expected(name: str, work: Path) -> str:
    """Train one example in `work` and describe the run."""
    run = work / name
    result = api.train(HERE / name / "recipe.yaml", run=str(run), say=lambda text: print(text, file=sys.stderr))
    folders = (
        [run] if (run / "evaluations.jsonl").exists() else sorted(p for p in run.iterdir() if p.name[:1].isdigit())
    )
    parts = [f"# {name}: what to expect", f"Made by `python examples/expected.py {name}`.", _machine(folders[0])]
    for folder in folders:
        parts += [f"## {folder.name}"] if len(folders) > 1 else []
        parts += [_curve(folder), *_verdict(folder)]
    parts.append(f"{result['seconds']:.0f} seconds in all.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(run: Path) -> str:
    found = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    threads = f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("tunesmith", "torch", "transformers"))
    base = json.loads((run / "inputs.json").read_text(encoding="utf-8"))["base"]
    return f"{found['device']}, {found['precision']}, {threads}; {versions}; base {base['name']} ({base['hash'][:12]})."


def _curve(run: Path) -> str:
    """The held-out metrics of every evaluation; step 0 is the untrained model."""
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = list(dict.fromkeys(key for line in lines for key in line["metrics"]))
    rows = [(f"{line['step']}", *(_figure(line["metrics"].get(key)) for key in keys)) for line in lines]
    return _table(("step", *keys), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _verdict(run: Path) -> list[str]:
    result: Mapping[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    found = [str(result["verdict"])]
    test = (result.get("test") or {}).get("difference")
    if test:
        found.append("On the test rows:")
        found.append("```text\n" + "\n".join(metric_lines(result["test"])) + "\n```")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for example in sys.argv[1:] or [name for name in names() if name not in FETCHED]:
            (HERE / example / "expected.md").write_text(expected(example, Path(folder)), encoding="utf-8")
