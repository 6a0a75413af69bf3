"""General text and earlier tasks as samples: what forgetting is measured on, and what is replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.encode import Encoder
from tunesmith.data.records import RecordSet, read_records
from tunesmith.data.store import SampleStore, build_store
from tunesmith.errors import DataError, several
from tunesmith.model.load import is_encoder
from tunesmith.recipe import Recipe

TEXT_TOKENS = 512
"""Most tokens of a piece of text; longer texts are split."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Samples and the stage that their rows were read for: `pretrain` is text, `sft` prompts with responses."""

    kind: str
    store: SampleStore


@dataclass(frozen=True, slots=True)
class Reader:
    """What reading a probe needs: the recipe and its folder, how rows become samples, whom to tell."""

    recipe: Recipe
    folder: Path
    tokenizer: Any
    labels: tuple[str, ...]
    context_tokens: int | None
    say: Callable[[str], None]

    def probes(self) -> dict[str, Probe]:
        """Every probe of the recipe by its name; empty without a limit on forgetting."""
        from tunesmith.stages.prepare import built_in_probe  # it knows every stage

        forget, text = self.recipe.forget, self.recipe.evaluate.probe
        if forget is None:
            return {}
        named = forget.probes if forget.probes is not None or text is None else {"probe": text}
        if named is None:
            kind = self._kinds()[-1]
            return {"probe": Probe(kind, self._encoded(built_in_probe(), kind))}
        return {name: self._read(source, f"forget.probe {name}", self._kinds()) for name, source in named.items()}

    def replay(self) -> Probe | None:
        """What is mixed into every step: rows that the stage's own objective can read."""
        forget, stage = self.recipe.forget, self.recipe.stage
        if forget is None or forget.replay is None:
            return None
        kinds = ("sft", "pretrain") if stage in ("sft", "pretrain") else (stage,)
        return self._read(forget.replay.data, "forget.replay", kinds)

    def _kinds(self) -> tuple[str, ...]:
        """The stages whose rows this run's model can be asked, plain text last."""
        if self.recipe.stage == "mlm":
            return ("mlm",)
        if self.recipe.stage not in ("classify", "reward"):
            return ("sft", "pretrain")
        from tunesmith.stages.bases import base_path

        base = base_path(self.recipe.base, self.folder)
        encoder = is_encoder(base, trust=self.recipe.trust_remote_code)
        return (self.recipe.stage, "mlm") if encoder else (self.recipe.stage, "sft", "pretrain")

    def _read(self, source: str, what: str, kinds: tuple[str, ...]) -> Probe:
        problems: dict[str, None] = {}
        for kind in kinds:
            try:
                records = self._records(source, kind)
            except DataError as error:
                problems[str(error)] = None
                continue
            store = self._encoded(records, kind)
            if len(store) == 0:
                raise DataError(f"{what}: no row of {source} is left after encoding")
            self.say(f"{what}: {records.describe()}, {store.num_tokens:,} tokens")
            return Probe(kind, store)
        raise several([f"{what}: {text}" for text in problems], DataError, headline="this cannot be measured:")

    def _records(self, source: str, kind: str) -> RecordSet:
        """The rows as `kind`, by the recipe's template where it fits them."""
        from tunesmith.stages.prepare import locate

        data, path = self.recipe.data, locate(source, self.folder)
        if kind == "sft" and (template := data.asked_by()) is not None:
            try:
                return read_records(path, stage=kind, template=template, on_bad_row=data.on_bad_row)
            except DataError:
                pass  # an earlier task asks in its own way
        return read_records(path, stage=kind, on_bad_row=data.on_bad_row)

    def _encoded(self, records: Any, kind: str) -> SampleStore:
        from tunesmith.stages.prepare import cache_folder

        data, context = self.recipe.data, self.context_tokens or 1024
        is_text = kind in ("pretrain", "mlm")
        longest = min(context, TEXT_TOKENS) if is_text else data.max_length or context
        encoder = Encoder(
            self.tokenizer, kind, longest, "split" if is_text else "truncate_left",
            label_names=self.labels, multi_label=data.multi_label,
        )  # fmt: skip
        return build_store(records, encoder, cache_folder(), say=self.say)


def fingerprints(probes: Mapping[str, Probe], replay: Probe | None) -> dict[str, str]:
    """What a resumed run must share with the one that began."""
    found = {f"forget.probe {name}": probe.store.fingerprint for name, probe in probes.items()}
    return found if replay is None else {**found, "forget.replay samples": replay.store.fingerprint}
