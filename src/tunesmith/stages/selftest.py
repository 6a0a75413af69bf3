"""Does this model, on this machine, train as it should? The laws of the program, tried on the user's own recipe.

Every check compares two ways to the same numbers: packed and one by one, one batch and many, merged and beside,
sampled and trained, bf16 and float64, undisturbed and resumed. A check fails when they differ by more than its limit.
"""

from __future__ import annotations

import copy
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate
from tunesmith.data.prompts import PromptSet
from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.model.language import LanguageModel
from tunesmith.model.lora import LoraLinear, lora_layers, merge
from tunesmith.model.packing import Layout
from tunesmith.model.quantize import num_parameters
from tunesmith.model.score import ScoreModel
from tunesmith.recipe import Recipe, Resolved
from tunesmith.rollout.sampler import Sampler
from tunesmith.rundir import RunDir, create_run
from tunesmith.stages import running
from tunesmith.stages.finals import wrap
from tunesmith.stages.job import Job
from tunesmith.stages.prepare import Say, prepare

NUM_SAMPLES = 8
MAX_LENGTH = 256
RESUME_STEPS = 4
DOUBLE_LIMIT = 400_000_000
"""Parameters up to which float64 is tried: 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Check:
    """One law on this model: the largest difference found, what is allowed, and in which unit. `error` None: not
    tried, and `note` says why."""

    name: str
    error: float | None
    limit: float
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """True also for what could not be tried."""
        return self.error is None or self.error <= self.limit


def selftest(resolved: Resolved, *, say: Say) -> list[Check]:
    """All checks on the recipe's own base, data and adapter. Raises what preparing the recipe raises."""
    recipe = _plain(resolved.recipe)
    job, _ = prepare(recipe, resolved.folder, say=_quiet)
    model = wrap(recipe.stage, job.backbone).to(job.device).eval()
    samples = _samples(job)
    found = []
    for check in _checks(job, model, samples):
        say(_line(check))
        found.append(check)
    check = _resumed(resolved)
    say(_line(check))
    return [*found, check]


def _quiet(_: str) -> None:
    return None


def _line(check: Check) -> str:
    if check.error is None:
        return f"-    {check.name}: not tried, {check.note}"
    note = f" allowed ({check.note})" if check.note else " allowed"
    verdict = "ok" if check.passed else "FAIL"
    return f"{verdict:<4} {check.name}: {check.error:.1e} {check.unit}, {check.limit:.0e}{note}"


def _plain(recipe: Recipe) -> Recipe:
    """The recipe without what draws at random: the checks compare forwards."""
    return recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"dropout": 0.0})}) if (
        recipe.tune.method == "lora"
    ) else recipe  # fmt: skip


def _samples(job: Job) -> list[Sample]:
    """Short training samples of different lengths; of prompts, each token that follows counts."""
    store = job.inputs.train
    if isinstance(store, PromptSet):
        return [_counted(store[i].ids) for i in range(min(NUM_SAMPLES, len(store)))]
    order = sorted(range(len(store)), key=lambda i: (int(store.lengths[i]) > MAX_LENGTH, i))[:NUM_SAMPLES]
    samples = [store[i] for i in order]
    if job.recipe.stage in ("classify", "reward"):
        return samples
    return [sample if sample.weights.any() else _counted(sample.ids) for sample in samples]


def _counted(ids: Any) -> Sample:
    import numpy as np

    ids = np.asarray(ids, np.int32)[:MAX_LENGTH]
    return Sample(ids, np.r_[0.0, np.ones(len(ids) - 1)].astype(np.float32))


def _checks(job: Job, model: LanguageModel | ScoreModel, samples: Sequence[Sample]) -> Iterator[Check]:
    yield _packed(model, samples, job.device)
    yield _accumulated(model, samples, job.device)
    yield _merged(model, samples, job.device)
    if isinstance(model, LanguageModel) and model.causal:
        yield _sampled(model, job.tokenizer, samples)
    yield from _precise(job, model, samples)


def _answers(model: nn.Module, batch: Batch) -> Tensor:
    """Scores `[S, C]`, or log-probs of the targets that count."""
    outputs = model(batch)
    return outputs.scores if outputs.scores is not None else outputs.logprobs[batch.weights > 0]


@torch.no_grad()
def _packed(model: LanguageModel | ScoreModel, samples: Sequence[Sample], device: str) -> Check:
    together = _answers(model, collate(samples).to(device))
    alone = torch.cat([_answers(model, collate([sample]).to(device)) for sample in samples])
    layout = "" if model.layout is Layout.PACKED else f"this family runs {model.layout.value}: {model.why}"
    what = "a score is the same beside others" if isinstance(model, ScoreModel) else "packed is one by one"
    return Check(what, _furthest(together, alone), 1e-3, "nats" if layout == "" else "", layout)


def _accumulated(model: LanguageModel | ScoreModel, samples: Sequence[Sample], device: str) -> Check:
    """Gradients of the summed answers over one batch and over parts of it."""

    def gradients(parts: Sequence[Sequence[Sample]]) -> Tensor:
        model.zero_grad(set_to_none=True)
        for part in parts:
            _answers(model, collate(part).to(device)).sum().backward()
        grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        return torch.cat(grads) if grads else torch.zeros(1)

    with _moved_off_zero(model):
        whole = gradients([samples])
        parts = gradients([samples[:1], samples[1:3], samples[3:]] if len(samples) > 3 else [[s] for s in samples])
    model.zero_grad(set_to_none=True)
    error = float((whole - parts).abs().max() / whole.abs().max().clamp_min(1e-12))
    return Check("many micro-batches are one batch", error, 1e-3, "of the gradient")


@contextmanager
def _moved_off_zero(model: nn.Module) -> Iterator[None]:
    """New adapters with a B that is not zero for a while: a law that holds only at the start is no law."""
    layers = list(lora_layers(model).values())
    before = [layer.lora_B.detach().clone() for layer in layers]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            draw = torch.randn(layer.lora_B.shape, generator=generator) * 0.02
            layer.lora_B.add_(draw.to(layer.lora_B.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, old in zip(layers, before, strict=True):
                layer.lora_B.copy_(old)


@torch.no_grad()
def _merged(model: LanguageModel | ScoreModel, samples: Sequence[Sample], device: str) -> Check:
    layers = lora_layers(model)
    if not layers:
        return Check("merged is unmerged", None, 1e-3, "", "the recipe trains no LoRA adapter")
    batch = collate(samples).to(device)
    kept = {name: _base_weight(layer).clone() for name, layer in layers.items()}
    with _moved_off_zero(model):
        beside = _answers(model, batch)
        merge(model)
        inside = _answers(model, batch)
        for name, layer in layers.items():
            _base_weight(layer).copy_(kept[name])
            layer.merged = False
    return Check(
        "merged is unmerged", _furthest(beside, inside), 1e-3, "nats", f"{len(layers)} layers, B drawn at random"
    )


def _base_weight(layer: LoraLinear) -> Tensor:
    return layer.weight.data


def _sampled(model: LanguageModel, tokenizer: Any, samples: Sequence[Sample]) -> Check:
    """Log-probs that the sampler returns against those of a training forward over the same tokens."""
    prompts = [sample.ids[: max(1, len(sample) // 2)].tolist() for sample in samples[:4]]
    rollouts = Sampler(model, tokenizer).sample(prompts, max_tokens=16, seed=0)
    error = 0.0
    for rollout in rollouts:
        full = _counted([*rollout.prompt_ids, *rollout.ids])
        with torch.no_grad():
            trained = _answers(model, collate([full]).to(model.backbone.device))[len(rollout.prompt_ids) - 1 :]
        sampled = torch.tensor(rollout.logprobs)[: len(trained)]
        error = max(error, _furthest(trained.cpu(), sampled))
    return Check("the sampler's log-probs are the trainer's", error, 1e-3, "nats", f"{len(rollouts)} rollouts")


def _precise(job: Job, model: LanguageModel | ScoreModel, samples: Sequence[Sample]) -> Iterator[Check]:
    """What fp32 and the run's own precision make of the mean answer, against float64."""
    batch = collate(samples).to(job.device)
    size = num_parameters(model)
    if size > DOUBLE_LIMIT or job.device == "mps":
        yield Check("fp32 is float64", None, 1e-3, "", f"{size:,} parameters are too many, or mps has no float64")
        return
    with torch.no_grad():
        exact = _answers(wrap(job.recipe.stage, copy.deepcopy(model.backbone).double()).eval(), batch)
        yield Check("fp32 is float64", _furthest(_answers(model, batch), exact), 1e-3, "nats")
        if job.precision == "bfloat16":
            low = wrap(job.recipe.stage, model.backbone, "bfloat16").eval()
            error = float((_answers(low, batch).double() - exact.double()).abs().mean())
            yield Check("bf16 is near float64", error, 0.1, "nats on average")


def _furthest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _resumed(resolved: Resolved) -> Check:
    """A short run that is stopped by a signal and goes on, against one that is left alone, byte by byte."""
    name = "a resumed run is an undisturbed one"
    short = _shortened(resolved)
    with tempfile.TemporaryDirectory(prefix="tunesmith-selftest-") as scratch:
        try:
            whole = _run(Path(scratch) / "whole", short, stop_at=None)
            parts = _run(Path(scratch) / "parts", short, stop_at=RESUME_STEPS // 2)
        except TunesmithError as error:
            return Check(name, None, 0.0, "", str(error).splitlines()[0])
        files = sorted(p.relative_to(whole) for p in (whole / "final").rglob("*.safetensors"))
        files.append(Path("metrics.jsonl"))
        different = [str(f) for f in files if (whole / f).read_bytes() != (parts / f).read_bytes()]
    note = f"{len(files)} files compared" if not different else f"differ: {', '.join(different)}"
    return Check(name, float(len(different)), 0.0, "files differ", note)


def _shortened(resolved: Resolved) -> Resolved:
    """The recipe with a few steps and nothing held out."""
    recipe = resolved.recipe
    train = {"epochs": None, "steps": RESUME_STEPS, "select_by": None, "early_stopping": None, "save_every": 1}
    update = {
        "train": recipe.train.model_copy(update=train),
        "data": recipe.data.model_copy(update={"eval": None, "test": None}),
        "evaluate": recipe.evaluate.model_copy(update={"samples": 0, "generate": None, "sentences": []}),
    }
    return replace(resolved, recipe=recipe.model_copy(update=update), warnings=())


def _run(folder: Path, resolved: Resolved, *, stop_at: int | None) -> Path:
    run: RunDir = create_run(str(folder), stage=resolved.recipe.stage)
    run.lock()
    try:
        try:
            running.start(run, resolved, say=_quiet, show=_stopper(stop_at))
        except Interrupted:
            running.go_on(run, say=_quiet, show=_stopper(None))
    finally:
        run.unlock()
    return folder


def _stopper(step: int | None) -> Callable[[Any], None]:
    """Sends this process the signal of a time limit after `step`, as a scheduler would."""

    def show(report: Any) -> None:
        if step is not None and report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return show
