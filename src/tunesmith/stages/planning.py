"""The plan of a run before a weight is loaded: bytes by line, operations, time, money; other methods and devices."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.model.load import base_record, load_tokenizer
from tunesmith.model.trainable import TrainableSpec
from tunesmith.plan.devices import DEVICES, REACHED, Device, find_device
from tunesmith.plan.hardware import available_memory, choose_precision, matmul_rate, peak_memory_bytes
from tunesmith.plan.memory import MemoryPlan, plan_memory
from tunesmith.plan.shapes import StepShape, step_shape
from tunesmith.recipe import Recipe, Resolved
from tunesmith.stages.bases import base_path, settled_device
from tunesmith.stages.feature_cache import feature_bytes, stores_of
from tunesmith.stages.job import Inputs, Job, text_tokens, trainable_spec
from tunesmith.stages.load import Load, load_of
from tunesmith.stages.prepare import STAGES, Say, make_inputs, read_sets

OTHERS = (
    ("full", TrainableSpec("full")),
    ("last_layers=1", TrainableSpec("last_layers", layers=1)),
    ("head", TrainableSpec("head")),
    ("lora rank=16", TrainableSpec("lora", rank=16, alpha=32.0)),
    ("4bit rank=16", TrainableSpec("lora", rank=16, alpha=32.0, quantize="4bit")),
)

FAMILY_CODE = 40 << 20
"""Bytes that a process holds, beside a planning one, once it reads a base: the family's code and what that imports."""
FIRST_USE = {"classifier": 64 << 20}
ANY_FIRST_USE = 100 << 20
"""Bytes that it comes to hold once it trains, by the kind of its model: torch's libraries as far as they are used,
matrix products that are compiled, samples that are written. Measured, as the above (docs/log.md)."""
SCRATCH = 0.08
"""What products and pages half used hold beside a step's tensors, as a share of them."""


def plan(resolved: Resolved, *, on: str | None, price: float | None, say: Say) -> dict[str, Any]:
    """`{memory, fits, flops, seconds, methods, devices, ...}`; see docs/trust.md. Raises what preparing would raise."""
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
        text_tokens(recipe, record),
        folder=resolved.folder,
        say=_quiet,
    )
    load = load_of(recipe, tokenizer, inputs, device)
    on_cpu = target is None and device == "cpu"
    runtime = peak_memory_bytes() + FAMILY_CODE if on_cpu else 0
    classes = 1 if recipe.stage == "reward" else max(2, len(inputs.label_names))
    features = feature_bytes(recipe, base, inputs)

    def of(spec: TrainableSpec) -> tuple[StepShape, MemoryPlan]:
        shape = _shape(recipe, base, spec, load, bf16=bf16, classes=classes)
        return shape, plan_memory(
            shape, file_bytes=record["bytes"], runtime=runtime, optimizer=recipe.train.optimizer, on_cpu=on_cpu,
            first_use=_first_use(recipe, shape) if on_cpu else 0,
            features=features if on_cpu and spec.method == "head" else 0,
        )  # fmt: skip

    shape, memory = of(trainable_spec(recipe, resolved.folder))
    flops = _total_flops(shape, load, recipe, inputs)
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
        "devices": _devices(memory, flops),
    }


def peak_of(job: Job, file_bytes: int) -> dict[str, Any]:
    """`{peak, room, fits, seconds}` of a job whose model is loaded: what the process holds without it is left out, and
    the room is what there was before."""
    recipe, bf16 = job.recipe, job.precision == "bfloat16"
    load = load_of(recipe, job.tokenizer, job.inputs, job.device)
    classes = 1 if recipe.stage == "reward" else max(2, len(job.inputs.label_names))
    shape = _shape(recipe, job.base, trainable_spec(recipe, job.folder), load, bf16=bf16, classes=classes)
    memory = plan_memory(
        shape, file_bytes=file_bytes, runtime=0, optimizer=recipe.train.optimizer, on_cpu=job.device == "cpu",
        features=feature_bytes(recipe, job.base, job.inputs) if job.device == "cpu" else 0,
    )  # fmt: skip
    room = available_memory(job.device) + memory.weights
    flops = _total_flops(shape, load, recipe, job.inputs)
    rate = matmul_rate("bfloat16" if bf16 else "float32", size=1024) * REACHED
    return {"peak": memory.peak, "room": room, "fits": memory.peak <= room, "seconds": flops / rate}


def _shape(recipe: Recipe, base: str, spec: TrainableSpec, load: Load, *, bf16: bool, classes: int) -> StepShape:
    """The step of the largest micro-batch, tuned by `spec`."""
    return step_shape(
        base, STAGES[recipe.stage].KIND, spec, load.lengths, load.num_targets, bf16=bf16, classes=classes,
        adam=recipe.train.optimizer == "adamw",
    )  # fmt: skip


def _first_use(recipe: Recipe, shape: StepShape) -> int:
    return FIRST_USE.get(STAGES[recipe.stage].KIND, ANY_FIRST_USE) + round(SCRATCH * shape.step_bytes)


def _quiet(_: str) -> None:
    return None


def _target(on: str | None) -> Device | None:
    if on is None:
        return None
    found = find_device(on)
    if found is None:
        raise RecipeError(f"there is no device `{on}` in the table; take {', '.join(d.name for d in DEVICES)}")
    return found


def _total_flops(shape: StepShape, load: Load, recipe: Recipe, inputs: Inputs) -> float:
    """Of all steps; with features that are kept, of one forward over each row and of the head's steps."""
    if recipe.tune.cache_features:
        rows = load.num_steps * load.tokens_per_step / max(1.0, float(inputs.train.lengths.mean()))
        tokens = sum(store.num_tokens for store in stores_of(inputs))
        return shape.forward_flops * tokens / max(1, load.num_tokens) + 6.0 * shape.trainable * rows
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


def _devices(memory: MemoryPlan, flops: float) -> list[dict[str, Any]]:
    needed = memory.peak - memory.runtime - memory.first_use - memory.features
    rows = []
    for device in DEVICES:
        seconds = flops / (device.rate * REACHED)
        rows.append(
            {"device": device.name, "memory": device.memory, "fits": needed <= device.memory, "seconds": seconds}
        )
    return rows
