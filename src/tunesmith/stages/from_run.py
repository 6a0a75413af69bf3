"""A finished run as a base: its trained weights merged into the base it began from, written once, named by content.

Whatever a run trained - everything, the last layers, an adapter - the next one starts from a plain model folder. The
merge is done in fp32 and verified by logits before it is published (`export.merge`), so nothing is rounded away between
two stages; a new adapter then stands on the merged weights of the one before.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from tunesmith.engine.checkpoint import MANIFEST, TENSORS, saved_steps, step_folder
from tunesmith.errors import RunError, TunesmithError
from tunesmith.export.merge import export_run
from tunesmith.export.verify import probe_ids
from tunesmith.recipe import load_resolved
from tunesmith.rundir import LAYOUT, RunDir, model_run
from tunesmith.stages import finals

_FOLDER = re.compile(r"model-([0-9a-f]{16})")


def is_run(folder: Path) -> bool:
    """True for a run's folder; a model folder has a config.json of its own."""
    return (folder / LAYOUT["recipe"]).is_file() and not (folder / "config.json").is_file()


def content(run: RunDir) -> str:
    """sha256 of what the run gives: the bytes it trained, what they are added to, and how. `RunError` if unfinished.

    Two runs with the same content are the same model, whatever their names, folders and times.
    """
    recipe, inputs = load_resolved(run.file("recipe")), run.read_json("inputs")
    base = inputs["base"]
    tune = recipe.tune.model_dump(exclude={"adapter"}, exclude_none=True)
    parts = [_trained_bytes(run), base.get("content") or base["hash"], tune, inputs["labels"], inputs["template"]]
    return sha256(json.dumps([recipe.stage, *parts], sort_keys=True, default=str).encode()).hexdigest()


def _trained_bytes(run: RunDir) -> str:
    """The sha256 of the final tensors, as their manifest states it."""
    steps = saved_steps(run.file("final"))
    if not steps:
        raise RunError(f"{run.path} is not finished; go on with `tunesmith train --resume {run.path}`")
    manifest = step_folder(run.file("final"), steps[-1]) / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return next(str(entry["sha256"]) for entry in files if entry["name"] == TENSORS)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise RunError(f"{manifest} is damaged; train again, or restore it from a copy") from None


def model_folder(folder: Path) -> Path:
    """The plain model folder of the finished run (or chain) in `folder`, written on the first call."""
    run = model_run(RunDir(folder))
    found = content(run)
    target = run.file("final") / f"model-{found[:16]}"
    if (target / "config.json").is_file():
        return target
    tuned = finals.open_tuned(run)
    config = tuned.backbone.config.get_text_config()
    probes = probe_ids(config.vocab_size, avoid=config.pad_token_id)
    try:
        export_run(tuned.backbone, tuned.tokenizer, target, "merged", dtype=torch.float32, probes=probes)
    except TunesmithError:
        if not (target / "config.json").is_file():  # else another process was quicker with the same bytes
            raise
    return target


def origin(base: str) -> dict[str, Any]:
    """For a folder that `model_folder` made: which run it is and that run's content; empty for any other base."""
    folder = Path(base)
    match = _FOLDER.fullmatch(folder.name)
    if match is None or folder.parent.name != LAYOUT["final"]:
        return {}
    run = RunDir(folder.parent.parent)
    chain = run.path.parent
    name = f"{chain.name}/{run.name}" if (chain / LAYOUT["chain"]).is_file() else run.name
    return {"name": name, "run": name, "content": content(run)}
