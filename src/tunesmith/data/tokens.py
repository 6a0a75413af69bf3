"""Texts -> token ids: one text at a time, or the texts of many records in one call of the tokenizer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

from tunesmith.errors import DataError

WORKS = 512
CHARACTERS = 1 << 18
"""So many works, or works that first ask for so many characters, are answered together: more is not faster, and is
held."""


class Asked(NamedTuple):
    """A text (or two) whose ids are wanted, with `special` also the tokens round it."""

    text: str
    pair: str | None = None
    special: bool = False


T = TypeVar("T")
Ids = Sequence[int]
Work = Generator[Sequence[Asked], Sequence[Ids], T]
"""Makes a T. Whenever it needs ids it yields the texts and is sent the ids of each, which it must not change."""


def encode_text(tokenizer: Any, text: str, pair: str | None = None, *, special: bool = False) -> list[int]:
    """Ids of a text (or two), with `special` also the tokens round it; nothing is cut, and nothing is said of length.

    A tokenizer is a program that came with a model: that it crashes (a panic in its own code is no `Exception`) is a
    `DataError`.
    """
    try:
        return list(tokenizer(text, pair or None, add_special_tokens=special, verbose=False)["input_ids"])
    except BaseException as error:
        if not _is_crash(error):
            raise
        raise DataError(f"the tokenizer crashed on this text ({str(error)[:120]}); mend the text, or take another "
                        "base") from None  # fmt: skip


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> Iterator[Ids]:
    """The ids of every text by itself, without special tokens, as `encode_text` gives them; many in one call."""

    def ids_of(text: str) -> Work[Ids]:
        (ids,) = yield [Asked(text)]
        return ids

    return together(map(ids_of, texts), tokenizer)


def alone(work: Work[T], tokenizer: Any) -> T:
    """What `work` makes, every text encoded by itself."""
    running = _Running(work)
    while running.asked is not None:
        running.answer_alone(tokenizer)
    return running.result()


def together(works: Iterable[Work[T]], tokenizer: Any) -> Iterator[T]:
    """What each of `works` makes, in their order and the same as `alone`; the texts of many are encoded in one call.

    A tokenizer of the fast kind encodes the texts of a call on all cores. At most `WORKS` works are begun before their
    results are given, fewer where they ask for `CHARACTERS` characters. What is raised is the first error in the order
    of the works; that `works` itself raises comes after all that it gave before.
    """
    begun: list[_Running[T]] = []
    size = 0
    for running in _begin(works):
        begun.append(running)
        size += running.size
        if running.error is not None or len(begun) == WORKS or size >= CHARACTERS:
            yield from _finish(begun, tokenizer)
            begun, size = [], 0
    yield from _finish(begun, tokenizer)


def merged(works: Iterable[Work[T]]) -> Work[list[T]]:
    """What each of `works` makes, as one work that asks at once for what all of them ask for."""
    begun = [_Running(work) for work in works]
    while waiting := [running for running in begun if running.asked is not None]:
        found = iter((yield [asked for running in waiting for asked in running.asked or ()]))
        for running in waiting:
            running.answer([next(found) for _ in running.asked or ()])
    return [running.result() for running in begun]


@dataclass(slots=True)
class _Running(Generic[T]):
    """A work on its way: the texts it asks for now, None when it has ended in a result or an error."""

    work: Work[T]
    asked: Sequence[Asked] | None = None
    made: T | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.answer(None)

    @property
    def size(self) -> int:
        """Characters asked for now."""
        return sum(len(text) + len(pair or "") for text, pair, _ in self.asked or ())

    def answer(self, ids: Sequence[Ids] | None, failed: DataError | None = None) -> None:
        """Go on with the ids of what was asked, or with the reason why there are none."""
        try:
            self.asked = self.work.send(cast(Any, ids)) if failed is None else self.work.throw(failed)
        except StopIteration as end:
            self.asked, self.made = None, end.value
        except Exception as error:
            self.asked, self.error = None, error

    def answer_alone(self, tokenizer: Any) -> None:
        """Go on with ids from a call for each text."""
        assert self.asked is not None
        try:
            ids = [encode_text(tokenizer, text, pair, special=special) for text, pair, special in self.asked]
        except DataError as error:
            self.answer(None, error)
        else:
            self.answer(ids)

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return cast(T, self.made)


def _begin(works: Iterable[Work[T]]) -> Iterator[_Running[T]]:
    """Every work, begun; an error in getting the next one is as a work that fails."""
    try:
        for work in works:
            yield _Running(work)
    except Exception as error:
        yield _Running(_failing(error))


def _failing(error: Exception) -> Work[Any]:
    yield from ()
    raise error


def _finish(begun: Sequence[_Running[T]], tokenizer: Any) -> Iterator[T]:
    while waiting := [running for running in begun if running.asked is not None]:
        _answer(waiting, tokenizer)
        failed = next((i for i, running in enumerate(begun) if running.error is not None), len(begun))
        begun = begun[: failed + 1]
    for running in begun:
        yield running.result()


def _answer(waiting: Sequence[_Running[Any]], tokenizer: Any) -> None:
    """Every work with the ids it waits for; when a text crashes the tokenizer, up to the work that asked for it."""
    wanted = dict.fromkeys(asked for running in waiting for asked in running.asked or ())
    try:
        found = _encode(list(wanted), tokenizer)
    except BaseException as error:
        if not _is_crash(error):
            raise
        found = None
    for running in waiting:
        if found is not None:
            running.answer([found[asked] for asked in running.asked or ()])
            continue
        running.answer_alone(tokenizer)
        if running.error is not None:
            return


def _encode(wanted: Sequence[Asked], tokenizer: Any) -> dict[Asked, Ids]:
    """The ids of each, by a call for those of one kind. A second text that is empty counts as none, as in a call for
    one text."""
    found: dict[Asked, Ids] = {}
    for special, two in dict.fromkeys((asked.special, bool(asked.pair)) for asked in wanted):
        group = [asked for asked in wanted if (asked.special, bool(asked.pair)) == (special, two)]
        encoded = tokenizer(
            [asked.text for asked in group], [asked.pair for asked in group] if two else None,
            add_special_tokens=special, verbose=False, return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        found.update(zip(group, encoded["input_ids"], strict=True))
    return found


def _is_crash(error: BaseException) -> bool:
    """A panic in a tokenizer's own code is no `Exception`; a key pressed to stop is no crash."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
