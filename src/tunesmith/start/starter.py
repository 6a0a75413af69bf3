"""`tunesmith init`: a commented recipe, for a stage as it stands or for a data file that is looked at first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.data.rows import shown
from tunesmith.embedded import BASE
from tunesmith.errors import ModelError, RecipeError
from tunesmith.recipe import load_recipe
from tunesmith.recipe_chain import load_chain
from tunesmith.recipe_rules import default_rate
from tunesmith.recipe_yaml import parse_yaml
from tunesmith.start.looking import Look, look
from tunesmith.start.written import quoted, recipe_text, write_new

Say = Callable[[str], None]
_COMMENT_AT = 40
_LONGEST_ANSWER = 256
_SMALL_RATE = {"classify": 5e-3, "sft": 3e-3, "pretrain": 1e-3, "reward": 2e-3, "dpo": 1e-3, "ppo": 1e-3, "grpo": 1e-3}
"""Learning rates of LoRA on the embedded base, which is far smaller than what the usual rates are made for."""
_WHAT = {
    "pretrain": "More of the same reading: the model goes on predicting the next token of your text.",
    "mlm": "Masked reading: the model goes on filling holes in your text.",
    "sft": "Answering: the model sees prompts with their answers and is trained on the answers alone.",
    "classify": "Which label fits a text?",
    "reward": "A judge of answers: of two answers to one prompt, the better one gets the higher score.",
    "dpo": "Preferences: answers that were chosen become likelier than those that were rejected.",
    "ppo": "Learning from rewards (PPO): the model answers prompts, and what earns more becomes likelier.",
    "grpo": "Learning from rewards (GRPO): completions of one prompt are compared with each other.",
}


@dataclass(frozen=True, slots=True)
class _Base:
    """The model to start from, as far as it can be known here: a hub id without a network is taken on trust."""

    name: str
    tokenizer: Any
    context_tokens: int | None
    is_masked: bool
    is_named: bool


def write(stage: str | None, *, data: str | None, base: str | None, to: str | Path | None, say: Say) -> dict[str, Any]:
    """Write the recipe to a new file; `{recipe, stage, notes, next}`. `RecipeError` for a file that is there already,
    `DataError` for data that fits no stage."""
    notes: tuple[str, ...] = ()
    if data is None and stage != "mlm":
        chosen = stage or "classify"
        text, target = recipe_text(chosen, base), _target(to, chosen)
    else:
        if data is None:
            raise RecipeError("`tunesmith init mlm` needs your text: --data FILE, and --base BASE with a masked model")
        if stage == "chain":
            raise RecipeError("the stages of a chain read data of different kinds: write one with `tunesmith init "
                              "chain`, and name your files in it")  # fmt: skip
        model = _open(base)
        seen = _look(data, stage, model)
        chosen, target = seen.stage, _target(to, seen.stage)
        text = recipe_for(seen, _path(data, target), model)
        notes = (*seen.findings, *seen.bad[:20])
    _refuse_wrong(text, chosen)
    write_new(target, text)
    for note in notes:
        say(note)
    return {"recipe": str(target), "stage": chosen, "notes": list(notes),
            "next": [f"tunesmith check {target}", f"tunesmith train {target}"]}  # fmt: skip


def _target(to: str | Path | None, stage: str) -> Path:
    path = Path(f"{stage}.yaml" if to is None else to).expanduser()
    return path / f"{stage}.yaml" if path.is_dir() else path


def _path(data: str, target: Path) -> str:
    """The data as a recipe in `target`'s folder names it: files relative to it, everything else as it is."""
    path = Path(data).expanduser()
    if path.is_absolute() or not path.exists():
        return data if path.is_absolute() or not any(c in data for c in "*?[") else str(Path(data).absolute())
    return os.path.relpath(path.resolve(), target.resolve().parent)


def _open(name: str | None) -> _Base:
    """Tokenizer and context of the base; of a hub id that cannot be reached, nothing."""
    from tunesmith.model.load import base_record, load_config, load_tokenizer

    base = name or BASE
    try:
        built = (load_config(base).architectures or [""])[0]
        return _Base(base, load_tokenizer(base), base_record(base)["context_tokens"], "MaskedLM" in built, bool(name))
    except ModelError:
        if Path(base).expanduser().exists() or name is None:
            raise
        return _Base(base, None, None, False, True)


def _look(data: str, stage: str | None, model: _Base) -> Look:
    if stage == "mlm" and not model.is_named:
        raise RecipeError("stage mlm needs a masked base, and none comes with the program; name one with --base")
    seen = look(data, stage, model.tokenizer)
    return look(data, "mlm", model.tokenizer) if model.is_masked and seen.stage == "pretrain" and not stage else seen


def _refuse_wrong(text: str, stage: str) -> None:
    """Nothing is written that would not load."""
    values, _ = parse_yaml(text, "the new recipe")
    if stage == "chain":
        load_chain(values)
    else:
        load_recipe(values)


def recipe_for(seen: Look, data: str, model: _Base) -> str:
    """The recipe's text: what was found stands in the values, why in the comments."""
    lines = [f"# {_WHAT[seen.stage]}", *_found(seen), f"stage: {seen.stage}"]
    why = "the tiny one that comes with the program, to try this with; for real work, a folder or hub id of yours"
    lines += [_line(f"base: {quoted(model.name)}", "" if model.is_named else why)]
    for section in (_data(seen, data, model), _tune(seen), _train(seen, model), _own(seen), _evaluate(seen)):
        lines += section
    return "\n".join(lines) + "\n"


def _line(text: str, comment: str = "") -> str:
    return f"{text:{_COMMENT_AT - 2}}  # {comment}" if comment else text


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False).strip()


def _found(seen: Look) -> Iterator[str]:
    if seen.all_columns:
        names = ", ".join(shown(name, 40) for name in seen.all_columns[:12])
        yield f"# Found {seen.num_rows:,} rows, format {seen.format}; columns: {names}"
    for number, text in enumerate(seen.findings[:5]):
        yield ("# Look at this first: " if number == 0 else "# and: ") + shown(text, 200)


def _data(seen: Look, data: str, model: _Base) -> list[str]:
    lines = ["data:", f"  train: {quoted(data)}"]
    if seen.guessed or any(role != column for role, column in seen.columns.items()):
        lines.append(_line(f"  columns: {_flow(dict(seen.columns))}", seen.guessed))
    lines += _split(seen) + _length(seen, model)
    if seen.bad:
        first = shown(seen.bad[0].split("\n")[0], 120)
        lines.append(_line("  on_bad_row: skip", f"{len(seen.bad):,} broken, the first: {first}"))
    if seen.multi_label:
        lines.append(_line("  multi_label: true", "a row may have several labels, or none"))
    return lines


def _split(seen: Look) -> list[str]:
    """Enough held-out rows for an interval that means something, without starving the training."""
    if seen.num_rows < 10:
        return ["  # eval: FILE  # rows to measure on; with so few of them, nothing is held out here"]
    shares = {"eval": 0.2} if seen.num_rows < 200 else {"eval": 0.1, "test": 0.1}
    return [_line(f"  split: {_flow(shares)}", "held out, the same input never on both sides; or name eval: FILE")]


def _length(seen: Look, model: _Base) -> list[str]:
    if not seen.lengths or model.tokenizer is None:
        return []
    longest, half = max(seen.lengths), sorted(seen.lengths)[len(seen.lengths) // 2]
    what = "prompt" if seen.stage in ("ppo", "grpo") else "row"
    room = model.context_tokens or 1024
    if seen.stage in ("ppo", "grpo"):
        room -= _answer_tokens(seen)
    if longest <= room:
        wide = min(room, -(-max(longest, 8) // 16) * 16)
        return [
            _line(f"  max_length: {wide}", f"tokens; the longest {what} has {longest:,}, half have at most {half:,}")
        ]
    kept = f"{seen.share_within(room):.1%} of the rows fit; the longest has {longest:,} tokens"
    policy = {"pretrain": "split", "mlm": "split", "classify": "truncate_left"}.get(seen.stage, "drop")
    return [_line(f"  max_length: {room}", f"the base takes no more; {kept}"), f"  on_too_long: {policy}"]


def _tune(seen: Look) -> list[str]:
    return ["tune:", _line("  method: lora", "or full, last_layers, bias" + (", head" if seen.labels else "")),
            _line("  rank: 8", "size of the update: more learns more, and forgets more")]  # fmt: skip


def _train(seen: Look, model: _Base) -> list[str]:
    small = model.name == BASE
    rate = _SMALL_RATE.get(seen.stage, 1e-3) if small else default_rate(seen.stage, "lora")
    why = "high, because the base is tiny" if small else "the usual one for lora"
    lines = ["train:"]
    if seen.stage in ("ppo", "grpo"):
        lines.append(_line("  steps: 40", "updates of the model"))
    else:
        epochs = 5 if seen.num_rows < 1000 else (3 if seen.num_rows < 20_000 else 1)
        epochs = min(epochs, 3) if seen.stage in ("reward", "dpo", "pretrain") else epochs
        lines.append(_line(f"  epochs: {epochs}", "passes over the rows; the best of them by held-out rows is kept"
                           if seen.num_rows >= 10 else "passes over the rows"))  # fmt: skip
        lines.append(f"  batch_examples: {16 if seen.num_rows >= 200 else 8}")
    return [*lines, _line(f"  learning_rate: {rate:.0e}".replace("e-0", "e-"), why)]


def _answer_tokens(seen: Look) -> int:
    """Room for nearly all answers as long as those in the data."""
    longest = sorted(seen.answers)[int(0.95 * len(seen.answers))] if any(seen.answers) else 0
    return min(_LONGEST_ANSWER, max(16, -(-(longest + 2) // 16) * 16)) if longest else 64


def _own(seen: Look) -> list[str]:
    """What reinforcement learning needs beside prompts."""
    if seen.stage not in ("ppo", "grpo"):
        return []
    lines = ["reward:"]
    if any(seen.answers):
        lines.append(_line("  exact: true", "a point for the answer that the row names"))
    else:
        lines.append(_line("  length: {target: 24}", "a stand-in: name your own below"))
    lines += ["  # function: rewards.py:reward       # reward(prompts, completions, **columns) -> list of numbers",
              "  # run: RUN                          # a finished run of stage reward",
              _line(f"sampling: {{max_tokens: {_answer_tokens(seen)}}}", "most tokens of a completion")]  # fmt: skip
    rounds = "{rollouts: 64, kl_coef: 0.02}" if seen.stage == "ppo" else "{prompts: 8, group: 8, kl_coef: 0.04}"
    return [*lines, _line(f"{seen.stage}: {rounds}", "a round of completions; the price of leaving the base")]


def _evaluate(seen: Look) -> list[str]:
    if seen.stage == "classify":
        named = ", ".join(f"{shown(name, 30)} ({count:,})" for name, count in list(seen.labels.items())[:12])
        return [f"# {len(seen.labels)} labels: {named}", '# evaluate: {sentences: ["a text of yours"]}']
    if seen.stage != "sft" or seen.num_rows < 10:
        return []
    return ["evaluate:", _line(f"  generate: {{max_tokens: {_answer_tokens(seen)}}}",
                               "completes held-out prompts and compares them with the answers")]  # fmt: skip
