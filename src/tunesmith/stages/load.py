"""The steps of a run and its largest micro-batch, known from the encoded rows before a model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.batch import Batch
from tunesmith.data.prompts import PromptSet
from tunesmith.model.trainable import Trainable
from tunesmith.recipe import Recipe
from tunesmith.stages.job import Inputs, Job, make_source
from tunesmith.stages.online import Rounds

LOOKED_AT = 100
"""Steps whose micro-batches are looked at for the largest."""
NOTHING = Trainable("none", (), 0, 0, 0, (), ())
"""What trains, while no model is there."""


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch of a run, and what the whole run computes."""

    lengths: tuple[int, ...]
    num_targets: int
    num_steps: int
    tokens_per_step: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return sum(self.lengths)


def load_of(recipe: Recipe, tokenizer: Any, inputs: Inputs, device: str, *, looked_at: int = LOOKED_AT) -> Load:
    """What a run of `recipe` over `inputs` computes; the first `looked_at` steps' batches are made."""
    if isinstance(inputs.train, PromptSet):
        return _online_load(recipe, inputs.train)
    source = make_source(Job(recipe, tokenizer, inputs, None, NOTHING, device, "float32"))
    steps = range(1, min(source.num_steps, looked_at) + 1)
    batches: list[Batch] = []
    tokens = 0
    for step in steps:
        made = source.step_batches(step)
        tokens += sum(batch.num_tokens for batch in made)
        batches = [max([*batches, *made], key=lambda b: b.num_tokens)]
    largest = batches[0]
    return Load(largest.lengths, int((largest.weights > 0).sum()), source.num_steps, tokens / len(steps))


def _online_load(recipe: Recipe, prompts: PromptSet) -> Load:
    """Every rollout at its longest; a round's rollouts in micro-batches."""
    assert recipe.sampling is not None, "the recipe is resolved"
    rounds = _rounds(recipe)
    answer = recipe.sampling.max_tokens
    longest = int(prompts.lengths.max()) + answer
    rows = max(1, rounds.prompts * rounds.num_per_prompt // rounds.minibatches)
    fit = max(1, min(rows, recipe.train.micro_batch_tokens // longest))
    per_step = rows * (float(prompts.lengths.mean()) + answer)
    steps = recipe.train.steps or round((recipe.train.epochs or 1) * len(prompts) / rounds.prompts) * (
        rounds.epochs * rounds.minibatches
    )
    return Load((longest,) * fit, answer * fit, max(1, steps), per_step)


def _rounds(recipe: Recipe) -> Rounds:
    if recipe.grpo is not None:
        spec = recipe.grpo
        return Rounds(spec.prompts, spec.group, spec.epochs, spec.minibatches)
    assert recipe.ppo is not None, "the recipe is resolved"
    per_prompt = 1 if recipe.sampling is None else recipe.sampling.num_per_prompt or 1
    return Rounds(recipe.ppo.rollouts // per_prompt, per_prompt, recipe.ppo.epochs, recipe.ppo.minibatches)
