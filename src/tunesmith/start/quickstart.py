"""`tunesmith quickstart`: a stage's recipe laid out where the user can edit it, and what is told after its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.data.records import Labelled, Record
from tunesmith.recipe import Resolved, load_recipe
from tunesmith.recipe_chain import is_chain_recipe
from tunesmith.rundir import RunDir, read_rows
from tunesmith.start.written import STAGES, recipe_text, with_own_data, write_new

Json = dict[str, Any]
MAX_EXAMPLES = 8


def lay_out(stage: str, folder: Path) -> Path:
    """`folder/STAGE.yaml` with its data files beside it. Files that are there already are used as they stand."""
    text = recipe_text(stage)
    target = folder / f"{stage}.yaml"
    write_new(target, with_own_data(text, folder), keep=True)
    return target


def free_name(stage: str, root: Path = Path("runs")) -> str:
    """`quickstart-STAGE`, numbered from the second run on."""
    stem, number = f"quickstart-{stage}", 1
    while (root / (name := stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return name


def finish(run: RunDir, recipe: Path, result: Mapping[str, Any], overrides: tuple[str, ...]) -> Json:
    """The result with examples and what to do next."""
    told = dict(result)
    if not is_chain_recipe(recipe):
        resolved = load_recipe(recipe, overrides)
        told["examples"] = _examples(run, resolved)
    told["report"] = str(run.file("report"))
    return told | {"recipe": str(recipe), "next": next_commands(str(result.get("stage", "chain")), recipe, run)}


def _examples(run: RunDir, resolved: Resolved) -> list[Json]:
    """What the model made of some texts before and after, from the run's own samples; a classifier's with the truth."""
    rows = read_rows(run.file("samples"))[:MAX_EXAMPLES]
    if resolved.recipe.stage != "classify" or not rows:
        return rows
    from tunesmith.stages.prepare import read_sets

    sets = read_sets(resolved.recipe, resolved.folder)
    records: list[Record] = [r for part in (sets.test, sets.eval) if part is not None for r in part]
    truth = {r.text: r.label for r in records if isinstance(r, Labelled)}
    return [row | ({"label": truth[row["prompt"]]} if row.get("prompt") in truth else {}) for row in rows]


def next_commands(stage: str, recipe: Path, run: RunDir) -> list[tuple[str, str]]:
    """(command, what it is for), in the order in which one would try them."""
    place = f"runs/{run.name}"
    own = f"tunesmith init {stage} --data YOUR_FILE" if stage != "chain" else "tunesmith init chain"
    found = [
        (f"tunesmith train {recipe}", f"again, after you have changed {recipe}"),
        (own, "a recipe for your own data"),
    ]
    if stage in ("classify", "sft", "dpo", "pretrain"):
        found.insert(0, (f"tunesmith chat {place} --prompt {json.dumps(_PROMPT[stage])}", "ask the tuned model"))
    if stage != "chain":
        found.append((f"tunesmith export {place} --to {run.name} --format merged", "for other programs"))
    later = STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()
    if later:
        found.append((f"tunesmith quickstart --stage {later[0]}", "the next stage"))
    return found


_PROMPT = {
    "classify": "I could not stop smiling.",
    "sft": "What does an actor do?",
    "dpo": "What does an actor do?",
    "pretrain": "The soup was",
}
__all__ = ["finish", "free_name", "lay_out", "next_commands"]
