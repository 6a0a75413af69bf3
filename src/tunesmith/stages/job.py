"""A job: everything a stage is built from, made once from the recipe - tokenizer, samples, model, what trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from tunesmith.batch import Batch, Sample
from tunesmith.data.check import Finding
from tunesmith.data.columns import WithColumns
from tunesmith.data.encode import tokenizer_hash
from tunesmith.data.source import OfflineSource
from tunesmith.data.store import SampleStore
from tunesmith.engine.contracts import FitSpec, Stage
from tunesmith.engine.limit import Limit
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import OptimSpec, rate_at
from tunesmith.errors import RecipeError
from tunesmith.evaluate.generate import GenerationResult
from tunesmith.evaluate.intervals import Estimate, Statistic
from tunesmith.model import adapters, soft_prompt
from tunesmith.model.language import LanguageModel
from tunesmith.model.trainable import Trainable, TrainableSpec
from tunesmith.recipe import Recipe
from tunesmith.rundir import RunDir, flatten
from tunesmith.stages.own_metrics import Own
from tunesmith.stages.probes import Probe, fingerprints

Collate = Callable[[Sequence[Sample]], Batch]
FORGETTING = "forgetting"
"""The metric that a limit on forgetting is about."""
Store = Any
"""A `SampleStore`; where rollouts are made, a `PromptSet`. Both give samples by index, their lengths and origins."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The samples of a run and what was noticed while they were made."""

    train: Store
    eval: Store | None
    test: Store | None
    probe: SampleStore | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    """What forgetting is measured on, where the recipe sets it a limit."""
    replay: Probe | None = None
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bad_rows: tuple[Mapping[str, str], ...] = ()
    """Rows left out under `data.on_bad_row: skip`: which set, where, what is wrong, how to mend it."""
    findings: tuple[Finding, ...] = ()
    """What was noticed about the records, countable."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a stage is built from. `device` and `precision` are settled, nothing is `auto` any more.

    `base` is the base's folder or hub id, `folder` where the recipe's paths begin; `run` is where a source keeps a log
    of its own, None when nothing is written, and `say` tells the user.
    """

    recipe: Recipe
    tokenizer: Any
    inputs: Inputs
    backbone: Any
    trainable: Trainable
    device: str
    precision: str
    base: str = ""
    folder: Path = field(default_factory=Path)
    run: RunDir | None = None
    say: Callable[[str], None] = lambda _: None
    page: Mapping[str, Any] | None = None
    """What was looked at before the first step; None for a run that goes on."""
    own: Own | None = None
    """Metrics of the user's own, where the recipe or the command line names some."""
    start: Callable[[], Any] | None = None
    """Loads the backbone as it was before training, where `backbone` has been trained already."""

    @property
    def compute(self) -> torch.dtype:
        """The type matrix products run in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def chooses_by_own(self) -> bool:
        """Whether the best checkpoint is chosen by a metric of the user's own."""
        return self.own is not None and self.recipe.train.select_by in self.own.names

    @property
    def starts_from_base(self) -> bool:
        """Whether the run's start is its base with what was added switched off: a new adapter is the identity, a new
        soft prompt is not. One that the run goes on from is the start itself."""
        return self.recipe.tune.adapter is None and soft_prompt.held_by(self.backbone) is not None

    def at_start(self) -> AbstractContextManager[None]:
        """The backbone, not yet trained, as what came before the run: a new soft prompt is switched off inside."""
        return adapters.disabled(self.backbone) if self.starts_from_base else nullcontext()

    def own_for(self, store: Store, full: bool) -> Own | None:
        """The user's own metrics where they judge a measurement of `store`: held-out rows, test rows, whatever `eval`
        is given; not of training rows or of what forgetting is measured on."""
        return self.own if full or store is self.inputs.eval or store is self.inputs.test else None

    @property
    def eval_tokens(self) -> int:
        """Tokens in a batch when only measuring."""
        return self.recipe.train.micro_batch_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's figures on held-out rows, per row (`statistics`) and as a whole with intervals (`metrics`)."""

    statistics: Mapping[str, Statistic]
    metrics: Mapping[str, Estimate]
    generation: GenerationResult | None = None
    predictions: tuple[Mapping[str, Any], ...] = ()
    per_class: Mapping[str, Estimate] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else belongs into the result, by name."""

    def as_json(self) -> dict[str, Any]:
        """`{metric: {value, low, high, n}}`."""
        return {name: estimate.as_json() for name, estimate in self.metrics.items()}


@dataclass(frozen=True, slots=True)
class Built:
    """A stage ready for the loop, and how to measure it on any samples. `plain` is the model as a language model, where
    the stage's own acts as a policy. `probes` measures what forgetting is limited on, `logs` are files that are written
    along the way. `finish`, called once after the last step and before measuring, says what it does and returns what
    belongs into the result."""

    stage: Stage
    measure: Callable[[SampleStore, bool], Measured]
    extra: Mapping[str, Any] = field(default_factory=dict)
    plain: LanguageModel | None = None
    probes: Callable[[], Mapping[str, Measured]] | None = None
    logs: Mapping[str, MetricsLog] = field(default_factory=dict)
    finish: Callable[[Callable[[str], None]], Mapping[str, Any]] | None = None


def make_source(
    job: Job,
    make_batch: Callable[[Sequence[Sample], int], Batch] | None = None,
    *,
    samples: SampleStore | WithColumns | None = None,
) -> OfflineSource:
    """The training samples (or `samples`: the same with columns) in the order and steps that the recipe asks for."""
    train, store = job.recipe.train, samples or job.inputs.train
    return OfflineSource(
        store,
        seed=job.recipe.seed,
        num_epochs=train.epochs,
        num_steps=train.steps,
        batch_examples=train.batch_examples,
        batch_tokens=train.batch_tokens,
        micro_batch_tokens=train.micro_batch_tokens,
        groups=store.groups,
        **({} if make_batch is None else {"make_batch": make_batch}),
    )


def warmup_note(spec: FitSpec, num_steps: int) -> str:
    """What a warm-up that outlasts the run makes of its learning rate; empty when the rate is reached."""
    warmup, wanted = spec.optim.warmup_steps, spec.optim.learning_rate
    if warmup < num_steps:
        return ""
    reached = rate_at(spec.optim, num_steps - 1, num_steps)
    return (f"note: train.warmup is {warmup} steps of {num_steps}: the rate rises to {reached:.2g} and never reaches "
            f"train.learning_rate, {wanted:.2g}; lower train.warmup (a share below 1 fits any run)")  # fmt: skip


def fit_spec(recipe: Recipe, num_steps: int, device: str) -> FitSpec:
    """The loop's settings from the recipe; `warmup` below 1 is a share of the steps."""
    train = recipe.train
    warmup = round(train.warmup * num_steps) if train.warmup < 1 else int(train.warmup)
    assert train.learning_rate is not None, "the recipe is resolved"
    optim = OptimSpec(
        learning_rate=train.learning_rate,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        betas=(train.beta1, train.beta2),
        b_rate_ratio=train.adapter_b_rate_ratio or 1.0,
        schedule=train.schedule,
        warmup_steps=warmup,
        clip_norm=train.clip_norm,
        rate_ratios=_rate_ratios(recipe),
    )
    return FitSpec(
        seed=recipe.seed,
        optim=optim,
        eval_every=train.eval_every,
        save_every=train.save_every,
        keep=train.keep,
        select_by=train.select_by,
        patience=train.early_stopping.patience if train.early_stopping else None,
        device=device,
        limit=limit_of(recipe),
    )


def limit_of(recipe: Recipe) -> Limit | None:
    """The limit on forgetting as the loop takes it; None without one."""
    forget = recipe.forget
    if forget is None:
        return None
    assert forget.on_exceed is not None, "the recipe is resolved"
    return Limit(FORGETTING, forget.limit, forget.on_exceed, forget.lower_rate, forget.near)


def _rate_ratios(recipe: Recipe) -> tuple[tuple[str, float], ...]:
    """A critic's own learning rate, as a multiple of the policy's."""
    own = recipe.ppo.critic_learning_rate if recipe.ppo is not None else None
    return () if own is None or recipe.train.learning_rate is None else (("critic.", own / recipe.train.learning_rate),)


def trainable_spec(recipe: Recipe, folder: Path) -> TrainableSpec:
    """What the recipe's `tune` section asks of the model."""
    tune = recipe.tune
    given = {
        "layers": tune.layers, "rank": tune.rank, "alpha": tune.alpha, "dropout": tune.dropout, "targets": tune.targets,
        "init": tune.init, "rank_stabilized": tune.rank_stabilized, "dora": tune.dora, "peft": tune.peft,
        "quantize": tune.quantize,
    }  # fmt: skip
    adapter = None if tune.adapter is None else str(_beside(folder, tune.adapter))
    return TrainableSpec(
        method=tune.method,
        train_also=tuple(tune.train_also or ()),
        adapter=adapter,
        seed=recipe.seed,
        **{name: value for name, value in given.items() if value is not None},
    )


def virtual_tokens(recipe: Recipe) -> int:
    """Positions that the recipe's soft prompt takes from every text; 0 without one."""
    number = (recipe.tune.peft or {}).get("num_virtual_tokens")
    return number if has_soft_prompt(recipe) and type(number) is int and number > 0 else 0


def has_soft_prompt(recipe: Recipe) -> bool:
    """True for prompt and prefix tuning, which cannot be merged into a base for a next run."""
    kind = str((recipe.tune.peft or {}).get("peft_type", "")).upper()
    return recipe.tune.method == "peft" and kind in soft_prompt.KINDS


def text_tokens(recipe: Recipe, record: Mapping[str, Any]) -> int | None:
    """Tokens that a text may have beside the recipe's soft prompt, of a base's record; None where it names no limit.

    `RecipeError` where the soft prompt leaves no room.
    """
    context, virtual = record["context_tokens"], virtual_tokens(recipe)
    if context is not None and int(context) <= virtual:
        raise RecipeError(
            f"tune.peft.num_virtual_tokens is {virtual}, and {recipe.base} takes {context} tokens in all, which leaves "
            "no room for a text; lower it"
        )
    return None if context is None else int(context) - virtual


def _beside(folder: Path, name: str) -> Path:
    """A path of the recipe: relative to its folder when it exists there."""
    beside = folder / Path(name).expanduser()
    return beside if beside.exists() else Path(name).expanduser()


def identity(job: Job, base_hash: str) -> dict[str, str]:
    """Fingerprints that a resumed run must share with the one that began: data, base, tokenizer, every setting."""
    kept_out = {"run", "threads", "evaluate", "preflight"}
    settings = job.recipe.model_dump(mode="json", exclude=kept_out, exclude_none=True)
    return {
        **{key: _short(value) for key, value in flatten(settings).items()},
        "base weights": base_hash,
        "training samples": job.inputs.train.fingerprint,
        "held-out samples": job.inputs.eval.fingerprint if job.inputs.eval is not None else "none",
        **fingerprints(job.inputs.probes, job.inputs.replay),
        "tokenizer": tokenizer_hash(job.tokenizer),
        "matrix products": job.precision,
        "torch": torch.__version__.split("+")[0],
        "trainable": _digest(list(job.trainable.names)),
        **_chosen_by(job),
    }


def _chosen_by(job: Job) -> dict[str, str]:
    """The code of the metric that chooses the checkpoint, where it is the user's own."""
    if job.own is None:
        return {}
    name = job.recipe.train.select_by
    return {f"metric function {m.name}": m.content for m in job.own.metrics if m.name == name}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:60]}... ({_digest(text)})"


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
