"""What is wrong with a data set, and how much of it: duplicates, leaks, labels, lengths. Nothing is dropped here."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from tunesmith.data.kinds import (
    Chat,
    Labelled,
    Pair,
    Ranking,
    Record,
    Text,
    full_text,
    input_text,
    normalised,
    output_text,
)
from tunesmith.data.rows import shown
from tunesmith.errors import printable

FEW_ROWS = 100
NGRAM_WORDS = 13
MAX_EXAMPLES = 20
SKEWED_SHARE = 0.9
_BOILERPLATE_ROWS = 3
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `severity` is "error" (training would be pointless or its result wrong), "warning" or "note".

    `count` rows of `total` are concerned; `examples` are origins, for a leak or a duplicate two joined by " = ".
    """

    kind: str
    severity: str
    message: str
    count: int = 0
    total: int = 0
    examples: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        where = f" ({', '.join(self.examples[:5])}{', ...' if len(self.examples) > 5 else ''})" if self.examples else ""
        return printable(f"{self.severity}: {self.message}{where}")

    def as_dict(self) -> dict[str, object]:
        """For a report."""
        return {
            "kind": self.kind, "severity": self.severity, "message": self.message,
            "count": self.count, "total": self.total, "examples": list(self.examples),
        }  # fmt: skip


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _folded(record: Record, whole: str, asked: str) -> str:
    """`normalised(whole)`, from the input's where that is most of it: folding is the slow part of a check."""
    if isinstance(record, Text):
        return asked
    return f"{asked} {normalised(output_text(record))}" if isinstance(record, Labelled) else normalised(whole)


def _num_words(folded: str) -> int:
    return folded.count(" ") + 1 if folded else 0


class _Side:
    """What one pass over a record set leaves: per row 8-byte digests and an origin; labels and lengths as counts."""

    def __init__(
        self,
        records: Iterable[Record],
        each: Callable[[int, str], None] | None = None,
        marks: re.Pattern[str] | None = None,
    ) -> None:
        self.origins: list[str] = []
        self.exact: list[int] = []
        self.folded: list[int] = []
        self.inputs: list[int] = []
        self.labels: Counter[str] = Counter()
        self.label_of: list[tuple[int, str]] = []
        self.answer_of: list[tuple[int, int]] = []
        self.order_of: list[tuple[int, int, int]] = []
        self.marked: list[str] = []
        self.same_pairs: list[str] = []
        self.tied: list[str] = []
        self.words: list[int] = []
        self.multi_label = False
        for record in records:
            self._add(record, each, marks)

    def _add(self, record: Record, each: Callable[[int, str], None] | None, marks: re.Pattern[str] | None) -> None:
        whole, asked = full_text(record), normalised(input_text(record))
        if marks is not None and marks.search(whole):
            self.marked.append(record.origin)
        self.origins.append(record.origin)
        self.exact.append(_digest(whole))
        folded = _folded(record, whole, asked)
        self.folded.append(_digest(folded))
        self.inputs.append(_digest(asked))
        self.words.append(_num_words(asked if isinstance(record, Labelled) else folded))
        if isinstance(record, Labelled):
            names = (record.label,) if isinstance(record.label, str) else record.label
            self.multi_label |= not isinstance(record.label, str)
            self.labels.update(names)
            self.label_of.append((self.inputs[-1], ", ".join(sorted(names))))
        if isinstance(record, Chat):
            self.answer_of.append((self.inputs[-1], _digest(normalised(output_text(record)))))
        if isinstance(record, Pair):
            better, worse = _digest(normalised(record.chosen)), _digest(normalised(record.rejected))
            self.order_of.append((self.inputs[-1], better, worse))
            if better == worse:
                self.same_pairs.append(record.origin)
        if isinstance(record, Ranking) and len(set(record.ranks)) == 1:
            self.tied.append(record.origin)
        if each is not None:
            each(len(self.origins) - 1, asked)

    def __len__(self) -> int:
        return len(self.origins)


def check_records(
    train: Iterable[Record],
    eval: Iterable[Record] | None = None,
    *,
    ngrams: bool = True,
    marks: Sequence[str] = (),
) -> list[Finding]:
    """Everything found in one pass over each set, errors first. Holds about 200 bytes a row, and eval's 13-grams.

    `ngrams=False` leaves out the search for 13-word overlaps (GPT-3, arXiv:2005.14165, appendix C), the slow part.
    `marks` are the special tokens of the tokenizer, which no text should hold.
    """
    grams = _Ngrams() if eval is not None and ngrams else None
    wanted = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None
    other = None if eval is None else _Side(eval, grams.add if grams else None, wanted)
    if grams:
        grams.close()
    side = _Side(train, grams.look if grams else None, wanted)
    found = [*_size(side), *_duplicates(side), *_labels(side, other), *_same_pairs(side), *_tied(side)]
    found += [*_answers(side), *_orders(side), *_marked(side), *_one_sided(other)]
    if other is not None:
        leaks, taken = _leaks(side, other)
        found += [*leaks, *(grams.findings(side.origins, other.origins, taken) if grams else [])]
    rank = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: rank[finding.severity])


def _size(side: _Side) -> Iterator[Finding]:
    total = len(side)
    if total < FEW_ROWS:
        text = f"only {total} training rows; below {FEW_ROWS} little is learned"
        yield Finding("few_rows", "warning", text, total, total)
    words = np.array(side.words)
    low, middle, high = (int(value) for value in np.quantile(words, [0.05, 0.5, 0.95]))
    text = f"{total:,} training rows of {low} to {high} words (5 to 95 %), half below {middle}, longest {words.max():,}"
    yield Finding("lengths", "note", text, total, total)
    tiny = [origin for origin, count in zip(side.origins, side.words, strict=True) if count < 2]
    if tiny:
        text = f"{len(tiny)} rows of a single word"
        yield Finding("tiny", "warning", text, len(tiny), total, tuple(tiny[:MAX_EXAMPLES]))


def _repeats(keys: Sequence[int], origins: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Rows whose key stood before, and the first of them with the row they repeat; a mix may read one twice."""
    first: dict[int, int] = {}
    count = 0
    examples: list[str] = []
    for number, key in enumerate(keys):
        before = first.setdefault(key, number)
        if before != number and origins[before] != origins[number]:
            count += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{origins[before]} = {origins[number]}")
    return count, tuple(examples)


def _duplicates(side: _Side) -> Iterator[Finding]:
    total = len(side)
    exact, examples = _repeats(side.exact, side.origins)
    if exact:
        text = f"{exact} training rows repeat another to the letter"
        yield Finding("duplicates", "warning", text, exact, total, examples)
    folded, examples = _repeats(side.folded, side.origins)
    if folded > exact:
        text = f"{folded - exact} training rows repeat another but for case, width or white space"
        yield Finding("near_duplicates", "warning", text, folded - exact, total, examples)


def _labels(side: _Side, other: _Side | None) -> Iterator[Finding]:
    if not side.label_of:
        return
    total = len(side)
    shares = ", ".join(f"{shown(name, 40)} {count / total:.3f}" for name, count in side.labels.most_common(12))
    more = f" and {len(side.labels) - 12} more" if len(side.labels) > 12 else ""
    yield Finding("balance", "note", f"{len(side.labels)} labels in training: {shares}{more}", total, total)
    top, count = side.labels.most_common(1)[0] if side.labels else ("", 0)
    if len(side.labels) < 2 and not side.multi_label:
        text = f"every training row has the label {shown(top, 40)!r}; there is nothing to tell apart"
        yield Finding("one_label", "error", text, total, total)
    elif count / total >= SKEWED_SHARE and not side.multi_label:
        text = f"{count / total:.1%} of training rows have the label {shown(top, 40)!r}; look at F1, not accuracy"
        yield Finding("skewed", "warning", text, count, total)
    rare = [name for name, count in side.labels.items() if count < 5]
    if rare:
        text = f"fewer than 5 training rows for the labels {', '.join(shown(name, 40) for name in rare[:12])}"
        yield Finding("rare_labels", "warning", text, len(rare), len(side.labels))
    yield from _contradictions(side)
    unseen = sorted(set(other.labels) - set(side.labels)) if other is not None else []
    if other is not None and unseen:
        count = sum(other.labels[name] for name in unseen)
        text = f"eval has labels that training never shows: {', '.join(shown(name, 40) for name in unseen[:12])}"
        yield Finding("unseen_labels", "error", f"{text} ({count} rows)", count, len(other))


def _contradictions(side: _Side) -> Iterator[Finding]:
    first: dict[int, int] = {}
    found: list[str] = []
    for number, (key, label) in enumerate(side.label_of):
        before = first.setdefault(key, number)
        if side.label_of[before][1] != label:
            found.append(f"{side.origins[before]} = {side.origins[number]}")
    if found:
        text = f"{len(found)} training rows give a text another label than an earlier row does"
        yield Finding("label_noise", "warning", text, len(found), len(side), tuple(found[:MAX_EXAMPLES]))


def _answers(side: _Side) -> Iterator[Finding]:
    """The same question answered in two ways, and one answer to everything."""
    first: dict[int, int] = {}
    found: list[str] = []
    for number, (asked, answer) in enumerate(side.answer_of):
        before = first.setdefault(asked, number)
        if side.answer_of[before][1] != answer:
            found.append(f"{side.origins[before]} = {side.origins[number]}")
    total = len(side.answer_of)
    if found:
        text = f"{len(found)} training rows answer a prompt in another way than an earlier row does"
        yield Finding("two_answers", "warning", text, len(found), total, tuple(found[:MAX_EXAMPLES]))
    top = Counter(answer for _, answer in side.answer_of).most_common(1)
    if top and total > 1 and top[0][1] / total >= SKEWED_SHARE:
        text = f"{top[0][1]} of {total} training rows have the same answer"
        yield Finding("one_answer", "warning", text, top[0][1], total)


def _orders(side: _Side) -> Iterator[Finding]:
    """Pairs of which an earlier row says the opposite."""
    seen: dict[tuple[int, int, int], int] = {}
    found: list[str] = []
    for number, (asked, better, worse) in enumerate(side.order_of):
        seen.setdefault((asked, better, worse), number)
        if better != worse and (asked, worse, better) in seen:
            found.append(f"{side.origins[seen[asked, worse, better]]} = {side.origins[number]}")
    if found:
        text = f"{len(found)} pairs prefer the answer that an earlier pair rejects"
        yield Finding("both_orders", "warning", text, len(found), len(side.order_of), tuple(found[:MAX_EXAMPLES]))


def _marked(side: _Side) -> Iterator[Finding]:
    if side.marked:
        text = (f"{len(side.marked)} training rows hold a special token of the tokenizer as text, which then acts as "
                "one")  # fmt: skip
        yield Finding("special_text", "warning", text, len(side.marked), len(side), tuple(side.marked[:MAX_EXAMPLES]))


def _one_sided(other: _Side | None) -> Iterator[Finding]:
    if other is not None and len(other.labels) == 1 and not other.multi_label and len(other) > 1:
        name, count = other.labels.most_common(1)[0]
        text = f"every held-out row has the label {shown(name, 40)!r}, so that always saying it would be right"
        yield Finding("one_held_out_label", "warning", text, count, len(other))


def _same_pairs(side: _Side) -> Iterator[Finding]:
    if side.same_pairs:
        text = f"{len(side.same_pairs)} pairs have the same text as chosen and as rejected; they teach nothing"
        examples = tuple(side.same_pairs[:MAX_EXAMPLES])
        yield Finding("same_pairs", "warning", text, len(side.same_pairs), len(side), examples)


def _tied(side: _Side) -> Iterator[Finding]:
    if side.tied:
        text = f"{len(side.tied)} rankings tie all their answers; they teach nothing"
        yield Finding("tied", "warning", text, len(side.tied), len(side), tuple(side.tied[:MAX_EXAMPLES]))


def _leaks(side: _Side, other: _Side) -> tuple[list[Finding], set[int]]:
    """Eval rows that stand in train, whole or by their input alone; and their numbers."""
    train_whole = {key: number for number, key in reversed(list(enumerate(side.folded)))}
    train_input = {key: number for number, key in reversed(list(enumerate(side.inputs)))}
    whole: list[str] = []
    asked: list[str] = []
    taken: set[int] = set()
    for number, origin in enumerate(other.origins):
        if (match := train_whole.get(other.folded[number])) is not None:
            whole.append(f"{side.origins[match]} = {origin}")
        elif (match := train_input.get(other.inputs[number])) is not None:
            asked.append(f"{side.origins[match]} = {origin}")
        else:
            continue
        taken.add(number)
    found = []
    advice = "take them out of one of the two, or let data.split make the eval set"
    for kind, pairs, what in (
        ("overlap", whole, "also stand in training"),
        ("input_overlap", asked, "have an input that also stands in training, with another answer"),
    ):
        if pairs:
            text = f"{len(pairs)} of {len(other)} eval rows {what}; {advice}"
            found.append(Finding(kind, "error", text, len(pairs), len(other), tuple(pairs[:MAX_EXAMPLES])))
    return found, taken


class _Ngrams:
    """Runs of 13 words that stand in eval, looked up in train; runs common to many eval rows are boilerplate."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}
        self._pieces: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._keys = np.empty(0, np.uint64)
        self._owner = np.empty(0, np.int64)
        self._match: dict[int, int] = {}

    def _hashes(self, text: str, *, learn: bool) -> np.ndarray:
        """One 64-bit hash for each run of 13 words (punctuation aside). A word eval never uses counts as 0."""
        words = _WORD.findall(text)
        if len(words) < NGRAM_WORDS:
            return np.empty(0, np.uint64)
        known = self._words
        if learn:
            for word in words:
                known.setdefault(word, _digest(word) >> 1)
        ids = np.fromiter(map(known.get, words, repeat(0)), np.int64, len(words)).astype(np.uint64)
        count = len(words) - NGRAM_WORDS + 1
        total = np.zeros(count, np.uint64)
        with np.errstate(over="ignore"):
            for shift in range(NGRAM_WORDS):
                total = total * _BASE + ids[shift : shift + count]
        return total

    def add(self, number: int, text: str) -> None:
        """An eval row."""
        hashes = np.unique(self._hashes(text, learn=True))
        self._pieces.append(hashes)
        self._rows.append(np.full(len(hashes), number, np.int64))

    def close(self) -> None:
        """All eval rows are in; drop what many of them share."""
        if not self._pieces:
            return
        keys, rows = np.concatenate(self._pieces), np.concatenate(self._rows)
        limit = max(_BOILERPLATE_ROWS, len(self._pieces) // 100)
        order = np.argsort(keys, kind="stable")
        _, inverse, counts = np.unique(keys[order], return_inverse=True, return_counts=True)
        rare = counts[inverse] <= limit
        self._keys, self._owner = keys[order][rare], rows[order][rare]
        self._pieces, self._rows = [], []

    def look(self, number: int, text: str) -> None:
        """A training row."""
        hashes = self._hashes(text, learn=False)
        if not len(hashes) or not len(self._keys):
            return
        start = np.searchsorted(self._keys, hashes)
        count = np.searchsorted(self._keys, hashes, side="right") - start
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        for owner in np.unique(self._owner[np.repeat(start, count) + within]):
            self._match.setdefault(int(owner), number)

    def findings(self, train: Sequence[str], other: Sequence[str], taken: set[int]) -> Iterator[Finding]:
        """Eval rows, other than those found whole, that share a run of 13 words with a training row."""
        pairs = [f"{train[row]} = {other[owner]}" for owner, row in sorted(self._match.items()) if owner not in taken]
        if pairs:
            text = f"{len(pairs)} of {len(other)} eval rows share a run of {NGRAM_WORDS} words with a training row"
            yield Finding("ngram_overlap", "warning", text, len(pairs), len(other), tuple(pairs[:MAX_EXAMPLES]))
