"""The weights a finished run ends with: written once, opened again for eval, chat, predict and export."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunesmith.data.batches import collate
from tunesmith.data.encode import Encoder
from tunesmith.data.records import Labelled
from tunesmith.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from tunesmith.engine.state import TrainState
from tunesmith.errors import RunError
from tunesmith.evaluate.likelihood import token_batches
from tunesmith.model.folder import resolve
from tunesmith.model.hashing import weights_hash
from tunesmith.model.language import LanguageModel
from tunesmith.model.lean import make_lean
from tunesmith.model.load import load_tokenizer
from tunesmith.model.packing import evaluating
from tunesmith.model.score import ScoreModel
from tunesmith.model.soft_prompt import context_tokens
from tunesmith.model.trainable import Trainable, make_trainable
from tunesmith.recipe import Recipe, load_resolved
from tunesmith.rundir import RunDir
from tunesmith.stages.bases import base_path, run_origin
from tunesmith.stages.job import Job, trainable_spec
from tunesmith.stages.prepare import load_model

BATCH_TOKENS = 8192
Model = LanguageModel | ScoreModel


@dataclass(frozen=True, slots=True)
class Tuned:
    """A finished run, opened: its model with the trained weights in it."""

    run: RunDir
    recipe: Recipe
    tokenizer: Any
    model: Model
    trainable: Trainable
    label_names: tuple[str, ...]
    template: str | None
    base: str

    @property
    def backbone(self) -> Any:
        """The transformers model."""
        return self.model.backbone


_CRITIC = re.compile(r"(model|buffer)\.critic\.").match
"""A critic serves the training of its policy only."""


def save(run: RunDir, state: TrainState) -> None:
    """Write what was trained, in the checkpoint format, to the run's `final` folder."""
    tensors, meta = state.capture()
    kept = {name: t for name, t in tensors.items() if name.startswith(("model.", "buffer.")) and not _CRITIC(name)}
    save_checkpoint(run.file("final"), state.step, kept, {"step": state.step, "identity": meta["identity"]}, keep=1)


def _newest(run: RunDir) -> Path:
    found = sorted(run.file("final").glob("step_*"))
    if not found:
        raise RunError(f"{run.path} is not finished; go on with `tunesmith train --resume {run.path}`")
    if problems := verify_checkpoint(found[-1]):
        raise RunError(f"{found[-1]} is damaged: {problems[0]}; train again, or restore it from a copy")
    return found[-1]


def open_tuned(run: RunDir, *, device: str = "cpu", precision: str = "float32", quantized: bool = True) -> Tuned:
    """The run's model with its trained weights; `RunError` when unfinished, damaged, or of a changed base.

    `quantized` False puts them beside the base's own weights, where the run had these in fewer bits.
    """
    folder = _newest(run)
    recipe, inputs = load_resolved(run.file("recipe")), run.read_json("inputs")
    if not quantized:
        recipe = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"quantize": None})})
    origin = Path(inputs["recipe_folder"])
    base, labels = base_path(recipe.base, origin), tuple(inputs["labels"])
    _refuse_changed_base(run, inputs["base"], base, recipe.trust_remote_code)
    backbone = load_model(recipe, base, labels)
    trainable = make_trainable(backbone, trainable_spec(recipe, origin))
    make_lean(backbone, torch.bfloat16 if precision == "bfloat16" else torch.float32)  # as it was trained and measured
    model = wrap(recipe.stage, backbone, precision)
    tensors, _ = load_checkpoint(folder)
    _put_in(model, tensors, run)
    if isinstance(model, ScoreModel) and model.shift is not None:
        model.set_shift(float(model.shift))
    tokenizer = load_tokenizer(base, trust=recipe.trust_remote_code)
    return Tuned(run, recipe, tokenizer, model.to(device).eval(), trainable, labels, inputs["template"], base)


def _refuse_changed_base(run: RunDir, recorded: Mapping[str, Any], base: str, trust: str | None) -> None:
    """The base, or the run it comes from, must still be what was tuned: an adapter fits any of the same shape."""
    now = run_origin(base).get("content")
    if recorded.get("content") != now:
        raise RunError(
            f"{run.path} was trained from the run {recorded.get('name')} as it was (content "
            f"{str(recorded.get('content'))[:12]}), which is now another model ({str(now)[:12]}); train it again, or "
            "put that run back"
        )
    if now is None and (found := weights_hash(resolve(base, trust=trust))) != recorded["hash"]:
        raise RunError(
            f"{run.path} was trained from {recorded['name']} with the weights {recorded['hash'][:12]}, which are now "
            f"{found[:12]}: what it learned belongs to those it began with; put them back, or train again"
        )


def wrap(stage: str, backbone: Any, precision: str = "float32") -> Model:
    """The backbone as the stage sees it."""
    compute = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if stage in ("classify", "reward"):
        return ScoreModel(backbone, compute=compute)
    return LanguageModel(backbone, causal=stage != "mlm", compute=compute)


def untrained(run: RunDir) -> Any:
    """The backbone that the run began with, its adapter as it was before the first step."""
    recipe, inputs = load_resolved(run.file("recipe")), run.read_json("inputs")
    origin = Path(inputs["recipe_folder"])
    backbone = load_model(recipe, base_path(recipe.base, origin), tuple(inputs["labels"]))
    make_trainable(backbone, trainable_spec(recipe, origin))
    return backbone


@torch.no_grad()
def _put_in(model: nn.Module, tensors: Mapping[str, torch.Tensor], run: RunDir) -> None:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        target = (parameters if kind == "model" else buffers).get(name)
        if target is None or target.shape != tensor.shape:
            raise RunError(f"{run.path}: its weight {name} does not fit the base; has the base been changed since?")
        target.copy_(tensor)


def label_sentences(job: Job, model: nn.Module) -> list[dict[str, Any]]:
    """The recipe's own sentences and what the model makes of them; empty outside classification."""
    texts = job.recipe.evaluate.sentences
    if not texts or not isinstance(model, ScoreModel):
        return []
    longest = longest_of(job.recipe, job.backbone)
    return classify_texts(model, job.tokenizer, texts, job.inputs.label_names, longest, job.recipe.data.multi_label)


def longest_of(recipe: Recipe, backbone: Any) -> int:
    """Tokens a text may have: what the recipe says, else what the model takes."""
    return recipe.data.max_length or context_tokens(backbone) or 512


def classify_texts(
    model: ScoreModel, tokenizer: Any, texts: Sequence[str], names: Sequence[str], max_length: int, multi_label: bool
) -> list[dict[str, Any]]:
    """`{text, answer, probabilities}` per text; a text that is too long keeps its end."""
    encoder = Encoder(
        tokenizer, "classify", max_length, "truncate_left", label_names=tuple(names), multi_label=multi_label
    )
    label: Any = () if multi_label else names[0]
    records = (Labelled(text, label, origin=f"text {i}") for i, text in enumerate(texts, 1))
    samples = [found[0] for found in encoder.many(records)]
    rows: list[Any] = [None] * len(samples)
    device = next(model.parameters()).device
    with evaluating(model):
        for indices in token_batches(np.asarray([len(sample) for sample in samples]), BATCH_TOKENS):
            found = model(collate([samples[i] for i in indices]).to(device)).scores
            for i, row in zip(indices, found.double().cpu(), strict=True):
                rows[i] = row
    if not rows:
        return []
    scores = torch.stack(rows)
    shares = (scores.sigmoid() if multi_label else scores.softmax(-1)).numpy()
    return [
        {"text": text, "answer": _answer(row, names, multi_label),
         "probabilities": {name: round(float(share), 4) for name, share in zip(names, row, strict=True)}}
        for text, row in zip(texts, shares, strict=True)
    ]  # fmt: skip


def _answer(shares: np.ndarray, names: Sequence[str], multi_label: bool) -> str:
    if multi_label:
        return ", ".join(name for name, share in zip(names, shares, strict=True) if share > 0.5) or "(none)"
    return names[int(shares.argmax())]
