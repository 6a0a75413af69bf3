"""The first samples token by token: what each token is, whether it is trained on, and who wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Any

from tunesmith.batch import Sample
from tunesmith.data.kinds import Chat, Labelled, Message, Pair, Prompt, Ranking, Record, output_text
from tunesmith.data.naming import place

HEAD, TAIL = 96, 48
"""Tokens shown of a long sample: from its beginning, and from its end, where answers and end tokens stand."""
TEMPLATE = "template"
_SEARCHED = 64
_WINDOW = 40


def preview(
    store: Any, records: Iterable[Record], tokenizer: Any, *, ends: Sequence[int], names: Mapping[str, str], rows: int
) -> list[dict[str, Any]]:
    """The first `rows` samples as `{origin, label, num_tokens, left_out, tokens}`.

    A token is `{text, id, trained, author, special, end}`; `author` is the role that wrote it, or "template" for what
    stands round the messages. `left_out` tokens of a long sample stand between the first 96 and the last 48.
    """
    samples = [store[index] for index in range(min(rows, len(store)))]
    origins = {sample.origin for sample in samples}
    found: dict[str, Record] = {}
    for record in islice(records, _SEARCHED):
        if (origin := place(record.origin, names)) in origins:
            found.setdefault(origin, record)
        if len(found) == len(origins):
            break
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    used: dict[str, int] = {}
    shown = []
    for sample in samples:
        number = used[sample.origin] = used.get(sample.origin, -1) + 1
        record = found.get(sample.origin)
        shown.append(_row(sample, record, number, tokenizer, special, frozenset(ends)))
    return shown


def _row(
    sample: Sample, record: Record | None, number: int, tokenizer: Any, special: set[int], ends: frozenset[int]
) -> dict[str, Any]:
    ids = sample.ids.tolist()
    kept = list(range(len(ids))) if len(ids) <= HEAD + TAIL else [*range(HEAD), *range(len(ids) - TAIL, len(ids))]
    spans, text = _spans(ids, tokenizer)
    said = _messages(record, number)
    trained = (sample.weights > 0).tolist()
    authors = _authors(spans, text, said)
    if any(role == "assistant" for role, _ in said):
        for i, token in enumerate(ids):  # an answer that the tokenizer cannot write is an answer all the same
            authors[i] = "assistant" if trained[i] and authors[i] == TEMPLATE and token not in ends else authors[i]
    return {
        "origin": f"{PurePath(sample.origin.rpartition(':')[0]).name}:{sample.origin.rpartition(':')[2]}",
        "label": list(sample.label) if isinstance(sample.label, tuple) else sample.label,
        "num_tokens": len(ids),
        "left_out": len(ids) - len(kept),
        "tokens": [
            {
                "text": text[slice(*spans[i])], "id": ids[i], "trained": trained[i], "author": authors[i],
                "special": ids[i] in special, "end": ids[i] in ends,
            }
            for i in kept
        ],
    }  # fmt: skip


def _spans(ids: Sequence[int], tokenizer: Any) -> tuple[list[tuple[int, int]], str]:
    """(where each token stands in the text, the text). A character of several tokens is the last one's; the others are
    empty."""
    pieces: list[str] = []
    held: list[int] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for token in ids:
        held.append(token)
        piece = _after(ids, len(spans), held, tokenizer)
        open_end = piece.endswith("\ufffd") and len(held) < 8
        pieces.append("" if open_end else piece)
        spans.append((at, at + len(pieces[-1])))
        at = spans[-1][1]
        held = held if open_end else []
    return spans, "".join(pieces)


def _after(ids: Sequence[int], index: int, held: Sequence[int], tokenizer: Any) -> str:
    """What `held`, which ends at `index`, adds to the text. Some tokenizers drop or add a space at a text's beginning,
    so it is read behind the token before it."""
    start = index - len(held)

    def text(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), clean_up_tokenization_spaces=False))

    if start < 0:
        return text(held)
    before = text([ids[start]])
    whole = text([ids[start], *held])
    return whole[len(before) :] if whole.startswith(before) else text(held)


def _messages(record: Record | None, number: int) -> list[tuple[str, str]]:
    """(role, text) of what a record says, in order; `number` is the answer that this sample holds."""
    if record is None:
        return []
    if isinstance(record, Labelled):
        return [("text", record.text), *([("text", record.text_pair)] if record.text_pair else [])]
    if isinstance(record, Chat):
        return _turns(record.messages)
    if isinstance(record, Pair | Ranking):
        answers = (record.chosen, record.rejected) if isinstance(record, Pair) else record.completions
        return [*_turns(record.prompt), ("assistant", answers[min(number, len(answers) - 1)])]
    if isinstance(record, Prompt):
        return _turns(record.messages)
    return [("text", record.text)]


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def _authors(spans: Sequence[tuple[int, int]], text: str, said: Sequence[tuple[str, str]]) -> list[str]:
    """Who wrote each token: the first message of which something stands in it."""
    owner = [TEMPLATE] * (len(text) + 1)
    at = 0
    for role, content in said:
        content = content.strip()
        place = text.find(content, at) if content else -1
        start, end = (place, place + len(content)) if place >= 0 else _by_words(text, content, at)
        owner[start:end] = [role] * (end - start)
        at = max(at, end)
    return [
        next((who for who in owner[start : max(end, start + 1)] if who != TEMPLATE), TEMPLATE) for start, end in spans
    ]


def _by_words(text: str, content: str, at: int) -> tuple[int, int]:
    """Where a message stands of which the tokenizer has changed or the limit has cut off a part: from the first to the
    last of its words found in order."""
    start = end = at
    for word in content.split():
        place = text.casefold().find(word.casefold(), end, end + len(word) + _WINDOW) if len(word) > 1 else -1
        if place >= 0:
            start, end = (place if end == at else start), place + len(word)
    return start, end


def text_kept(records: Iterable[Record], tokenizer: Any, *, rows: int = 20) -> dict[str, Any]:
    """How many of the first texts come back to the letter when encoded and decoded, and the first place of the first
    that does not. That one does not is no fault of the data: a vocabulary may know no capitals, or not all signs."""
    texts = [_text_of(record) for record in islice(records, rows)]
    kept, example = 0, None
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        kept += back == text or back.lstrip() == text.lstrip()
        if example is None and back.lstrip() != text.lstrip():
            example = _first_difference(text.lstrip(), back.lstrip())
    return {"rows": len(texts), "same": kept, "example": example}


def _text_of(record: Record) -> str:
    return output_text(record) if isinstance(record, Chat) else next((text for _, text in _messages(record, 0)), "")


def _first_difference(text: str, back: str) -> list[str]:
    """[a piece of the text, what becomes of it]."""
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return [part[max(0, at - 10) : at + 20] for part in (text, back)]
