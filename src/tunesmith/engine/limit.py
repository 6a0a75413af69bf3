"""A metric that must not rise above a limit while something else is learned, and what the loop does about it.

The step itself knows nothing of it: between steps the rate is lowered, the weights go back to the last checkpoint that
keeps within the limit, or the run ends. What was decided stands in `Progress.extra`, so a resumed run decides alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tunesmith.engine.checkpoint import load_checkpoint, step_folder

if TYPE_CHECKING:
    from tunesmith.engine.contracts import FitSpec, Progress
    from tunesmith.engine.state import TrainState


@dataclass(frozen=True, slots=True)
class Limit:
    """`metric` of an evaluation may be at most `at_most`; step 0, the start, is always within it.

    `on_exceed`: `stop` ends the run, `go_back` takes the weights and the optimizer of the last checkpoint within the
    limit and goes on with the next rows, `go_on` only never keeps such a checkpoint. The rate is multiplied by
    `lower_rate` each time the run goes back, and at an evaluation above `near` of the limit that is above the one
    before.
    """

    metric: str
    at_most: float
    on_exceed: Literal["stop", "go_back", "go_on"] = "go_back"
    lower_rate: float = 1.0
    near: float = 0.8

    def judge(self, value: float, step: int, progress: Progress) -> bool:
        """Note an evaluation; True when it keeps within the limit. NaN does not."""
        notes = progress.extra
        within = value <= self.at_most
        back = not within and self.on_exceed == "go_back"
        rising = value > self.near * self.at_most and value > notes.get("last", 0.0)
        if back or rising or value != value:
            notes["rate"] = notes.get("rate", 1.0) * self.lower_rate
        notes["over"] = not within
        notes["exceeded"] = notes.get("exceeded", 0) + (not within)
        if within:
            notes["within_step"], notes["within_value"] = step, value
        notes["last"] = notes.get("within_value", 0.0) if back else value
        return within

    def ends(self, progress: Progress) -> bool:
        """True when the last evaluation ended the run."""
        return self.on_exceed == "stop" and bool(progress.extra.get("over"))


def slowed(spec: FitSpec, progress: Progress) -> FitSpec:
    """The settings with the learning rate as low as the limit has made it."""
    rate = progress.extra.get("rate", 1.0)
    if rate == 1.0:
        return spec
    return replace(spec, optim=replace(spec.optim, learning_rate=spec.optim.learning_rate * rate))


def kept_steps(spec: FitSpec, progress: Progress) -> frozenset[int]:
    """Checkpoints that must stay: the best so far and, under a limit, the last within it; the start is such a one."""
    best = {progress.best_step} if spec.select_by and progress.best_step else set[int]()
    return frozenset(best if spec.limit is None else {progress.best_step, progress.extra.get("within_step", 0)})


def go_back(state: TrainState, checkpoints: Path) -> int:
    """Weights and optimizer as they were at the last step within the limit, which is returned; the data goes on."""
    step = int(state.progress.extra.get("within_step", 0))
    tensors, meta = load_checkpoint(step_folder(checkpoints, step))
    state.rewind(tensors, meta)
    state.progress.extra["went_back"] = state.progress.extra.get("went_back", 0) + 1
    return step
