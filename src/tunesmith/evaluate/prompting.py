"""A base that is asked instead of tuned: prompts with and without examples, and labels scored by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.data.chat import marks_of
from tunesmith.data.tokens import encode_text, encode_texts
from tunesmith.evaluate.likelihood import Collate, evaluate_likelihood

CONTENT_FREE = "N/A"
"""A text that says nothing: what the labels score after it is the base's habit, not its opinion."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Samples in a list, as evaluation reads them."""

    samples: tuple[Sample, ...]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sample."""
        return np.asarray([len(sample) for sample in self.samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self.samples[index]


@dataclass(frozen=True, slots=True)
class LabelPrompt:
    """How a text is put to a base so that its label comes next.

    `template` has `{text}` and ends with `{label}`; `words` are the labels as the base may know them, `examples` are
    (tokens of a text, class) that stand before, `max_tokens` is all that the base reads. `keep_end`: of a text that is
    too long the end is kept.
    """

    tokenizer: Any
    template: str
    words: tuple[str, ...]
    examples: tuple[tuple[Sequence[int], int], ...]
    max_tokens: int
    keep_end: bool = True

    def prompt(self, text_ids: Sequence[int] | None) -> list[int]:
        """Tokens up to where the label comes; None asks about a text that says nothing."""
        return self.prompts([text_ids])[0]

    def prompts(self, texts: Sequence[Sequence[int] | None]) -> list[list[int]]:
        """The prompt about each text."""
        bos, room, special = marks_of(self.tokenizer).bos, self._room(), frozenset(self.tokenizer.all_special_ids)
        shown = [self._filled(self._text(ids, room, special), self.words[c]) for ids, c in self.examples]
        start = self.template.removesuffix("{label}")
        asked = (CONTENT_FREE if ids is None else self._text(ids, room, special) for ids in texts)
        whole = ("\n\n".join([*shown, start.replace("{text}", text).rstrip()]) for text in asked)
        return [[*bos, *ids] for ids in encode_texts(self.tokenizer, whole)]

    def answers(self) -> list[list[int]]:
        """Tokens of every label as it stands behind the prompt."""
        lead = " " if self.template.removesuffix("{label}").endswith(" ") else ""
        return [encode_text(self.tokenizer, lead + word) for word in self.words]

    def _filled(self, text: str, word: str) -> str:
        return self.template.replace("{label}", word).replace("{text}", text)

    def _room(self) -> int:
        """Tokens that each text may have so that all of them fit beside the words around them."""
        around = len(encode_text(self.tokenizer, self._filled("", max(self.words, key=len)) + "\n\n")) + 2
        num = len(self.examples) + 1
        return max(1, (self.max_tokens - 1) // num - around)

    def _text(self, ids: Sequence[int], room: int, special: frozenset[int]) -> str:
        """The text, or as much of it as there is room for."""
        bare = [int(i) for i in ids if int(i) not in special]
        kept = (bare[-room:] if self.keep_end else bare[:room]) if len(bare) > room else bare
        return str(self.tokenizer.decode(kept)).strip()


def score_labels(
    model: Any, prompt: LabelPrompt, texts: Sequence[Sequence[int]], *, collate: Collate, max_tokens: int, device: Any
) -> tuple[NDArray[np.int64], float]:
    """(class of every text `[n]`, mean tokens of a prompt): the label whose log-probability gains most by the text.

    Gains are over the same prompt about a text that says nothing, which takes out how common a label is in itself
    (Zhao et al. 2021, 2102.09690; Holtzman et al. 2021, 2104.08315, eq. 4). A tie goes to the first label.
    """
    prompts = prompt.prompts([None, *texts])
    answers = prompt.answers()
    samples = Plain(tuple(_joined(start, answer) for start in prompts for answer in answers))
    result = evaluate_likelihood(model, samples, collate=collate, max_tokens=max_tokens, device=device)
    scores = -result.nats.reshape(len(prompts), len(answers))
    return (scores[1:] - scores[0]).argmax(1).astype(np.int64), float(np.mean([len(p) for p in prompts[1:]]))


def _joined(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    start = list(prompt) or [answer[0]]
    weights = [0.0] * len(start) + [1.0] * len(answer)
    return Sample(np.asarray([*start, *answer], np.int32), np.asarray(weights, np.float32))


def with_examples(samples: Sequence[Sample], examples: Sequence[Sample], tokenizer: Any, max_tokens: int) -> Plain:
    """Every sample behind as many of `examples`, whole, as fit into `max_tokens` together; only its own targets count.

    An encoded conversation behind another is a conversation of more turns; a start mark is kept once.
    """
    bos = marks_of(tokenizer).bos
    return Plain(tuple(_behind(sample, examples, bos, max_tokens) for sample in samples))


def _behind(sample: Sample, examples: Sequence[Sample], bos: Sequence[int], max_tokens: int) -> Sample:
    body, used = _without(sample.ids, bos), list[NDArray[Any]]()
    room = max_tokens - len(sample)
    for example in examples:
        ids = _without(example.ids, bos)
        if len(ids) <= room:
            used.append(ids)
            room -= len(ids)
    if not used:
        return sample
    ids = np.concatenate([np.asarray(bos, np.int32), *used, body]).astype(np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(ids) - len(body) :] = sample.weights[len(sample) - len(body) :]
    return replace(sample, ids=ids, weights=weights)


def _without(ids: NDArray[Any], bos: Sequence[int]) -> NDArray[Any]:
    """The tokens behind the start mark."""
    return ids[len(bos) :] if len(bos) and list(ids[: len(bos)]) == list(bos) else ids


def prompt_tokens(samples: Sequence[Sample]) -> float:
    """Mean tokens before the first target: what a request costs to read."""
    return float(np.mean([int(np.flatnonzero(s.weights > 0)[0]) for s in samples if (s.weights > 0).any()] or [0]))
