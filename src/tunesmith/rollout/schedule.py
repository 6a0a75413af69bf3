"""Schedule: which prompts a round samples for, and which of its rollouts each step learns from, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tunesmith.data.batches import order_at


@dataclass(frozen=True, slots=True)
class Schedule:
    """A round samples `num_per_prompt` completions of each of `prompts` prompts; `epochs` passes over them follow, of
    `minibatches` steps each. Prompts come in an order drawn anew for each pass over the data; rounds run on over its
    end, so that all are of one size.

    Two prompts a round, 1 epoch of 2 minibatches: steps 1 and 2 learn from round 0, steps 3 and 4 from round 1.
    """

    seed: int
    num_prompts: int
    prompts: int
    num_per_prompt: int
    epochs: int
    minibatches: int
    num_steps: int

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps that learn from one round."""
        return self.epochs * self.minibatches

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the prompts, in whole rounds."""
        return max(1, round(self.num_prompts / self.prompts)) * self.steps_per_round

    def place(self, step: int) -> tuple[int, int]:
        """(round from 0, step inside it from 0) of `step`, counted from 1."""
        return divmod(step - 1, self.steps_per_round)

    def prompts_of(self, number: int) -> list[int]:
        """Indices of the prompts of round `number`."""
        places = range(number * self.prompts, (number + 1) * self.prompts)
        return [self._prompt_at(*divmod(place, self.num_prompts)) for place in places]

    def _prompt_at(self, epoch: int, inside: int) -> int:
        return int(order_at(self.num_prompts, self.seed, epoch)[inside])

    def parts(self, number: int, epoch: int, num_units: int) -> list[list[int]]:
        """The minibatches of a pass over a round's units (groups, or single rollouts), in an order of that pass."""
        order = np.random.default_rng([self.seed, 1 + number, epoch]).permutation(num_units)
        return [part.tolist() for part in np.array_split(order, self.minibatches)]


def steps_for(num_prompts: int, prompts: int, steps_per_round: int, *, epochs: float | None, steps: int | None) -> int:
    """Steps of a run: `steps`, or as many whole rounds as `epochs` passes over the prompts need."""
    if steps is not None:
        return steps
    assert epochs is not None, "epochs or steps"
    return math.ceil(epochs * num_prompts / prompts) * steps_per_round
