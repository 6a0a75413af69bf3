"""The recipe's section about the gates before a run: which of them are passed knowingly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.recipe_sections import Section

GateName = Literal[
    "overlap", "conflicts", "duplicates", "near_duplicates", "one_class", "special_text", "trained_share", "end_tokens",
    "rows_left", "unknown_tokens", "double_bos", "memory",
]  # fmt: skip


class PreflightSpec(Section):
    """What is looked at before the first step, and which findings do not stop the run."""

    allow: list[GateName] = Field(default_factory=list)
    """Gates that are passed knowingly, by name; the report and the model card then say so."""
