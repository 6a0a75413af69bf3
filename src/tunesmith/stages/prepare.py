"""From a recipe to a job: read, check and encode the data, load the base, decide what trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tunesmith.data.check import Finding, check_records
from tunesmith.data.encode import Encoder
from tunesmith.data.naming import place, short_names, shortened
from tunesmith.data.prompts import PromptSet, encode_prompts
from tunesmith.data.records import Labelled, Record, Text, read_records
from tunesmith.data.store import SampleStore, build_store
from tunesmith.errors import DataError, RecipeError, several
from tunesmith.model.folder import resolve
from tunesmith.model.load import base_record, load_backbone, load_tokenizer, stored_dtype
from tunesmith.model.packing import recompute_activations
from tunesmith.model.trainable import Trainable, experts_note, make_trainable
from tunesmith.plan.hardware import choose_precision
from tunesmith.recipe import Recipe
from tunesmith.recipe_metrics import direction, metric_name, named
from tunesmith.stages import beforehand, classify, dpo, grpo, mlm, ppo, pretrain, reward, sft
from tunesmith.stages.bases import base_path, run_origin, settled_device
from tunesmith.stages.job import Inputs, Job, text_tokens, trainable_spec, virtual_tokens
from tunesmith.stages.load import NOTHING
from tunesmith.stages.own_metrics import own_metrics
from tunesmith.stages.probes import Reader
from tunesmith.stages.sets import Records, Sets, bad_rows, left_out, locate, narrowings, read_sets

STAGES: dict[str, ModuleType] = {
    "pretrain": pretrain, "mlm": mlm, "sft": sft, "classify": classify, "reward": reward, "dpo": dpo, "ppo": ppo,
    "grpo": grpo,
}  # fmt: skip
ONLINE = ("ppo", "grpo")
"""Stages whose rows are prompts alone."""
Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where encoded samples are kept: `TUNESMITH_CACHE`, or `~/.cache/tunesmith`."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def labels_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Every label that stands in the records, numbers in their order, else alphabetically."""
    found: set[str] = set()
    for record in records:
        if isinstance(record, Labelled):
            found.update([record.label] if isinstance(record.label, str) else record.label)
    return tuple(sorted(found, key=lambda name: (not _is_number(name), int(name) if _is_number(name) else 0, name)))


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def make_inputs(
    recipe: Recipe, sets: Sets, tokenizer: Any, context_tokens: int | None, *, folder: Path, say: Say
) -> Inputs:
    """Check the records, then encode them; what was noticed is said and kept. Paths begin in `folder`.

    What is kept, the origins of the samples too, names files shortly: it stands in pages that are passed on.
    """
    labels = label_names(recipe, sets) if recipe.stage == "classify" else ()
    noticed = look_at(recipe, sets, marks=special_texts(tokenizer))
    findings = [*map(str, noticed), *left_out(sets), *narrowings(sets)]
    for finding in findings:
        say(finding)
    encoder = make_encoder(recipe, tokenizer, labels, context_tokens)
    try:
        stores = {
            name: None if records is None else _encode(records, encoder, name, recipe, context_tokens, say=say)
            for name, records in (("training", sets.train), ("held-out", sets.eval), ("test", sets.test))
        }
    except DataError as error:
        raise beforehand.joined(error, noticed, recipe) from None
    called = short_names([name for s in (sets.train, sets.eval, sets.test) if s is not None for name in s.files])
    train, held_out, test = (store and store.renamed(called) for store in stores.values())
    read = Reader(recipe, folder, tokenizer, labels, context_tokens, say)
    notes = (
        *(shortened(finding, called) for finding in findings),
        *(f"{name}: {text}" for name, s in stores.items() if s is not None for text in tally(s)),
    )
    return Inputs(
        train,
        held_out,
        test if recipe.evaluate.test else None,
        probe(recipe, folder, tokenizer, context_tokens),
        read.probes(),
        read.replay(),
        labels,
        notes,
        tuple({**row, "origin": place(row["origin"], called)} for row in bad_rows(sets)),
        findings=tuple(noticed),
    )


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens as they would be written in a text."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *added]))


def look_at(recipe: Recipe, sets: Sets, *, marks: Sequence[str] = ()) -> list[Finding]:
    """What is noticed about the records; labels that cannot be trained or measured are a `DataError`.

    What a gate of `plan.preflight` judges is only noticed.
    """
    findings = check_records(sets.train, sets.eval, marks=marks)
    if sets.test is not None:
        kept = ("overlap", "input_overlap", "ngram_overlap", "one_held_out_label", "unseen_labels")
        findings += [f for f in check_records(sets.train, sets.test) if f.kind in kept]
    wrong = [str(f) for f in findings if f.kind in ("one_label", "unseen_labels")]
    if wrong:
        raise several(wrong, DataError, headline=beforehand.HEADLINE)
    return findings


def label_names(recipe: Recipe, sets: Sets) -> tuple[str, ...]:
    """The classes, from the training rows alone; `DataError` for one class, or a held-out label never trained on."""
    names = labels_of(sets.train)
    if len(names) < 2:
        only = f"only the label {names[0]!r}" if names else "no label"
        raise DataError(f"the training rows have {only}; classification needs at least two")
    for what, records in (("held-out", sets.eval), ("test", sets.test)):
        unseen = sorted(set(labels_of(records)) - set(names)) if records is not None else []
        if unseen:
            raise DataError(f"{what} rows have labels that no training row has: {', '.join(unseen)}; the training rows "
                            f"have {', '.join(names[:20])}")  # fmt: skip
    return names


def make_encoder(recipe: Recipe, tokenizer: Any, labels: tuple[str, ...], context_tokens: int | None) -> Encoder:
    """How records become samples under this recipe."""
    data = recipe.data
    longest = data.max_length or context_tokens or 1024
    if context_tokens is not None and longest > context_tokens:
        beside = f" beside {virtual} virtual ones" if (virtual := virtual_tokens(recipe)) else ""
        raise RecipeError(
            f"data.max_length is {longest}, and {recipe.base} takes {context_tokens} tokens{beside}; lower it"
        )
    return Encoder(
        tokenizer, recipe.stage, longest, data.on_too_long,
        mask_prompt=not data.train_on_prompt, label_names=labels, multi_label=data.multi_label,
    )  # fmt: skip


def _encode(
    records: Records, encoder: Encoder, what: str, recipe: Recipe, context_tokens: int | None, *, say: Say
) -> SampleStore | PromptSet:
    store = store_of(records, encoder, recipe, context_tokens, say=say)
    if len(store) == 0:
        raise DataError(f"no {what} sample is left after encoding; look at data.on_too_long and data.max_length")
    say(f"{what}: {len(store):,} samples, {store.num_tokens:,} tokens")
    for text in tally(store):
        say(f"{what}: {text}")
    return store


def store_of(
    records: Records, encoder: Encoder, recipe: Recipe, context_tokens: int | None, *, say: Say
) -> SampleStore | PromptSet:
    """The records as the stage takes them: encoded samples, or prompts with their rows."""
    if recipe.stage in ONLINE:
        return _prompts(records, encoder, recipe, context_tokens)
    return build_store(records, encoder, cache_folder(), say=say)


def _prompts(records: Records, encoder: Encoder, recipe: Recipe, context_tokens: int | None) -> PromptSet:
    """Prompts that leave room for their completions in what the model takes."""
    assert recipe.sampling is not None, "the recipe is resolved"
    answer, longest = recipe.sampling.max_tokens, recipe.data.max_length or 1 << 20
    room = "data.max_length"
    if context_tokens is not None and context_tokens - answer < longest:
        longest = context_tokens - answer
        room = f"the model takes {context_tokens:,}, sampling.max_tokens is {answer:,}"
    if longest < 1:
        raise RecipeError(f"sampling.max_tokens is {answer} and {recipe.base} takes {context_tokens} tokens in all, "
                          "which leaves no room for a prompt; lower it")  # fmt: skip
    return encode_prompts(
        records, encoder.tokenizer, max_tokens=longest, room=room, on_too_long=recipe.data.on_too_long,
        fingerprint=records.fingerprint, raw=recipe.sampling.continue_prompt,
    )  # fmt: skip


def tally(store: SampleStore | PromptSet) -> list[str]:
    """What encoding cut or left out, in words."""
    return [f"{name.replace('_', ' ')}: {count:,}" for name, count in sorted(store.tally.items()) if count]


def probe(recipe: Recipe, folder: Path, tokenizer: Any, context_tokens: int | None) -> SampleStore | None:
    """General text outside the task, on which forgetting is measured; the built-in one unless the recipe names one."""
    if recipe.stage in ("classify", "mlm", "reward"):
        return None
    if recipe.evaluate.probe is not None:
        records: Records = read_records(locate(recipe.evaluate.probe, folder), stage="pretrain")
    else:
        records = built_in_probe()
    longest = min(context_tokens or 512, 512)
    return build_store(records, Encoder(tokenizer, "pretrain", longest, "split"), cache_folder())


def built_in_probe() -> Records:
    """The text on which forgetting is measured when the recipe names none."""
    return _BuiltInProbe()


class _BuiltInProbe:
    """Short paragraphs of general knowledge that come with the program."""

    fingerprint = "built-in probe 1"

    def __iter__(self) -> Any:
        text = resources.files("tunesmith.evaluate").joinpath("probe.txt").read_text(encoding="utf-8")
        for number, paragraph in enumerate(text.split("\n\n"), 1):
            yield Text(paragraph.strip(), f"probe.txt:{number}")


def prepare(
    recipe: Recipe, folder: Path, *, say: Say, device: str | None = None, precision: str | None = None
) -> tuple[Job, dict[str, Any]]:
    """(job, what the base is). Everything that can be refused is refused here, before the first step.

    `device` and `precision` are those of a run that goes on; without them the recipe and this machine decide.
    """
    goes_on = device is not None
    device = settled_device(device or recipe.device)
    precision = precision or choose_precision(recipe.precision, device)
    base = base_path(recipe.base, folder)
    record: dict[str, Any] = (
        base_record(base, trust=recipe.trust_remote_code) | {"name": recipe.base} | run_origin(base)
    )
    tokenizer = load_tokenizer(base, trust=recipe.trust_remote_code)
    sets = read_sets(recipe, folder)
    say(f"data: {sets.train.describe()}")
    for name in named(recipe.evaluate.metrics):
        say(direction(metric_name(name)))
    own = own_metrics(recipe.stage, recipe.evaluate.metrics, folder, (sets.eval, sets.test), beside=sets.train)
    inputs = make_inputs(recipe, sets, tokenizer, text_tokens(recipe, record), folder=folder, say=say)
    page = None
    if not goes_on:
        draft = Job(recipe, tokenizer, inputs, None, NOTHING, device, precision, base, folder)
        page = beforehand.look(draft, sets, record)
        beforehand.refuse(page)
    backbone, trainable, notes = _opened(recipe, base, inputs, folder, say)
    inputs = replace(inputs, notes=(*inputs.notes, *notes))
    made = Job(recipe, tokenizer, inputs, backbone, trainable, device, precision, base, folder, say=say, page=page)
    return replace(made, own=own), record


def _opened(
    recipe: Recipe, base: str, inputs: Inputs, folder: Path, say: Say
) -> tuple[Any, Trainable, tuple[str, ...]]:
    """The base with what trains freed or added, the count of it, and what a reader of the run should know."""
    backbone = load_model(recipe, base, inputs.label_names)
    trainable = make_trainable(backbone, trainable_spec(recipe, folder))
    if (packed := getattr(backbone, "tunesmith_packed", None)) is not None:
        say(packed.describe())
    if grown := getattr(backbone, "tunesmith_grown", 0):
        embedding = backbone.get_input_embeddings().weight
        learned = "" if embedding.requires_grad else "; they stay so unless tune.train_also names embeddings and head"
        say(f"{grown} new tokens: their embeddings begin as the mean of the others{learned}")
    if trainable.trainable == 0:
        raise RecipeError("nothing would train: no parameter requires a gradient; look at `tune`")
    say(trainable.describe())
    head_note = mlm.head_note(recipe.base, backbone, trainable.names) if recipe.stage == "mlm" else ""
    notes = tuple(note for note in (experts_note(backbone), head_note) if note)
    for note in notes:
        say(note)
    if recipe.train.checkpoint_activations:
        recompute_activations(backbone)
    return backbone, trainable, notes


def load_model(recipe: Recipe, base: str, label_names: tuple[str, ...]) -> Any:
    """The base as the stage needs it: with a language head, a masked one, or a new head for classes or for a score."""
    problem = "multi_label_classification" if recipe.data.multi_label else "single_label_classification"
    problems: dict[str, Any] = {"classify": problem, "reward": "regression"}
    names = reward.LABELS if recipe.stage == "reward" else label_names
    return load_backbone(
        base, STAGES[recipe.stage].KIND, dtype=_dtype_to_load(recipe, base), label_names=names or None,
        problem=problems.get(recipe.stage), seed=recipe.seed, trust=recipe.trust_remote_code,
    )  # fmt: skip


def _dtype_to_load(recipe: Recipe, base: str) -> torch.dtype:
    """fp32; what will be quantised stays until then as it is stored, so that it is never held at twice the size."""
    if recipe.tune.quantize in (None, "none"):
        return torch.float32
    stored = stored_dtype(resolve(base, trust=recipe.trust_remote_code))
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32
