"""The typed rows: `Text`, `Chat`, `Pair`, `Ranking`, `Labelled`, `Prompt`, each with its origin as `file:line`."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` says whether an assistant turn is learned (None: the stage's default).

    `tool_calls` holds `{"type": "function", "function": {"name", "arguments": mapping}}`; `name` and
    `tool_call_id` belong to the result of a call (role "tool").
    """

    role: str
    content: str
    trained: bool | None = None
    tool_calls: tuple[Mapping[str, object], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text; every token is learned."""

    text: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation of at least one prompt and one answer; `tools` are JSON schemas for the chat template.

    `plain`: a prompt template already made the prompt, so no chat template goes round it.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] | None = None
    plain: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first. `margin` is how much better, where the row says so.

    `plain`: a prompt template already made the prompt, so no chat template goes round it.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: str = ""
    margin: float | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Ranking:
    """K >= 2 answers to one prompt with the rank of each: 1 is the best, equal ranks are a tie.

    `plain` as for a pair.
    """

    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    origin: str = ""
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text (or two) and the name of its class; several names, perhaps none, when a row may have many labels."""

    text: str
    label: str | tuple[str, ...]
    text_pair: str | None = None
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy answers. `answer` is a reference for rewards; `columns` are the row's other fields.

    `plain`: a prompt template already made the prompt, so no chat template goes round it.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
    origin: str = ""
    plain: bool = False


Record = Text | Chat | Pair | Ranking | Labelled | Prompt


def comparisons(ranks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(index of the better, index of the worse) for each of the C(K, 2) pairs; ties are dropped.

    Ranks 2, 1, 2 give (1, 0) and (1, 2) (InstructGPT, arXiv:2203.02155, 3.5).
    """
    pairs = ((i, j) if ranks[i] < ranks[j] else (j, i) for i in range(len(ranks)) for j in range(i + 1, len(ranks)))
    return tuple((i, j) for i, j in pairs if ranks[i] != ranks[j])


def as_ranking(record: Pair | Ranking) -> Ranking:
    """A pair as a ranking of two; a ranking as it is."""
    if isinstance(record, Ranking):
        return record
    return Ranking(record.prompt, (record.chosen, record.rejected), (1, 2), record.origin)


def pairs_of(record: Pair | Ranking) -> tuple[Pair, ...]:
    """A ranking as its pairs, ties dropped, all with its origin; a pair as itself."""
    if isinstance(record, Pair):
        return (record,)
    texts = record.completions
    return tuple(Pair(record.prompt, texts[i], texts[j], record.origin) for i, j in comparisons(record.ranks))


def normalised(text: str) -> str:
    """Width, case and white space folded: texts that differ in nothing else are the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def input_text(record: Record) -> str:
    """What the model is given: everything but the answer, the label or the two candidates."""
    match record:
        case Text(text=text):
            return text
        case Labelled(text=text, text_pair=pair):
            return text if pair is None else f"{text}\n{pair}"
        case Chat(messages=messages):
            last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
            return "\n".join(m.content for m in messages[:last])
        case Pair(prompt=messages) | Ranking(prompt=messages) | Prompt(messages=messages):
            return "\n".join(m.content for m in messages)


def output_text(record: Record) -> str:
    """What the model should give: the last answer, the label, the best candidate; empty for raw text."""
    match record:
        case Text():
            return ""
        case Labelled(label=label):
            return label if isinstance(label, str) else ", ".join(label)
        case Chat(messages=messages):
            return next((m.content for m in reversed(messages) if m.role == "assistant"), "")
        case Pair(chosen=chosen):
            return chosen
        case Ranking(completions=completions, ranks=ranks):
            return completions[ranks.index(min(ranks))]
        case Prompt(answer=answer):
            return answer or ""


def full_text(record: Record) -> str:
    """Input and output together: what two rows must share to be duplicates."""
    if isinstance(record, Pair):
        return "\n".join([input_text(record), record.chosen, record.rejected])
    if isinstance(record, Ranking):
        return "\n".join([input_text(record), *record.completions])
    if isinstance(record, Chat):
        return "\n".join(message.content for message in record.messages)
    return f"{input_text(record)}\n{output_text(record)}"
