"""The gates before the first step: named figures with thresholds, beyond which a run would be pointless or mislead.

A threshold is set where no honest data comes near it: a figure that is only unusual is told on the page and stops
nothing. `docs/preflight.md` has the table with the reasons, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.check import Finding
from tunesmith.data.scan import Scan
from tunesmith.plan.page import share


@dataclass(frozen=True, slots=True)
class Gate:
    """`limit` is the most that a figure may be, or with `least` the least. `what` follows the figure in a sentence,
    `why` says what it would do, `advice` how to mend it."""

    name: str
    limit: float
    what: str
    why: str
    advice: str
    least: bool = False


GATES = (
    Gate("overlap", 0.0, "of the held-out rows also stand in training",
         "what is measured on them is memory",
         "take them out of one of the two, or let data.split make the eval set (data.on_overlap: allow trains too)"),
    Gate("conflicts", 0.10, "of the training rows contradict an earlier row",
         "no model can be right about both",
         "keep one label for each text, one order for each pair"),
    Gate("duplicates", 0.50, "of the training rows repeat an earlier one",
         "a few rows would be learned by heart",
         "leave each row once, or train for more epochs instead"),
    Gate("near_duplicates", 0.50, "of the training rows are like an earlier one",
         "a few rows would be learned by heart",
         "leave one row of each kind"),
    Gate("one_class", 0.999, "of the rows have the same label or answer",
         "saying it always would be right as often",
         "add rows of the others; shuffle a sorted file before it is divided"),
    Gate("special_text", 0.01, "of the training rows hold a special token of the tokenizer as text",
         "it acts as one: it ends an answer, or lets a user's text speak as the assistant",
         "take the marks out of the texts: the chat template writes them"),
    Gate("trained_share", 0.002, "of the tokens are trained on",
         "nearly all of the work would teach nothing",
         "shorten the prompts, or look at data.on_too_long", least=True),
    Gate("end_tokens", 0.50, "of the answers end with an end token",
         "the model would learn not to stop",
         "raise data.max_length, or choose data.on_too_long: truncate_left", least=True),
    Gate("rows_left", 0.50, "of the training rows are left after encoding",
         "most of the data would not be seen",
         "raise data.max_length, or choose another data.on_too_long", least=True),
    Gate("unknown_tokens", 0.10, "of the tokens are unknown to the tokenizer",
         "what the text says would not reach the model",
         "take a base for this language or kind of text"),
    Gate("double_bos", 0.01, "of the rows begin with two begin tokens",
         "the model would not be asked as it was trained before",
         "take the begin token out of the texts or out of the chat template"),
    Gate("memory", 1.0, "of the memory there is would be held by weights, gradients and optimizer alone",
         "the run would be stopped by the system",
         "train fewer parameters, take a smaller base, or see `tunesmith plan RECIPE`"),
)  # fmt: skip
NAMES = tuple(gate.name for gate in GATES)
_FOUND = {
    "overlap": ("overlap", "input_overlap"),
    "conflicts": ("label_noise", "both_orders"),
    "duplicates": ("duplicates", "near_duplicates"),
    "one_class": ("skewed", "one_answer", "one_held_out_label"),
    "special_text": ("special_text",),
}
"""Findings about records that a gate judges; several count together where they are of the same rows."""
_FEW_HELD_OUT = 10
"""Held-out rows below which one label among them is chance, and told alone."""
_NO_ANSWERS = ("pretrain", "mlm", "classify", "ppo", "grpo")
_IN_TEXT = ("pretrain", "mlm", "classify")
"""Stages whose rows may hold such tokens on purpose: texts in a chat template, pairs of sentences."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A gate's figure, a share, and whether the run may begin: `state` is passed, failed or allowed."""

    gate: Gate
    value: float
    state: str
    detail: str = ""

    def __str__(self) -> str:
        """What was found and what it would do, in words."""
        gate = self.gate
        bound = f"at least {share(gate.limit)} must" if gate.least else f"at most {share(gate.limit)} may"
        where = f" ({self.detail})" if self.detail else ""
        return f"{share(self.value)} {gate.what}{where}, {bound if gate.limit else 'none may'}: {gate.why}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gate": self.gate.name, "value": self.value, "limit": self.gate.limit, "least": self.gate.least,
            "state": self.state, "text": str(self),
        }  # fmt: skip


def judge(
    values: Mapping[str, float | None], allowed: Collection[str], details: Mapping[str, str] | None = None
) -> tuple[Verdict, ...]:
    """Every gate whose figure is known, in the order of the table."""
    found = []
    for gate in GATES:
        value = values.get(gate.name)
        if value is None:
            continue
        beyond = value < gate.limit if gate.least else value > gate.limit
        state = "passed" if not beyond else "allowed" if gate.name in allowed else "failed"
        found.append(Verdict(gate, value, state, (details or {}).get(gate.name, "")))
    return tuple(found)


def refusals(verdicts: Sequence[Verdict]) -> list[str]:
    """What stops the run, each with the two ways on: mend it, or pass the gate knowingly."""
    return [
        f"{v.gate.name}: {v}; {v.gate.advice}. To train all the same: preflight.allow: [{v.gate.name}]"
        for v in verdicts
        if v.state == "failed"
    ]


def found_values(findings: Sequence[Finding]) -> tuple[dict[str, float], dict[str, str]]:
    """(figures, first examples) of the gates that judge what was found in the records."""
    values: dict[str, float] = {}
    details: dict[str, str] = {}
    for gate, kinds in _FOUND.items():
        mine = [finding for finding in findings if finding.kind in kinds and not _chance(finding)]
        shares = [finding.count / max(1, finding.total) for finding in mine]
        values[gate] = max(shares, default=0.0) if gate == "one_class" else min(1.0, sum(shares))
        examples = [example for finding in mine for example in finding.examples]
        if examples:
            details[gate] = ", ".join(examples[:5]) + (", ..." if len(examples) > 5 else "")
    return values, details


def _chance(finding: Finding) -> bool:
    return finding.kind == "one_held_out_label" and finding.total < _FEW_HELD_OUT


def scan_values(scan: Scan, stage: str, rows: int, tally: Mapping[str, int]) -> dict[str, float | None]:
    """Figures of the gates that judge the encoded rows; None for those that mean nothing in the stage."""
    trains = stage not in ("classify", "ppo", "grpo")
    answers = stage not in _NO_ANSWERS and scan.answers > 0
    dropped = sum(count for name, count in tally.items() if name.startswith("dropped_"))
    return {
        "trained_share": scan.trained / max(1, scan.tokens) if trains else None,
        "end_tokens": scan.ended / scan.answers if answers else None,
        "rows_left": rows / max(1, rows + dropped),
        "unknown_tokens": scan.unknown / max(1, scan.plain + scan.unknown),
        "double_bos": scan.doubled / max(1, scan.samples),
    }


def judged_text(stage: str) -> bool:
    """False where a special token as text may be meant."""
    return stage not in _IN_TEXT
