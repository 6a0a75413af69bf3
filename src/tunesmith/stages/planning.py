"""The plan of a run before a weight is loaded: bytes by line, operations, time, money; other methods and devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.batch import Batch
from tunesmith.data.prompts import PromptSet
from tunesmith.errors import RecipeError
from tunesmith.model.load import base_record, load_tokenizer
from tunesmith.model.trainable import Trainable, TrainableSpec
from tunesmith.plan.devices import DEVICES, REACHED, Device, find_device
from tunesmith.plan.hardware import available_memory, choose_precision, matmul_rate, peak_memory_bytes
from tunesmith.plan.memory import MemoryPlan, plan_memory
from tunesmith.plan.shapes import StepShape, step_shape
from tunesmith.recipe import Recipe, Resolved
from tunesmith.stages.job import Inputs, Job, make_source, trainable_spec
from tunesmith.stages.online import Rounds
from tunesmith.stages.prepare import STAGES, Say, base_path, make_inputs, read_sets, settled_device

LOOKED_AT = 100
"""Steps whose micro-batches are looked at for the largest."""
OTHERS = (
    ("full", TrainableSpec("full")),
    ("last_layers=1", TrainableSpec("last_layers", layers=1)),
    ("head", TrainableSpec("head")),
    ("lora rank=16", TrainableSpec("lora", rank=16, alpha=32.0)),
    ("4bit rank=16", TrainableSpec("lora", rank=16, alpha=32.0, quantize="4bit")),
)


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch of a run, and what the whole run computes."""

    lengths: tuple[int, ...]
    num_targets: int
    num_steps: int
    tokens_per_step: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return sum(self.lengths)


def plan(resolved: Resolved, *, on: str | None, price: float | None, say: Say) -> dict[str, Any]:
    """`{memory, fits, flops, seconds, methods, devices, ...}`; see docs/plan.md. Raises what preparing would raise."""
    recipe = resolved.recipe
    target = _target(on)
    device = settled_device(recipe.device)
    bf16 = target is not None or choose_precision(recipe.precision, device) == "bfloat16"
    base = base_path(recipe.base, resolved.folder)
    record = base_record(base, trust=recipe.trust_remote_code)
    tokenizer = load_tokenizer(base, trust=recipe.trust_remote_code)
    inputs = make_inputs(
        recipe,
        read_sets(recipe, resolved.folder),
        tokenizer,
        record["context_tokens"],
        folder=resolved.folder,
        say=_quiet,
    )
    load = _load(recipe, tokenizer, inputs, device)
    runtime = 0 if target is not None or device != "cpu" else peak_memory_bytes()
    classes = 1 if recipe.stage == "reward" else max(2, len(inputs.label_names))

    def of(spec: TrainableSpec) -> tuple[StepShape, MemoryPlan]:
        kind = STAGES[recipe.stage].KIND
        shape = step_shape(base, kind, spec, load.lengths, load.num_targets, bf16=bf16, classes=classes)
        return shape, plan_memory(
            shape, num_tokens=load.num_tokens, num_targets=load.num_targets, file_bytes=record["bytes"],
            runtime=runtime, optimizer=recipe.train.optimizer, bf16=bf16,
        )  # fmt: skip

    shape, memory = of(trainable_spec(recipe, resolved.folder))
    flops = _total_flops(shape, load)
    rate = target.rate * REACHED if target else matmul_rate("bfloat16" if bf16 else "float32", size=1024) * REACHED
    room = target.memory if target else available_memory(device)
    return {
        "stage": recipe.stage,
        "base": record["name"],
        "on": target.name if target else f"this machine ({device})",
        "parameters": shape.parameters,
        "trainable_parameters": shape.trainable,
        "steps": load.num_steps,
        "tokens": round(load.num_steps * load.tokens_per_step),
        "largest_micro_batch": {"tokens": load.num_tokens, "segments": len(load.lengths), "targets": load.num_targets},
        "memory": memory.as_json(),
        "room": room,
        "fits": memory.peak <= room,
        "advice": [] if memory.peak <= room else _advice(memory, recipe),
        "flops": flops,
        "seconds": flops / rate,
        "price": None if price is None else round(flops / rate / 3600 * price, 4),
        "methods": _methods(recipe, of, room),
        "devices": _devices(memory, flops, runtime),
    }


def _quiet(_: str) -> None:
    return None


def _target(on: str | None) -> Device | None:
    if on is None:
        return None
    found = find_device(on)
    if found is None:
        raise RecipeError(f"there is no device `{on}` in the table; take {', '.join(d.name for d in DEVICES)}")
    return found


def _load(recipe: Recipe, tokenizer: Any, inputs: Inputs, device: str) -> Load:
    if isinstance(inputs.train, PromptSet):
        return _online_load(recipe, inputs.train)
    nothing = Trainable("none", (), 0, 0, 0, (), ())
    source = make_source(Job(recipe, tokenizer, inputs, None, nothing, device, "float32"))
    steps = range(1, min(source.num_steps, LOOKED_AT) + 1)
    batches: list[Batch] = []
    tokens = 0
    for step in steps:
        made = source.step_batches(step)
        tokens += sum(batch.num_tokens for batch in made)
        batches = [max([*batches, *made], key=lambda b: b.num_tokens)]
    largest = batches[0]
    return Load(largest.lengths, int((largest.weights > 0).sum()), source.num_steps, tokens / len(steps))


def _online_load(recipe: Recipe, prompts: PromptSet) -> Load:
    """Every rollout at its longest; a round's rollouts in micro-batches."""
    assert recipe.sampling is not None, "the recipe is resolved"
    rounds = _rounds(recipe)
    answer = recipe.sampling.max_tokens
    longest = int(prompts.lengths.max()) + answer
    rows = max(1, rounds.prompts * rounds.num_per_prompt // rounds.minibatches)
    fit = max(1, min(rows, recipe.train.micro_batch_tokens // longest))
    per_step = rows * (float(prompts.lengths.mean()) + answer)
    steps = recipe.train.steps or round((recipe.train.epochs or 1) * len(prompts) / rounds.prompts) * (
        rounds.epochs * rounds.minibatches
    )
    return Load((longest,) * fit, answer * fit, max(1, steps), per_step)


def _rounds(recipe: Recipe) -> Rounds:
    if recipe.grpo is not None:
        spec = recipe.grpo
        return Rounds(spec.prompts, spec.group, spec.epochs, spec.minibatches)
    assert recipe.ppo is not None, "the recipe is resolved"
    per_prompt = 1 if recipe.sampling is None else recipe.sampling.num_per_prompt or 1
    return Rounds(recipe.ppo.rollouts // per_prompt, per_prompt, recipe.ppo.epochs, recipe.ppo.minibatches)


def _total_flops(shape: StepShape, load: Load) -> float:
    share = load.num_steps * load.tokens_per_step / max(1, load.num_tokens)
    return float(shape.forward_flops + shape.backward_flops) * share


def _advice(memory: MemoryPlan, recipe: Recipe) -> list[str]:
    """What to change, the largest line first."""
    quantized = recipe.tune.quantize not in (None, "none")
    lines = {
        "activations": "lower train.micro_batch_tokens (the same result), or set train.checkpoint_activations",
        "optimizer": "train fewer parameters: tune.method lora, or last_layers",
        "weights": "take a smaller base" if quantized else "hold the base in 4 bits (tune.quantize), or take a smaller",
        "head": "lower train.micro_batch_tokens",
    }
    sizes = memory.as_json()
    order = sorted(lines, key=lambda name: -sizes[name])
    return [f"{name} take {sizes[name] / 1e9:.1f} GB: {lines[name]}" for name in order[:2]]


def _methods(recipe: Recipe, of: Any, room: int) -> list[dict[str, Any]]:
    rows = []
    for name, spec in OTHERS:
        if spec.method == "head" and recipe.stage != "classify":
            continue
        shape, memory = of(spec)
        rows.append({
            "method": name, "trainable_parameters": shape.trainable, "states": memory.states,
            "activations": memory.activations, "peak": memory.peak, "fits": memory.peak <= room,
        })  # fmt: skip
    return rows


def _devices(memory: MemoryPlan, flops: float, runtime: int) -> list[dict[str, Any]]:
    needed = memory.peak - runtime
    rows = []
    for device in DEVICES:
        seconds = flops / (device.rate * REACHED)
        rows.append(
            {"device": device.name, "memory": device.memory, "fits": needed <= device.memory, "seconds": seconds}
        )
    return rows
