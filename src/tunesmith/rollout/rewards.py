"""Rewards: completions -> one number each, by parts, every part checked and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError, RewardError, TunesmithError

Floats = NDArray[np.float64]
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Completed:
    """A completion and the row it answers, as a reward sees them.

    `prompt` is the text of the prompt's messages, `columns` the row's other fields, `number` which of the prompt's
    completions this is, from 0; `num_tokens` counts the end token too; `plain` as for the row's prompt.
    """

    prompt: str
    completion: str
    answer: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
    messages: tuple[Any, ...] = ()
    origin: str = ""
    number: int = 0
    num_tokens: int = 0
    ended: bool = True
    plain: bool = False

    def place(self) -> str:
        """Which rollout of which prompt, for messages."""
        text = self.completion if len(self.completion) <= _SHOWN else self.completion[:_SHOWN] + "..."
        return f"completion {self.number + 1} of prompt {self.origin} ({text!r})"


Score = Callable[[Sequence[Completed]], Sequence[float]]
"""Completions -> a number for each. What it raises and what it returns is checked by `Reward`."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a reward: its name in logs, its weight, what computes it, and how messages call it."""

    name: str
    score: Score
    weight: float = 1.0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Rewards:
    """`total [N]`, clipped, and each part `[N]` as it was given, before its weight."""

    total: Floats
    parts: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Reward:
    """The weighted sum of its parts, clipped to [-clip, clip].

    Parts 1 and 0.5 with weights 1 and -2 give 0. Raises `RewardError` that names the completion when a part raises,
    returns something that is no finite number, or not one number for each completion.
    """

    parts: tuple[Part, ...]
    clip: float | None = None

    def __call__(self, items: Sequence[Completed]) -> Rewards:
        found = {part.name: _checked(part, items) for part in self.parts}
        total = np.zeros(len(items))
        for part in self.parts:
            total = total + part.weight * found[part.name]
        return Rewards(total if self.clip is None else total.clip(-self.clip, self.clip), found)


def _checked(part: Part, items: Sequence[Completed]) -> Floats:
    what = part.source or f"reward part `{part.name}`"
    try:
        values = part.score(items)
    except TunesmithError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise RewardError(f"{what} raised {described(error)}{_culprit(part, items)}. {_MEND}") from error
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise RewardError(f"{what} returned a {type(values).__name__}, not a list of numbers. {_MEND}")
    if len(values) != len(items):
        raise RewardError(
            f"{what} returned {len(values)} numbers for {len(items)} completions, of which the first is "
            f"{items[0].place()}. It must return one for each, in their order. {_MEND}"
        )
    return np.asarray([_number(value, item, what) for value, item in zip(values, items, strict=True)], np.float64)


_MEND = "Nothing is lost: mend it, and go on with `tunesmith train --resume RUN`"


def _number(value: Any, item: Completed, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(f"{what} returned {value!r:.80} for {item.place()}, which is no number. {_MEND}") from None
    if not math.isfinite(number):
        raise RewardError(f"{what} returned {number} for {item.place()}. {_MEND}")
    return number


def described(error: BaseException) -> str:
    """The exception and the line of the innermost frame it came from."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} ({where})"


def _culprit(part: Part, items: Sequence[Completed]) -> str:
    """The first completion that makes the part raise on its own."""
    for item in items:
        try:
            part.score([item])
        except Exception:  # the same code once more
            return f", on {item.place()}"
    return f", on {len(items)} completions together, from {items[0].place()} on; on none of them alone"


def need_answers(items: Sequence[Any], what: str) -> None:
    """`DataError` naming the rows without a reference answer, which `what` compares with."""
    missing = [item.origin for item in items if item.answer is None]
    if missing:
        shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise DataError(f"{what} compares with the row's `answer`, which is missing in {shown}; name its column with "
                        "data.columns: {answer: COLUMN}")  # fmt: skip
