"""A chain from beginning to end: every stage a run of its own, each starting from the one before, cached by content.

`runs/NAME/1-sft`, `2-reward`, `3-ppo` are ordinary run folders, so exact resume is theirs. What a chain adds is the
hand-off: `handoff.json` in each says what it started from (content, tokenizer, template), what it gives, and the key
of all that decides its result. A stage whose key is the same is not run again; one whose key changed is set aside
under `replaced/` and comes back from there when the key does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.data.encode import tokenizer_hash
from tunesmith.engine.durable import disk_errors, file_sha256, fsync_folder, make_folder, remove_folder
from tunesmith.engine.fit import StepReport
from tunesmith.errors import Interrupted, RecipeError, RunError, TunesmithError, several
from tunesmith.evaluate.chain_report import write_chain_report
from tunesmith.evaluate.lineage import read_lineage, tree
from tunesmith.model.load import base_record, load_tokenizer
from tunesmith.recipe import Recipe, Resolved
from tunesmith.recipe_chain import Chain, ChainStage, load_saved
from tunesmith.rundir import RunDir, model_run
from tunesmith.stages import checking, from_run, running
from tunesmith.stages.bases import base_path
from tunesmith.stages.earlier import measure_earlier
from tunesmith.stages.job import has_soft_prompt
from tunesmith.stages.prepare import ONLINE, STAGES, locate, prepare, read_sets

Say = Callable[[str], None]
Show = Callable[[StepReport], None]
REPLACED = "replaced"
ADAPTERS = ("lora", "peft")
_FILES = ("evaluate.metrics", "evaluate.probe", "ppo.ptx_data", "reward_model.demonstrations", "reward.function",
          "reward.model", "reward.run", "tune.adapter")  # fmt: skip
"""Keys beside `data` that name files whose content decides the result."""


def start(run: RunDir, chain: Chain, *, say: Say, show: Show) -> dict[str, Any]:
    """Run `chain` in the locked folder `run`, which may hold an earlier version of it. All stages are checked first."""
    check(chain, say=say, whole=False)
    for name in ("result", "lineage", "report"):
        run.file(name).unlink(missing_ok=True)
    run.write_json("chain", {"format": 1, "recipe_folder": str(chain.folder), "model": chain.stages[-1].name})
    run.write_text("recipe", chain.to_yaml())
    return _run(run, chain, again=False, say=say, show=show)


def go_on(run: RunDir, *, say: Say, show: Show) -> dict[str, Any]:
    """Go on with an interrupted chain: finished stages stand, the one under way resumes exactly, the rest follow."""
    folder = run.read_json("chain").get("recipe_folder")
    if not isinstance(folder, str):
        raise RunError(f"{run.file('chain')} is damaged: it does not name the recipe's folder; run the recipe again")
    return _run(run, load_saved(run.file("recipe"), Path(folder)), again=True, say=say, show=show)


def check(chain: Chain, *, say: Say, whole: bool = True) -> dict[str, dict[str, Any]]:
    """What each stage would notice before its first step, with the plain base in place of the stage before it.

    `whole` gives each its pre-flight page; a run shows that when the stage begins.
    Raises one `RecipeError` with the problems of all stages.
    """
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for stage in chain.stages:
        recipe = stage.resolved.recipe
        if stage.parent is not None and has_soft_prompt(chain.stages[stage.parent].resolved.recipe):
            parent = chain.stages[stage.parent].name
            problems.append(f"stage {stage.name} starts from {parent}, whose soft prompt cannot be merged into a base; "
                            "tune that stage by lora, or give this one a `base`")  # fmt: skip
        try:
            job, base = prepare(recipe, chain.folder, say=lambda text: None)
            if recipe.stage in ONLINE and not stage.rewards:
                STAGES[recipe.stage].build(job)  # opens the reward; one that a stage here gives is not there yet
        except TunesmithError as error:
            problems.append(f"stage {stage.name}: {error}")
            continue
        found[stage.name] = {
            **(checking.found_of(job, base, stage.resolved) if whole else {}),
            "stage": recipe.stage,
            "starts_from": _start_name(chain, stage),
            "reward": ", ".join(chain.stages[i].name for i in stage.rewards) or None,
            "notes": [*stage.notes, *stage.resolved.warnings],
        }
    if problems:
        raise several(problems, RecipeError, headline="this chain cannot run:")
    say("chain: " + ", ".join(f"{name} from {f['starts_from']}" for name, f in found.items()))
    for stage in chain.stages:
        for note in stage.notes:
            say(f"{stage.name}: {note}")
    return found


def _start_name(chain: Chain, stage: ChainStage) -> str:
    return stage.resolved.recipe.base if stage.parent is None else chain.stages[stage.parent].name


def _run(run: RunDir, chain: Chain, *, again: bool, say: Say, show: Show) -> dict[str, Any]:
    cached = []
    for index, stage in enumerate(chain.stages):
        try:
            done, taken_over = _stage(run, chain, index, again=again, say=say, show=show)
            measure_earlier(done, [RunDir(run.path / chain.stages[i].name) for i in chain.ancestors(index)], say=say)
        except Interrupted as stop:
            where = f"chain {run.name}, stage {stage.name}: {stop}"
            raise Interrupted(f"{where.replace('--resume RUN', f'--resume {run.path}')}", stop.exit_code) from None
        except TunesmithError as error:
            error.args = (f"stage {stage.name}: {error}",)
            raise
        cached += [stage.name] if taken_over else []
    lineage = read_lineage(run.path, [stage.name for stage in chain.stages], cached=cached)
    run.write_json("lineage", lineage)
    result = _result(run, lineage)
    run.write_json("result", result)
    write_chain_report(run.path)
    say(f"report: {run.file('report')}")
    return result


def _stage(run: RunDir, chain: Chain, index: int, *, again: bool, say: Say, show: Show) -> tuple[RunDir, bool]:
    """Bring one stage to its end; True when it was there already."""
    stage = chain.stages[index]
    resolved = _at_its_place(run, chain, stage)
    handoff = _handoff(run, chain, stage, resolved)
    place = _unchanged(run, stage.name, handoff["key"]) if again else None
    place = place or _make_way(run, stage.name, handoff["key"], say)
    there = place.finished
    if there:
        say(f"{stage.name}: cached, nothing that decides its result has changed")
        if not place.file("report").is_file():
            running.write_pages(place)
    else:
        say(f"{stage.name}: from {_start_name(chain, stage)}")
        _train(place, resolved, handoff, say, show)
    place.write_json("handoff", {**handoff, "gives": from_run.content(place)})
    return place, there


def _train(place: RunDir, resolved: Resolved, handoff: Mapping[str, Any], say: Say, show: Show) -> None:
    with disk_errors(place.path):
        make_folder(place.path)
    place.lock()
    try:
        if place.file("recipe").is_file():
            running.go_on(place, say=say, show=show)
        else:
            place.write_json("handoff", handoff)
            running.start(place, resolved, say=say, show=show)
    finally:
        place.unlock()


def _unchanged(run: RunDir, name: str, key: str) -> RunDir | None:
    """The stage to go on with. `RunError` when it is finished and was made from other inputs; one under way is refused
    by its own resume, which names them."""
    place = RunDir(run.path / name)
    if not place.file("recipe").is_file():
        return None
    if place.finished and _key_of(place) != key:
        raise RunError(
            f"{place.path} was made from other inputs than are here now; put them back, or run the chain's recipe "
            "again (`tunesmith train RECIPE.yaml`) to make anew what has changed"
        )
    return place


def _at_its_place(run: RunDir, chain: Chain, stage: ChainStage) -> Resolved:
    """The stage's recipe with the folders of the stages it starts from and is paid by."""
    recipe = stage.resolved.recipe
    update: dict[str, Any] = {"run": None}
    if stage.parent is not None:
        update["base"] = str((run.path / chain.stages[stage.parent].name).resolve())
    if stage.rewards and recipe.reward is not None:
        names = {chain.stages[i].name for i in stage.rewards}
        parts = [part.strip() for part in str(recipe.reward.run).split(",")]
        runs = [str((run.path / part).resolve()) if part in names else part for part in parts]
        update["reward"] = recipe.reward.model_copy(update={"run": ",".join(runs)})
    return replace(stage.resolved, recipe=recipe.model_copy(update=update))


def _handoff(run: RunDir, chain: Chain, stage: ChainStage, resolved: Resolved) -> dict[str, Any]:
    """What the stage starts from, and the key: equal keys give equal results on the same machine."""
    recipe = resolved.recipe
    base = base_path(recipe.base, chain.folder)
    record = base_record(base, trust=recipe.trust_remote_code) | from_run.origin(base)
    parent = None if stage.parent is None else chain.stages[stage.parent]
    starts = {
        "stage": None if parent is None else parent.name,
        "base": stage.resolved.recipe.base,
        "content": record.get("content") or record["hash"],
        "licence": record["licence"],
        "how": _how(parent),
        "tokenizer": tokenizer_hash(load_tokenizer(base, trust=recipe.trust_remote_code)),
        "template": recipe.data.asked_by(),
    }
    rewards = [
        {"stage": chain.stages[i].name, "content": from_run.content(RunDir(run.path / chain.stages[i].name))}
        for i in stage.rewards
    ]
    settings = stage.resolved.recipe.model_dump(exclude={"run", "base", "threads", "data"})
    data = recipe.data.model_dump(exclude={"train", "eval", "test", "mix"})
    parts = [settings, data, _fingerprints(recipe, chain.folder), starts["content"], starts["tokenizer"]]
    key = sha256(json.dumps([*parts, rewards], sort_keys=True, default=str).encode()).hexdigest()
    return {"format": 1, "key": key, "starts_from": starts, "rewards": rewards, "notes": list(stage.notes)}


def _how(parent: ChainStage | None) -> str:
    if parent is None:
        return "the plain base"
    merged = parent.resolved.recipe.tune.method in ADAPTERS
    return "the adapter merged into its base, in fp32, verified" if merged else "its weights"


def _fingerprints(recipe: Recipe, folder: Path) -> dict[str, str | None]:
    """The content of everything that the recipe reads."""
    sets = read_sets(recipe, folder)
    found = {name: getattr(getattr(sets, name), "fingerprint", None) for name in ("train", "eval", "test")}
    for key in _FILES:
        at: Any = recipe
        for part in key.split("."):
            at = getattr(at, part, None)
        for i, name in enumerate(at.split(",") if isinstance(at, str) else at or []):
            found[f"{key}.{i}"] = _content_of(Path(locate(name.strip().rpartition(":")[0] or name.strip(), folder)))
    return found


def _content_of(path: Path) -> str | None:
    path = path if path.exists() else Path("runs") / path
    if from_run.is_run(path):
        return from_run.content(model_run(RunDir(path)))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return sha256("".join(f"{p.name}{file_sha256(p)}" for p in files).encode()).hexdigest()
    return file_sha256(path) if path.is_file() else None


def _make_way(run: RunDir, name: str, key: str, say: Say) -> RunDir:
    """The folder for the stage: the one that stands there when its key is this, else a free place.

    What stood there under another key goes to `replaced/`, and what went there under this key comes back.
    """
    place, shelf = RunDir(run.path / name), run.path / REPLACED
    old = _key_of(place)
    if old == key:
        return place
    with disk_errors(place.path):
        if place.file("recipe").is_file():
            make_folder(shelf)
            os.rename(place.path, _free(shelf / f"{name}-{(old or 'unknown')[:8]}"))
            fsync_folder(run.path)
            say(f"{name}: its recipe, data or start has changed; what was there stands in {shelf}")
        elif place.path.exists():
            remove_folder(place.path)  # a stage that was stopped before it began
        kept = shelf / f"{name}-{key[:8]}"
        if _key_of(RunDir(kept)) == key:
            os.rename(kept, place.path)
            fsync_folder(run.path)
    return place


def _key_of(place: RunDir) -> str | None:
    try:
        return str(place.read_json("handoff")["key"])
    except (RunError, KeyError, TypeError):
        return None


def _free(path: Path) -> Path:
    names: Iterable[Path] = (path if n == 0 else path.with_name(f"{path.name}.{n}") for n in range(1000))
    return next(name for name in names if not name.exists())


def _result(run: RunDir, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The contract of a result, filled from the stages; the last stage's figures are the chain's."""
    results = [RunDir(run.path / stage["name"]).read_json("result") for stage in lineage["stages"]]
    last = results[-1]
    keep = ("before", "after", "difference", "trainable_parameters", "total_parameters", "tokens_per_second", "verdict")
    return {
        "run": run.name,
        "stage": "chain",
        "stages": [stage["name"] for stage in lineage["stages"]],
        "cached": [stage["name"] for stage in lineage["stages"] if stage["cached"]],
        "base": ", ".join(str(root["base"]) for root in lineage["roots"]),
        "method": ", ".join(stage["method"] for stage in lineage["stages"]),
        **{key: last.get(key) for key in keep},
        "seconds": round(sum(result["seconds"] for result in results), 3),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "tree": tree(lineage),
    }
