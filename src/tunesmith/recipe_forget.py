"""The recipe's `forget` section: how much of something else may be lost while the task is learned."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunesmith.recipe_sections import Section

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*$")


def _as_percent(value: Any) -> Any:
    """`2%`, `"2 %"` and 0.02 as "2%"; a number above 1 is refused, since 2 may mean either."""
    if isinstance(value, str) and (found := _PERCENT.match(value)):
        return f"{float(found[1]):g}%"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return f"{100 * value:g}%"
    raise ValueError("it is a share: write 2% or 0.02")


Percent = Annotated[str, BeforeValidator(_as_percent)]


class ReplaySpec(Section):
    """Rows of something else, mixed into every step so that it is not forgotten."""

    data: str
    """A file, folder, glob or hub id: text, or rows of the stage's own kind."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of a step's loss that is theirs at first, and at least."""
    most: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share that it may rise to: it doubles at an evaluation above `forget.near` of the limit and halves below half of
    that."""


class ForgetSpec(Section):
    """A limit on forgetting, which the run keeps: what the probes lose, measured at every evaluation."""

    at_most: Percent
    """Most that the loss of any probe may rise over what it was before the first step, as in 2%."""
    probe: str | list[str] | dict[str, str] | None = None
    """Text, prompts with responses, labelled rows: a file, several, or `{name: file}`. Not set: `evaluate.probe`, or
    the text that comes with the program."""
    on_exceed: Literal["go_back", "stop", "go_on"] | None = None
    """At an evaluation over the limit: take back the weights of the last one within it and go on with the next rows,
    end the run, or only never keep such a checkpoint. ppo and grpo stop when not set, the others go back."""
    lower_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What the learning rate is multiplied by when the run goes back, and when forgetting rises above `near`."""
    near: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the limit from which the run takes care."""
    replay: ReplaySpec | None = None
    """Mix rows of something else into every step."""

    @property
    def limit(self) -> float:
        """`at_most` as a number: 0.02 for 2%."""
        return float(self.at_most.rstrip("%")) / 100

    @property
    def probes(self) -> dict[str, str] | None:
        """Name -> source, None where none is named; the only one is called `probe`, several by their files."""
        if self.probe is None or isinstance(self.probe, dict):
            return self.probe
        if isinstance(self.probe, str):
            return {"probe": self.probe}
        return {_name(source, self.probe): source for source in self.probe}


def _name(source: str, others: list[str]) -> str:
    """The file's name without its ending, or all of it where that would name two."""
    short = re.sub(r"\.(jsonl?|csv|txt|parquet)(\.gz)?$", "", source.rsplit("/", 1)[-1])
    return short if sum(short in other for other in others) == 1 else source
