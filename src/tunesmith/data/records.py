"""Typed rows of the user's file, each knowing where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `trained` overrides the rule that the assistant's turns are trained on."""

    role: str
    content: str
    trained: bool | None = None
    extra: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text."""

    text: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, or a prompt and its completion when `plain` (no chat template wanted)."""

    messages: tuple[Message, ...]
    origin: str = ""
    plain: bool = False
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class, or classes when labels do not exclude each other."""

    text: str
    label: str | tuple[str, ...]
    origin: str = ""
    text_pair: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a preferred and a refused completion."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a completion is wanted for."""

    messages: tuple[Message, ...]
    answer: str | None = None
    origin: str = ""


Record = Text | Chat | Labelled | Pair | Prompt


def text_of(record: Record) -> str:
    """Everything a person would read in the record, for comparing rows."""
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Labelled):
        return record.text if record.text_pair is None else f"{record.text}\n{record.text_pair}"
    if isinstance(record, Pair):
        return "\n".join([*(m.content for m in record.prompt), record.chosen, record.rejected])
    return "\n".join(m.content for m in record.messages)


def question_of(record: Record) -> str:
    """The part of the record that is asked, not answered: what must not stand in train and eval at once."""
    if isinstance(record, Chat):
        return "\n".join(m.content for m in record.messages if m.role != "assistant")
    if isinstance(record, Pair):
        return "\n".join(m.content for m in record.prompt)
    return text_of(record)


def normalised(text: str) -> str:
    """Case and white space folded: two texts that differ in nothing else are the same row."""
    return " ".join(text.casefold().split())
