"""The exception tree: everything a user can mend is a `TunesmithError` with an exit code and one clear message."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SECRETS = re.compile(
    r"(?<=://)[^/\s@]{1,300}(?=@)"  # a login in an address
    r"|\b(?:(?:hf_|sk-)[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"  # model and code hubs
    r"|AKIA[A-Z0-9]{16}|xox[abpr]-[A-Za-z0-9-]{10,})"  # clouds and chats
)


def masked(text: str) -> str:
    """`text` without logins in addresses and without access tokens: the one list, for messages and pages."""
    return _SECRETS.sub("***", text)


def printable(text: str) -> str:
    """`text` with what a terminal would obey (control and direction characters) or could not print escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


class TunesmithError(Exception):
    """Base of all errors this program raises on purpose; `exit_code` is what the command line returns.

    Messages quote names and text from the user's files, so they are made printable, and secrets in them are masked,
    here, once for all.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(masked(str(message))))


class RecipeError(TunesmithError, ValueError):
    """The recipe asks for something that does not exist, contradicts itself or does not fit the base."""


class DataError(TunesmithError, ValueError):
    """A data file is missing, broken, empty or does not fit the stage."""


class ModelError(TunesmithError, ValueError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit what is asked of it."""


class RewardError(TunesmithError, ValueError):
    """A reward raised, or returned something that is not one finite number for each completion."""


class MetricError(TunesmithError, ValueError):
    """A metric function of the user's raised, or returned something that is not one finite number."""


class RunError(TunesmithError, RuntimeError):
    """A run folder is in use, damaged, not writable, or was made from other inputs."""


class DiskError(RunError):
    """The disk is full or failing; the last good checkpoint is intact."""

    exit_code = 74


class NonFiniteError(TunesmithError, ArithmeticError):
    """Loss or gradient is NaN or infinite; raised before the optimizer step."""

    exit_code = 3


class Interrupted(TunesmithError):
    """The run was asked to stop and has saved a checkpoint. `exit_code` is 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = code


class OutOfMemoryError(TunesmithError, MemoryError):
    """There was not enough memory, of the machine, of its GPU, or within the limit set on the process."""


_NO_MEMORY = re.compile(
    r"allocate memory|out of memory|not enough memory|start new thread|failed to map segment|bad_alloc", re.IGNORECASE
)
"""What allocators, threads and the loader of libraries say; `RuntimeError`, `OSError` and `ImportError` carry it."""


def lacks_memory(error: BaseException) -> bool:
    """True when `error`, or one that it was raised from, says that memory could not be had."""
    found: BaseException | None = error
    while found is not None:
        said = isinstance(found, (RuntimeError, OSError, ImportError)) and _NO_MEMORY.search(str(found))
        if isinstance(found, MemoryError) or said:
            return True
        found = found.__cause__
    return False


def several(problems: Sequence[str], cls: type[TunesmithError], *, headline: str = "") -> TunesmithError:
    """One error out of all problems, so that a user mends them in one go."""
    if len(problems) == 1 and not headline:
        return cls(problems[0])
    head = headline or f"{len(problems)} problems found:"
    return cls("\n".join([head, *(f"  - {problem}" for problem in problems)]))
