"""Completions of a file of prompts by a run or by any model: for ranking, for judging, for looking at.

A row of the result is `{prompt, completions, ended, sampled}`, which `rank` reads; with `ranks` added, stage reward.
Prompts are sampled in parts of fixed size and every part draws from its own seed, so the same prompts give the same
completions wherever the work was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.encode import prompt_ids
from tunesmith.data.kinds import Message, Prompt
from tunesmith.data.records import read_records
from tunesmith.data.rows import Row
from tunesmith.data.templates import get_template
from tunesmith.errors import DataError, ModelError, RunError, several
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import base_record, load_backbone, load_tokenizer
from tunesmith.plan.hardware import choose_device, choose_precision
from tunesmith.recipe import Recipe, load_resolved
from tunesmith.rollout.sampler import Sampler, stream_seed
from tunesmith.stages import from_run
from tunesmith.stages.bases import base_path
from tunesmith.stages.finals import open_tuned, wrap
from tunesmith.stages.job import text_tokens
from tunesmith.stages.jsonl import append_row, whole_rows
from tunesmith.stages.using import find_run, settled

Say = Callable[[str], None]
PART = 16


@dataclass(frozen=True, slots=True)
class Draws:
    """How completions are drawn; `num` of them for each prompt."""

    num: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that completes prompts. `content` names its weights; `recipe` is the run's, None for a bare model."""

    name: str
    content: str
    model: LanguageModel
    tokenizer: Any
    recipe: Recipe | None
    template: str | None
    folder: Path | None
    context_tokens: int | None

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(next(self.model.parameters()).device)


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt: its turns, its other fields, the row it came from."""

    record: Prompt
    values: Mapping[str, object]

    @property
    def text(self) -> str:
        """The turns as plain text."""
        return "\n".join(message.content for message in self.record.messages)

    @property
    def as_json(self) -> Any:
        """One user turn as text, more as messages: what `rank` and stage reward read as a prompt."""
        turns = self.record.messages
        if len(turns) == 1 and turns[0].role == "user":
            return turns[0].content
        return [{"role": turn.role, "content": turn.content} for turn in turns]


def open_speaker(target: str | Path) -> Speaker:
    """The run of that name or folder, else the model folder or hub id. `ModelError` when it does not write text."""
    run = find_run(target)
    if run is None:
        return _open_base(str(target))
    recipe = load_resolved(run.file("recipe"))
    device, precision = settled(run, recipe)
    tuned = open_tuned(run, device=device, precision=precision)
    if not isinstance(tuned.model, LanguageModel) or recipe.stage == "mlm":
        raise ModelError(f"{run.path} is a run of stage {recipe.stage}, whose model does not write text; name one of "
                         "pretrain, sft, dpo, ppo or grpo")  # fmt: skip
    context = text_tokens(recipe, base_record(tuned.base, trust=recipe.trust_remote_code))
    found = from_run.content(run)
    return Speaker(str(target), found, tuned.model, tuned.tokenizer, recipe, tuned.template, run.path, context)


def _open_base(target: str) -> Speaker:
    base = base_path(target, Path.cwd())
    device = choose_device("auto")
    model = wrap("sft", load_backbone(base, "causal"), choose_precision("auto", device)).to(device).eval()
    assert isinstance(model, LanguageModel), "stage sft is a language model"
    record = base_record(base)
    return Speaker(target, record["hash"], model, load_tokenizer(base), None, None, None, record["context_tokens"])


def read_prompts(spec: str, *, limit: int | None = None) -> list[Asked]:
    """The prompts of a data file, in its order; `DataError` for what cannot be read as prompts."""
    found = []
    for row, record in read_records(spec, stage="ppo").rows():
        assert isinstance(record, Prompt) and isinstance(row, Row), "stage ppo reads prompts"
        found.append(Asked(record, row.values))
        if limit is not None and len(found) == limit:
            break
    return found


def encode(speaker: Speaker, asked: Asked) -> list[int]:
    """The prompt as the speaker's training asked it: through its template, its chat template, or as it stands."""
    recipe = speaker.recipe
    if recipe is not None and (recipe.stage == "pretrain" or (recipe.sampling and recipe.sampling.continue_prompt)):
        return prompt_ids(asked.text, speaker.tokenizer, raw=True)
    if speaker.template is not None:
        return prompt_ids(through_template(speaker.template, asked), speaker.tokenizer, plain=True)
    return prompt_ids(list(asked.record.messages), speaker.tokenizer)


def through_template(template_text: str, asked: Asked) -> list[Message]:
    """The row in the run's template: by its own columns where they are there, else the whole prompt in the only one."""
    template = get_template(template_text)
    wanted = [name for name in template.columns if "{" + name + "}" in template.prompt]
    values = asked.values if all(name in asked.values for name in wanted) else None
    if values is None and len(wanted) == 1:
        values = {wanted[0]: asked.text}
    if values is None:
        have = ", ".join(map(str, asked.values))
        raise DataError(
            f"{asked.record.origin}: the run's template asks for {', '.join(wanted)}, and this row has {have}; "
            "give prompts with those columns"
        )
    return [Message("user", template.render(values, completion=False)[0])]


def complete(
    speaker: Speaker, prompts: Sequence[Asked], draws: Draws, *, first: int = 0
) -> Iterator[tuple[int, list[str], list[bool]]]:
    """(index, completions, whether each ended by itself) of every prompt from number `first` on, in order."""
    ids = [encode(speaker, asked) for asked in prompts]
    _refuse_long(speaker, prompts, ids)
    sampler = Sampler(speaker.model, speaker.tokenizer)
    for start in range(first - first % PART, len(prompts), PART):
        part = ids[start : start + PART]
        rollouts = sampler.sample(
            part, num_per_prompt=draws.num, temperature=draws.temperature, top_p=draws.top_p,
            max_tokens=draws.max_tokens, seed=stream_seed(draws.seed, start // PART, 0),
        )  # fmt: skip
        texts = [speaker.tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
        for i in range(len(part)):
            mine = slice(i * draws.num, (i + 1) * draws.num)
            if start + i >= first:
                yield start + i, texts[mine], [rollout.ended for rollout in rollouts[mine]]


def _refuse_long(speaker: Speaker, prompts: Sequence[Asked], ids: Sequence[Sequence[int]]) -> None:
    room = speaker.context_tokens
    long = [
        f"{asked.record.origin}: {len(row)} tokens"
        for asked, row in zip(prompts, ids, strict=True)
        if room is not None and len(row) >= room
    ]
    if long:
        shown = long[:20] + ([f"and {len(long) - 20} more"] if len(long) > 20 else [])
        headline = f"{speaker.name} takes {room} tokens in all, prompt and completion; shorten these prompts:"
        raise several(shown, DataError, headline=headline)


def sample(
    target: str | Path, prompts: str, draws: Draws, *, to: Path | None, limit: int | None, say: Say
) -> dict[str, Any]:
    """Sample and write (or return) one row a prompt. What `to` holds already, drawn the same way, is kept.

    `RunError` when it holds anything else.
    """
    asked = read_prompts(prompts, limit=limit)
    speaker = open_speaker(target)
    settings = {"model": speaker.name, "content": speaker.content, **asdict(draws)}
    done = 0 if to is None else _kept(to, asked, settings)
    say(f"{speaker.name}: {len(asked) - done:,} prompts, {draws.num} completions each")
    rows: list[dict[str, Any]] = []
    ended: list[bool] = []
    for index, texts, ends in complete(speaker, asked, draws, first=done):
        row = {"prompt": asked[index].as_json, "completions": texts, "ended": ends, "sampled": settings}
        ended += ends
        if to is None:
            rows.append(row)
        else:
            append_row(to, row)
    result: dict[str, Any] = {
        "model": speaker.name, "prompts": len(asked), "sampled": len(asked) - done, "num": draws.num,
        "share_ended": sum(ended) / len(ended) if ended else None,
    }  # fmt: skip
    return result | ({"rows": rows} if to is None else {"file": str(to)})


def _kept(to: Path, asked: Sequence[Asked], settings: Mapping[str, Any]) -> int:
    """How many rows stand there already."""
    rows = whole_rows(to)
    for number, row in enumerate(rows):
        if row.get("sampled") != dict(settings) or number >= len(asked) or row.get("prompt") != asked[number].as_json:
            raise RunError(
                f"{to}:{number + 1} was sampled from another prompt, another model or with other settings; "
                "it is left as it is: choose another name with --to"
            )
    return len(rows)
