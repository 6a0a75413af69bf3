"""The recipe's data section: where rows come from, which of them are taken, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe_sections import Positive, Section, Share


class DataSource(Section):
    """A source as a section of its own, to take a part of its rows. `data.train: FILE` is `data.train.path: FILE`."""

    path: str
    """A file, folder, glob or hub id."""
    rows: Positive | None = None
    """Take this many of its rows, drawn by `seed`; all when not set."""
    balance: str | None = None
    """Column (or role, as `label`) of whose values the part has equally many rows."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which rows, beside their texts: neither the recipe's own seed nor the order of the file does."""


class MixPart(Section):
    """One of several training sets and how much of the mix it is."""

    path: str
    """A file, folder, glob or hub id."""
    rows: Positive | None = None
    """Take this many of its rows, drawn by `seed`; all when not set."""
    balance: str | None = None
    """Column (or role) of whose values the rows taken have equally many each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which rows are taken."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the mix, relative to the other parts."""
    format: str | None = None
    """As `data.format`, for this part."""
    columns: dict[str, str] | None = None
    """As `data.columns`, for this part."""
    template: str | None = None
    """As `data.template`, for this part; `none` where `data.template` is not for it."""


def as_source(source: str | DataSource) -> DataSource:
    """A source that may be named by its path alone, as a section."""
    return DataSource(path=source) if isinstance(source, str) else source


SOURCE_KEYS = ("data.train", "data.eval", "data.test")
"""Keys that take a path, or a `DataSource`."""


class SplitSpec(Section):
    """Shares of `train` to hold out when no `eval` or `test` is named."""

    eval: Share = 0.1
    """Share of the rows to measure on and to choose the checkpoint by."""
    test: Share = 0.0
    """Share of the rows to measure on before and after, and for nothing else."""


class DataSpec(Section):
    """What is read and how it is turned into samples."""

    train: str | DataSource | None = None
    """A file, folder, glob or hub id (`owner/name:split`) to train on; a section to take a part of it."""
    mix: list[MixPart] | None = None
    """Several training sets with weights, instead of `train`."""
    eval: str | DataSource | None = None
    """Held-out rows: measured before and after, and the checkpoint is chosen by them."""
    test: str | DataSource | None = None
    """Rows that are measured before and after and used for nothing else."""
    split: SplitSpec | None = None
    """Hold out a share of `train` instead of naming `eval` or `test`."""
    group_key: str | None = None
    """Column whose equal values stay on one side of a split, and are counted for `max_per_key`."""
    max_per_key: Positive | None = None
    """Most training rows with the same `group_key`; the others are left out and counted (2203.02155: 200 a user)."""
    on_personal: Literal["keep", "drop"] = "keep"
    """Train on rows that hold e-mail addresses, phone, card or account numbers, or leave them out and count them."""
    format: str | None = None
    """Format of the rows, when recognition should not be left to chance."""
    columns: dict[str, str] | None = None
    """Column of each role, as in `{question: Frage, answer: Antwort}`."""
    template: str | None = None
    """A built-in template by name, or text with `{column}` placeholders, the last one being learned. The parts of a mix
    may have their own; where those differ it is named here for held-out rows and later prompts (`none`: without)."""
    max_length: Positive | None = None
    """Most tokens in a sample; the base's context when not set."""
    on_too_long: Literal["error", "truncate_left", "truncate_right", "split", "drop"] = "error"
    """What happens to longer rows. `split` is for pretrain and mlm."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at broken rows, or leave them out and count them."""
    on_overlap: Literal["error", "allow"] = "error"
    """Stop when held-out rows also stand in train, or train all the same."""
    train_on_prompt: bool = False
    """Train on every token of a conversation instead of the answers alone."""
    multi_label: bool = False
    """A row may have several labels, or none."""
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are masked (BERT, 1810.04805, 3.1)."""

    def asked_by(self, part: str | None = None) -> str | None:
        """The template that rows, or those of a mix's part with its own, are asked by; None without one."""
        template = part or self.template
        return None if template == "none" else template
