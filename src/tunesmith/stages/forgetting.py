"""Forgetting as a limit: probes measured at every evaluation, replay that answers to them, and what came of it.

Forgetting is how much a probe's loss rose over what it was before the first step, as a share of that; of several probes
the worst counts. For text that is the rise in bits per byte too: both are nats over something that does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate
from tunesmith.data.replay import ReplaySource, Share
from tunesmith.engine.contracts import FitSpec, Progress
from tunesmith.errors import ModelError, RunError
from tunesmith.model import soft_prompt
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import load_backbone, load_config
from tunesmith.objectives.replay import WithReplay
from tunesmith.rundir import RunDir
from tunesmith.stages import measuring, mlm
from tunesmith.stages.job import FORGETTING, Built, Job, Measured
from tunesmith.stages.likelihood import measure_likelihood
from tunesmith.stages.probes import Probe

Json = dict[str, Any]
_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")


def guarded(built: Built, job: Job) -> Built:
    """The stage with its probes in every evaluation and, where asked for, rows that are replayed."""
    if job.recipe.forget is None:
        return built
    built = _with_replay(built, job)
    inner, source = built.stage.evaluate, built.stage.source
    measure = _measurer(built, job)
    starts: dict[str, float] = {}

    def evaluate(step: int) -> Mapping[str, float]:
        assert job.run is not None and job.recipe.forget is not None
        starts.update(starts or _starts(job.run))
        found = dict(inner(step)) if inner is not None else {}
        rises = {name: rise(starts[name], m.metrics["loss"].value) for name, m in measure().items()}
        worst = max(rises.values(), key=lambda value: math.inf if math.isnan(value) else value)
        if isinstance(source, ReplaySource):
            source.adapt(worst, job.recipe.forget.limit, job.recipe.forget.near)
        apart = {f"{FORGETTING}.{name}": value for name, value in rises.items()} if len(rises) > 1 else {}
        return {**found, FORGETTING: worst, **apart}

    return replace(built, stage=replace(built.stage, evaluate=evaluate), probes=measure)


def rise(before: float, now: float) -> float:
    """How much the loss rose, as a share of what it was: 2.0 then 2.1 is 0.05."""
    return now / max(before, 1e-12) - 1


def _measurer(built: Built, job: Job) -> Callable[[], dict[str, Measured]]:
    """A function that measures every probe with whatever of the run's model answers it."""
    stage = job.recipe.stage
    own = {"mlm", "classify", "reward"} & {stage}
    foreign = {probe.kind for probe in job.inputs.probes.values()} - own
    language = _language(built, job, masked="mlm" in foreign) if foreign else None

    def one(probe: Probe) -> Measured:
        if probe.kind in own or language is None:
            return built.measure(probe.store, False)
        how = mlm.fixed_holes(job) if probe.kind == "mlm" else collate
        return measure_likelihood(job, language, probe.store, how, with_bytes=False)

    return lambda: {name: one(probe) for name, probe in job.inputs.probes.items()}


def _language(built: Built, job: Job, *, masked: bool) -> LanguageModel:
    """The run's model as a language model; of a classifier, its transformer under the output head of the base.

    `ModelError` when the base has no such head: what it knew of text cannot be read off then.
    """
    model = built.plain or built.stage.model
    if isinstance(model, LanguageModel):
        return model
    made = load_config(job.base, trust=job.recipe.trust_remote_code).architectures or ["no architecture named"]
    if not any(str(name).endswith(_LANGUAGE) for name in made):
        raise ModelError(f"forget.probe: {job.recipe.base} ({', '.join(made)}) has no head for text, so text cannot be "
                         "a probe of it; take labelled rows of an earlier task with the same labels")  # fmt: skip
    kind = "masked" if masked else "causal"
    headed = load_backbone(job.base, kind, seed=job.recipe.seed, trust=job.recipe.trust_remote_code)
    prefix, tuned = headed.base_model_prefix, job.backbone.base_model
    if type(getattr(headed, prefix)) is not type(tuned):
        raise ModelError(f"forget.probe: with tune.method {job.recipe.tune.method} text cannot be a probe of a "
                         f"{job.recipe.stage} run; take rows of its own kind")  # fmt: skip
    setattr(headed, prefix, tuned)
    headed.config = job.backbone.config
    headed.tie_weights()
    for parameter in headed.parameters():
        parameter.requires_grad_(parameter.requires_grad and any(parameter is p for p in tuned.parameters()))
    if (soft := soft_prompt.held_by(job.backbone)) is not None:
        headed.add_module(soft_prompt.PLACE, soft)
    return LanguageModel(headed, causal=not masked, compute=job.compute).to(job.device)


def _with_replay(built: Built, job: Job) -> Built:
    """The stage with rows of something else in every step."""
    spec, found = job.recipe.forget, job.inputs.replay
    if spec is None or spec.replay is None or found is None:
        return built
    objective, masks = built.stage.objective, mlm.masking(job) if job.recipe.stage == "mlm" else None

    def make_batch(samples: Sequence[Sample], step: int) -> Batch:
        return collate(samples) if masks is None else masks(samples, step=step)

    source = ReplaySource(
        built.stage.source, found.store, share=Share(spec.replay.ratio, spec.replay.most, job.recipe.seed),
        micro_batch_tokens=job.recipe.train.micro_batch_tokens, count=objective.count, make_batch=make_batch,
    )  # fmt: skip
    return replace(built, stage=replace(built.stage, source=source, objective=WithReplay(objective)))


def measure_start(run: RunDir, built: Built, job: Job) -> None:
    """Measure the probes before the first step and keep them in forget.json, unless this run has done so already."""
    if built.probes is None:
        return
    key = {name: probe.store.fingerprint for name, probe in job.inputs.probes.items()}
    if run.file("forget").is_file() and run.read_json("forget").get("key") == key:
        return
    run.write_json("forget", {"key": key, "before": {n: measuring.as_json(m) for n, m in built.probes().items()}})


def _starts(run: RunDir) -> dict[str, float]:
    return {name: float(kept["metrics"]["loss"]["value"]) for name, kept in run.read_json("forget")["before"].items()}


def outcome(run: RunDir, built: Built, job: Job, spec: FitSpec, progress: Progress) -> Json:
    """`forget` of the result: the limit, whether it was kept, every probe before and after, what was done for it."""
    if built.probes is None or spec.limit is None:
        return {}
    before = run.read_json("forget")["before"]
    probes: dict[str, Json] = {}
    for name, after in built.probes().items():
        was = measuring.from_json(before[name], after)
        if was is None:
            raise RunError(f"{run.file('forget')} is damaged: it lacks the probe {name}; start a new run")
        pair = measuring.pair(was, after, job.recipe.seed)
        probes[name] = {**pair, "rise": rise(was.metrics["loss"].value, after.metrics["loss"].value)}
    notes, source = progress.extra, built.stage.source
    found = {
        "at_most": spec.limit.at_most, "on_exceed": spec.limit.on_exceed, "kept_step": progress.best_step,
        "base_kept": progress.best_step == 0, "start_is_base": not job.starts_from_base,
        FORGETTING: max(probe["rise"] for probe in probes.values()),
        "exceeded": notes.get("exceeded", 0), "went_back": notes.get("went_back", 0), "rate": notes.get("rate", 1.0),
        "probes": probes,
    }  # fmt: skip
    if isinstance(source, ReplaySource):
        found["replay_ratio"] = source.ratio
    return {"forget": {**found, "verdict": verdict(found)}}


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence on the limit, as the report and the terminal say it."""
    limit, rose = f"{100 * found['at_most']:g} %", f"{100 * found[FORGETTING]:+.2f} %"
    if found["base_kept"] and not found.get("start_is_base", True):
        return (f"NO CHECKPOINT KEEPS FORGETTING WITHIN {limit}: nothing was learned. The soft prompt is kept as it "
                f"was drawn, with which it is {rose}: use the base without it. Evaluate more often "
                "(train.eval_every), lower train.learning_rate, or add forget.replay")  # fmt: skip
    if found["base_kept"]:
        return (f"NO CHECKPOINT KEEPS FORGETTING WITHIN {limit}: the base is kept as it was, and nothing was learned. "
                "Evaluate more often (train.eval_every), lower train.learning_rate, or add forget.replay")  # fmt: skip
    times = f"; {found['exceeded']} evaluations were over it" if found["exceeded"] else ""
    return f"Forgetting kept within {limit}: {rose} at step {found['kept_step']}{times}."
