"""mlm: predict masked tokens of the user's own text (BERT, 1810.04805, 3.1).

Record `Text` -> log-probs at masked positions -> `Likelihood`, counted in masked tokens. Which positions are masked
depends on (seed, step, row) in training and on the row alone when measuring, so before and after see the same holes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate_mlm
from tunesmith.data.store import SampleStore
from tunesmith.engine.contracts import Stage
from tunesmith.errors import ModelError
from tunesmith.model.language import LanguageModel
from tunesmith.objectives.likelihood import Likelihood
from tunesmith.stages.job import Built, Collate, Job, Measured, make_source
from tunesmith.stages.likelihood import measure_likelihood

KIND = "masked"


def head_note(base: str, backbone: Any, learning: Collection[str]) -> str:
    """What to tell of a head that the base was stored without and that begins random; empty when it has its own.

    `learning` are the names of the parameters that train. Raises ModelError when part of such a head would not: it
    would stay random for ever.
    """
    new = backbone.tunesmith_new
    if not new:
        return ""
    missing = f"{base} was stored without the head that names masked words ({len(new)} tensors, {new[0]} the first)"
    if not set(new) <= set(learning):
        raise ModelError(f"{missing}: it begins random and would not be trained. Take the base's masked language "
                         "model, or train the head too: tune.method: full, or tune.train_also: [head]")  # fmt: skip
    return (f"warning: {missing}: it begins random, and is trained with the rest. What was measured before is "
            "the loss of a random head, not of the base; the gain over it says little")  # fmt: skip


def masking(job: Job) -> Callable[..., Batch]:
    """`(samples, step=...) -> Batch` with holes; `ModelError` when the tokenizer has no mask token."""
    tokenizer = job.tokenizer
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"{job.recipe.base}: its tokenizer has no mask token, which masked words need; take a BERT-like base"
        )
    return partial(
        collate_mlm,
        mask_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        rate=job.recipe.data.mask_rate,
        seed=job.recipe.seed,
    )


def fixed_holes(job: Job) -> Collate:
    """Batches for measuring: the holes depend on the row alone."""
    return partial(masking(job), step=0)


def build(job: Job) -> Built:
    """The stage, and its loss and perplexity over masked tokens of held-out text."""
    mask = masking(job)
    model = LanguageModel(job.backbone, causal=False, compute=job.compute).to(job.device)

    holes = fixed_holes(job)

    def measure(store: SampleStore, full: bool) -> Measured:
        return measure_likelihood(job, model, store, holes, with_bytes=False)

    def holes_at(samples: Sequence[Sample], step: int) -> Batch:
        return mask(samples, step=step)

    return Built(Stage("mlm", model, Likelihood(), make_source(job, holes_at)), measure)
