"""Run the blocks of a page as a reader would: files are saved, commands and scripts run in one folder, in order."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tests.docs.blocks import ROOT, Block

from tunesmith.cli import main
from tunesmith.data.records import read_records
from tunesmith.recipe import load_recipe
from tunesmith.recipe_chain import load_chain

NOT_RUN = {
    "python -m venv": "would make an environment inside the test's",
    "pip install": "needs a network",
    "git clone": "needs a network",
    "cd tunesmith": "belongs to git clone",
    "hf download": "needs a network",
    "hf upload": "needs a network and an account",
    "tunesmith quickstart": "takes minutes; the suite runs it shortened elsewhere",
    "tunesmith train examples/": "takes minutes; test_docs_examples.py runs every example shortened",
    "tunesmith compare": "starts a process for every trial; its own tests run it",
    "tunesmith rank": "asks a person",
    "chromium": "a browser, which the suite does not need",
}
"""Commands that are shown and not run here, each with its reason."""

TOOLS = ("cat", "head", "tail", "ls", "wc", "sort", "cp", "mkdir")
STAGES = ("pretrain", "mlm", "sft", "classify", "reward", "dpo", "ppo", "grpo")


class BlockError(AssertionError):
    """A block of a page does not do what the page says."""


def run_block(block: Block, folder: Path) -> None:
    """Check one block; commands run in `folder`, which is the working directory. `BlockError` names the line."""
    kinds = {"bash": _bash, "python": _python, "yaml": _yaml, "jsonl": _jsonl, "json": _json}
    if block.language in kinds:
        kinds[block.language](block, folder)
    elif block.language not in ("text", "csv", "html"):
        raise BlockError(f"{block.where}: a block is bash, python, yaml, json, jsonl, csv, html or text")


def _bash(block: Block, folder: Path) -> None:
    for line in _commands(block.text):
        if any(line.startswith(prefix) for prefix in NOT_RUN):
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            _require_target(words, block)
        elif words[0] == "tunesmith" and "|" not in words:
            _forget_run(words, folder)
            code = main(words[1:])
            if code != 0:
                raise BlockError(f"{block.where}: `{line}` ended with {code}")
        elif words[0] in TOOLS:
            subprocess.run(["bash", "-c", line], cwd=folder, check=True, capture_output=True)
        else:
            raise BlockError(f"{block.where}: `{line}` is neither run nor listed with a reason why not")


def _forget_run(words: list[str], folder: Path) -> None:
    """A page that makes a run of the shared one's name makes it anew."""
    if words[1] == "train" and "--run" in words:
        shutil.rmtree(folder / "runs" / words[words.index("--run") + 1], ignore_errors=True)


def _commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _require_target(words: list[str], block: Block) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    missing = [word for word in words[1:] if "=" not in word and word not in targets]
    if missing:
        raise BlockError(f"{block.where}: the Makefile has no target {', '.join(missing)}")


def _python(block: Block, folder: Path) -> None:
    script = folder / (block.file_name or "block.py")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(block.text + "\n", encoding="utf-8")
    if block.file_name is None:
        runpy.run_path(str(script))


def _yaml(block: Block, folder: Path) -> None:
    """A recipe is loaded and, when it has a name, saved; a part of one is loaded inside the least recipe it fits."""
    raw = yaml.safe_load(block.text)
    if not isinstance(raw, dict):
        raise BlockError(f"{block.where}: a yaml block is a recipe or a part of one")
    if block.file_name is not None:
        path = folder / block.file_name
        path.write_text(block.text + "\n", encoding="utf-8")
        _load(path, raw)
        return
    stage = next((word for word in block.words if word in STAGES), "sft")
    path = folder / "part.yaml"
    path.write_text(yaml.safe_dump(_completed(raw, stage), sort_keys=False), encoding="utf-8")
    _load(path, raw)


def _load(path: Path, raw: Mapping[str, Any]) -> None:
    """Load a recipe, or a chain of them."""
    if "stages" in raw:
        load_chain(path)
    else:
        load_recipe(path)


def _completed(raw: Mapping[str, Any], stage: str) -> dict[str, Any]:
    if "stage" in raw or "stages" in raw:
        return dict(raw)
    data: dict[str, Any] = dict(raw.get("data") or {})
    if "mix" not in data:
        data.setdefault("train", "rows.jsonl")
    if "eval" not in data:
        data.setdefault("split", {"eval": 0.1})
    return {"stage": stage, "base": "base", **raw, "data": data}


def _jsonl(block: Block, folder: Path) -> None:
    """Rows shown for a stage are rows that the stage reads."""
    rows = [json.loads(line) for line in block.text.splitlines()]
    path = folder / "shown.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for stage in [word for word in block.words if word in STAGES]:
        found = read_records(path, stage=stage)
        if len(found) != len(rows):
            raise BlockError(f"{block.where}: stage {stage} reads {len(found)} of these {len(rows)} rows")


def _json(block: Block, folder: Path) -> None:
    json.loads(block.text)
