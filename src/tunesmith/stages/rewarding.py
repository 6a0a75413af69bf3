"""The reward of a recipe, built: models that score, the user's functions, rules; each a part under its own name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.data.chat import marks_of, render
from tunesmith.data.kinds import Message
from tunesmith.data.prompts import PromptSet
from tunesmith.data.tokens import encode_text
from tunesmith.errors import RecipeError
from tunesmith.evaluate.likelihood import token_batches
from tunesmith.model.load import load_backbone, load_config, load_tokenizer
from tunesmith.model.packing import evaluating
from tunesmith.model.score import ScoreModel
from tunesmith.model.soft_prompt import context_tokens
from tunesmith.recipe import Recipe
from tunesmith.rollout import rules
from tunesmith.rollout.function import load_function, scored_by
from tunesmith.rollout.rewards import Completed, Part, Reward, Score, need_answers
from tunesmith.rundir import RunDir, model_run, open_run
from tunesmith.stages.job import Job


@dataclass(frozen=True, slots=True)
class ModelScore:
    """Scores of a sequence classifier: its only score, or the log-odds of one of its labels.

    The completion reaches it as text, so its tokenizer may be another than the policy's.
    """

    model: ScoreModel
    encode: Callable[[Completed], list[int]]
    max_tokens: int
    column: int | None
    device: str

    def __call__(self, items: Sequence[Completed]) -> list[float]:
        samples = [self._sample(item) for item in items]
        found = np.zeros(len(items))
        with evaluating(self.model):
            for indices in token_batches([len(s) for s in samples], 8192):
                scores = self.model(collate([samples[i] for i in indices]).to(self.device)).scores
                found[indices] = self._number(scores.double()).cpu().numpy()
        return found.tolist()

    def _sample(self, item: Completed) -> Sample:
        ids = np.asarray(self.encode(item)[-self.max_tokens :], np.int32)
        return Sample(ids, np.zeros(len(ids), np.float32), origin=item.origin)

    def _number(self, scores: torch.Tensor) -> torch.Tensor:
        if self.column is None:
            return scores[:, 0]
        others = [i for i in range(scores.shape[1]) if i != self.column]
        return scores[:, self.column] - scores[:, others].logsumexp(1)


def build_reward(job: Job, prompts: Sequence[PromptSet]) -> Reward:
    """The parts that the recipe names, in the order in which they are logged.

    `RecipeError`, `DataError` or `RunError` before the first step for whatever could not be scored later.
    """
    spec = job.recipe.reward
    assert spec is not None, "the recipe is checked"
    weights = spec.weights or {}
    found: list[tuple[str, Score, str]] = []
    if spec.run is not None:
        found.append(
            (
                "run",
                _ensemble([_run_score(run, job) for run in reward_runs(job)], spec.ensemble),
                f"reward run {spec.run}",
            )
        )
    if spec.model is not None:
        found.append(("model", _model_score(spec.model, job), f"reward model {spec.model}"))
    columns = list(dict.fromkeys(name for part in prompts for name in part.columns))
    for text in [spec.function] if isinstance(spec.function, str) else spec.function or []:
        file, _, name = text.rpartition(":")
        path = _beside(file, job.folder)
        found.append((name, scored_by(load_function(path, name), columns, text), f"reward function {text}"))
    if spec.contains:
        texts = [spec.contains] if isinstance(spec.contains, str) else spec.contains
        found.append(("contains", rules.contains(texts), ""))
    if spec.regex is not None:
        found.append(("regex", rules.matches(spec.regex), ""))
    if spec.exact:
        need_answers([record for part in prompts for record in part.records], "reward.exact")
        found.append(("exact", rules.exact(spec.answer_pattern), ""))
    if spec.length is not None:
        found.append(("length", rules.length(spec.length.target), ""))
    parts = tuple(Part(name, score, weights.get(name, 1.0), source) for name, score, source in found)
    return Reward(parts, spec.clip)


def reward_runs(job: Job) -> list[RunDir]:
    """The runs of `reward.run`, by folder (beside the recipe or as it stands) or by name."""
    spec = job.recipe.reward
    assert spec is not None and spec.run is not None
    return [model_run(open_run(_beside(name.strip(), job.folder))) for name in spec.run.split(",")]


def _beside(name: str, folder: Path) -> Path:
    """A path of the recipe: relative to its folder when something is there."""
    beside = folder / Path(name).expanduser()
    return beside if beside.exists() else Path(name).expanduser()


def _ensemble(scores: Sequence[Score], how: str | None) -> Score:
    """Several models' opinion of a completion as one: their mean, or the least of them (2310.02743, 3.2)."""
    one = np.min if how == "min" else np.mean
    return lambda items: one([score(items) for score in scores], axis=0).tolist()


def _run_score(run: RunDir, job: Job) -> Score:
    label = None if job.recipe.reward is None else job.recipe.reward.label
    return run_score(run, label=label, device=job.device, precision=job.precision)


def run_score(run: RunDir, *, label: str | None, device: str = "cpu", precision: str = "float32") -> Score:
    """What the model of a finished run of stage reward or classify thinks of completions."""
    from tunesmith.stages import finals  # it opens runs, and what opens runs knows every stage

    tuned = finals.open_tuned(run, device=device, precision=precision)
    if not isinstance(tuned.model, ScoreModel):
        raise RecipeError(f"reward.run: {run.path} is of stage {tuned.recipe.stage}, which gives no score; "
                          "name a run of stage reward or classify")  # fmt: skip
    longest = tuned.recipe.data.max_length or context_tokens(tuned.backbone) or 1 << 20
    if tuned.recipe.stage == "classify":
        return _labelled(tuned.model, tuned.tokenizer, tuned.label_names, longest, label, device)
    plain = tuned.template is not None
    return ModelScore(tuned.model, _answered(tuned.tokenizer, plain), longest, None, device)


def _model_score(base: str, job: Job) -> Score:
    where = str(_beside(base, job.folder)) if _beside(base, job.folder).is_dir() else base
    tokenizer, config = load_tokenizer(where), load_config(where)
    backbone = load_backbone(where, "classifier", dtype=torch.float32)
    if backbone.tunesmith_new:
        raise RecipeError(f"reward.model: {base} has no trained head ({', '.join(backbone.tunesmith_new)} is missing), "
                          "so its scores would be noise; train it with stage reward first")  # fmt: skip
    model = ScoreModel(backbone, compute=job.compute).to(job.device).requires_grad_(False)
    names = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    if len(names) > 1:
        label = None if job.recipe.reward is None else job.recipe.reward.label
        return _labelled(model, tokenizer, names, _context(config), label, job.device)
    return ModelScore(model, _answered(tokenizer, False), _context(config), None, job.device)


def _context(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def _labelled(
    model: ScoreModel, tokenizer: Any, names: Sequence[str], longest: int, label: str | None, device: str
) -> Score:
    """Log-odds of `label` for the text as a reader sees it: prompt and completion."""
    if label is None or label not in names:
        what = "is missing" if label is None else f"is {label!r}"
        raise RecipeError(f"reward.label {what}: say which of the classifier's labels is the good one: "
                          f"{', '.join(names)}")  # fmt: skip

    def encode(item: Completed) -> list[int]:
        return encode_text(tokenizer, item.prompt + item.completion, special=True)

    return ModelScore(model, encode, longest, list(names).index(label), device)


def _answered(tokenizer: Any, plain: bool) -> Callable[[Completed], list[int]]:
    """The conversation with its answer, as stage reward encodes it, end token included."""
    marks = marks_of(tokenizer)

    def encode(item: Completed) -> list[int]:
        messages = (*item.messages, Message("assistant", item.completion))
        return render(messages, tokenizer, plain=plain or item.plain, marks=marks).ids

    return encode


def critic_start(recipe: Recipe, job: Job) -> RunDir | None:
    """The reward run that a critic can start from: a single one, of stage reward."""
    if recipe.reward is None or recipe.reward.run is None or "," in recipe.reward.run:
        return None
    from tunesmith.recipe import load_resolved

    run = reward_runs(job)[0]
    return run if load_resolved(run.file("recipe")).stage == "reward" else None
