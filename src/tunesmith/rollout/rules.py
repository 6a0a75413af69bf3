"""Rewards that need no model: a text that stands in the completion, a pattern, an exact answer, a length."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunesmith.data.kinds import normalised
from tunesmith.rollout.rewards import Completed, Score

NUMBER, BOXED = "number", "boxed"
"""Words that stand for a way to find an answer, where `answer_pattern` may be a regular expression too."""
_NUMBERS = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


def contains(texts: Sequence[str]) -> Score:
    """1 where one of `texts` stands in the completion."""
    return lambda items: [float(any(text in item.completion for text in texts)) for item in items]


def matches(pattern: str) -> Score:
    """1 where the regular expression is found in the completion."""
    found = re.compile(pattern)
    return lambda items: [float(found.search(item.completion) is not None) for item in items]


def exact(pattern: str | None = None) -> Score:
    """1 where the completion's answer is the row's, spaces, case and the way numbers are written aside."""
    return lambda items: [float(same_answer(item, pattern)) for item in items]


def same_answer(item: Completed, pattern: str | None) -> bool:
    """Whether the completion gives the row's answer; False when it gives none.

    With `number`, "so 3 + 4 = 7.0" answers "#### 7". With `boxed`, "thus \\boxed{x+1}" answers "x+1".
    """
    said, wanted = find_answer(item.completion, pattern), find_answer(item.answer or "", pattern)
    wanted = item.answer if wanted is None else wanted
    return said is not None and wanted is not None and _plain(said) == _plain(wanted)


def find_answer(text: str, pattern: str | None) -> str | None:
    """The answer in `text`: all of it, its last number, its last \\boxed{...}, or the last match's first group."""
    if pattern is None:
        return text
    if pattern == NUMBER:
        numbers = _NUMBERS.findall(text)
        return numbers[-1] if numbers else None
    if pattern == BOXED:
        return _boxed(text)
    found = list(re.finditer(pattern, text))
    return None if not found else (found[-1].group(1) if found[-1].re.groups else found[-1].group())


def _boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces inside it matched; None when it is missing or never closed."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 7 : i]
    return None


def _plain(answer: str) -> str:
    """One spelling for answers that are the same: "1,234.50" and "1234.5", "Paris " and "paris"."""
    text = normalised(answer).strip().rstrip(".")
    bare = text.replace(",", "").removeprefix("$").removeprefix("+")
    if _NUMBERS.fullmatch(bare) is None:
        return text
    whole, _, part = bare.partition(".")
    sign = "-" if whole.startswith("-") else ""
    digits, decimals = whole.lstrip("-").lstrip("0") or "0", part.rstrip("0")
    return ("" if digits == "0" and not decimals else sign) + digits + (f".{decimals}" if decimals else "")


def length(target: int) -> Score:
    """1 at `target` tokens, falling in a straight line to 0 at a distance of `target` tokens."""
    return lambda items: [max(0.0, 1.0 - abs(item.num_tokens - target) / target) for item in items]
