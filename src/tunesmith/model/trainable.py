"""Which parameters learn: everything, the last blocks, the head, biases, LoRA beside linears, or a PEFT method."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from tunesmith.errors import ModelError, several
from tunesmith.model import adapters, lora, quantize, soft_prompt

METHODS = ("full", "last_layers", "head", "lora", "bias", "peft")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class TrainableSpec:
    """What the user asked for. `targets` are layer names or their endings, or `all-linear`.

    `train_also` names modules trained fully beside an adapter (embeddings, heads). `peft` is the configuration of
    another PEFT method, `peft_type` included. `adapter` is the folder of an adapter to go on from. `quantize` is in
    which bits the frozen linears beside a LoRA stand: `none`, `8bit` or `4bit`.
    """

    method: str = "full"
    layers: int = 1
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Sequence[str] | str = ALL_LINEAR
    init: str = "default"
    rank_stabilized: bool = False
    dora: bool = False
    train_also: Sequence[str] = ()
    peft: Mapping[str, Any] | None = None
    adapter: str | None = None
    quantize: str = "none"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trainable:
    """The parameters that learn, by name, and the counts; each parameter counted once, however many names it has.

    `lora_b` are the B matrices, for LoRA+ learning rates (Hayou et al. 2024, arXiv:2402.12354).
    """

    method: str
    names: tuple[str, ...]
    trainable: int
    total: int
    tensors: int
    lora_b: tuple[str, ...]
    groups: tuple[tuple[str, int], ...]

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / max(self.total, 1)

    def describe(self) -> str:
        """The table of what trains."""
        width = max([len(name) for name, _ in self.groups] + [9])
        rows = [f"{name:<{width}}  {size:>15,}" for name, size in self.groups]
        total = f"{'trainable':<{width}}  {self.trainable:>15,}  of {self.total:,} ({self.percent:.4f} %)"
        return "\n".join([f"method {self.method}: {self.tensors} tensors", *rows, total])


def make_trainable(backbone: Any, spec: TrainableSpec) -> Trainable:
    """Freeze everything, then free (or add) exactly what `spec` names. Raises ModelError when it does not fit."""
    if spec.method not in METHODS:
        raise ModelError(f"tune.method {spec.method!r} is not known: choose one of {', '.join(METHODS)}")
    if adapters.adapter_of(backbone) is not None:
        raise ModelError("this model already carries an adapter: take it off (adapters.remove) or load the base anew")
    also = _modules_named(backbone, spec.train_also)
    backbone.requires_grad_(False)
    if spec.quantize != "none":
        _quantize(backbone, spec, also)
    if spec.method in ("lora", "peft"):
        declared = _add_adapter(backbone, spec, also)
    else:
        declared = _free(backbone, _plain(backbone, spec) | _parameters(backbone, also))
    return _checked(backbone, spec.method, declared)


def _quantize(backbone: Any, spec: TrainableSpec, also: Sequence[str]) -> None:
    """Every linear that an adapter could stand beside, in few bits: not the head, nor what learns fully or is tied."""
    if spec.method != "lora":
        raise ModelError(f"tune.quantize freezes the linear layers, so it is for method lora, not {spec.method}")
    if spec.quantize not in quantize.BITS:
        raise ModelError(f"tune.quantize {spec.quantize!r} is not known: choose none, {' or '.join(quantize.BITS)}")
    whole = [*also, *(() if spec.adapter is None else adapters.whole_modules(backbone, Path(spec.adapter)))]
    names = [name for name in find_targets(backbone, ALL_LINEAR) if not any(_inside(name, module) for module in whole)]
    tied = _tied(backbone, names)
    kind = cast(quantize.Kind, spec.quantize)
    backbone.tunesmith_packed = quantize.quantize_linears(backbone, [n for n in names if n not in tied], kind)


def _checked(backbone: nn.Module, method: str, declared: set[str]) -> Trainable:
    """The counts, after proving that what requires a gradient is what was declared."""
    found = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if set(found) != declared:
        odd = sorted(set(found) ^ declared)
        raise AssertionError(f"what requires a gradient is not what was declared: {odd[:5]}")
    groups: dict[str, int] = {}
    for name, parameter in found.items():
        groups[_group(name)] = groups.get(_group(name), 0) + parameter.numel()
    return Trainable(
        method=method,
        names=tuple(found),
        trainable=sum(p.numel() for p in found.values()),
        total=quantize.num_parameters(backbone),
        tensors=len(found),
        lora_b=tuple(name for name in found if name.endswith("lora_B") or ".lora_B." in name),
        groups=tuple(groups.items()),
    )


def _group(name: str) -> str:
    """A parameter's name without its block number: `distilbert.transformer.layer.*.attention.q_lin.lora_A`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _free(backbone: nn.Module, names: set[str]) -> set[str]:
    for name, parameter in backbone.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    return names


def _plain(backbone: Any, spec: TrainableSpec) -> set[str]:
    """Names of the parameters of the base that learn."""
    if spec.method == "full":
        return {name for name, p in backbone.named_parameters() if p.is_floating_point()}
    head = head_modules(backbone)
    if spec.method == "head":
        if not head:
            raise ModelError(f"{type(backbone).__name__} has no head to train: choose last_layers or full")
        return _parameters(backbone, head)
    freed = _parameters(backbone, head) if is_classifier(backbone) else set()
    if spec.method == "bias":
        biases = {name for name, _ in backbone.named_parameters() if name.rpartition(".")[2] == "bias"}
        if not biases - freed:
            raise ModelError(f"{type(backbone).__name__} has no biases to train: choose lora, last_layers or full")
        return freed | biases
    name, blocks = find_blocks(backbone)
    if not 1 <= spec.layers <= len(blocks):
        raise ModelError(
            f"last_layers {spec.layers}: this base has {len(blocks)} layers ({name}), choose 1 to {len(blocks)}"
        )
    last = [f"{name}.{i}" for i in range(len(blocks) - spec.layers, len(blocks))]
    return freed | _parameters(backbone, last)


def _parameters(backbone: nn.Module, modules: Iterable[str]) -> set[str]:
    """Names, as `named_parameters` gives them, of all parameters in `modules`; a tied one under its first name."""
    inside = {id(p) for module in modules for p in backbone.get_submodule(module).parameters()}
    return {name for name, p in backbone.named_parameters() if id(p) in inside}


def find_blocks(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of transformer blocks, by structure: the ModuleList of like modules that holds most parameters."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(block) for block in module}) != 1:
            continue
        size = sum(p.numel() for p in module.parameters())
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise ModelError(f"{type(backbone).__name__} has no stack of layers that last_layers could count")
    return best[1], best[2]


def is_classifier(backbone: Any) -> bool:
    """True for a sequence classifier, whose head always learns."""
    return type(backbone).__name__.endswith("ForSequenceClassification")


def head_modules(backbone: Any) -> list[str]:
    """Names of the modules behind the body: classifier and pooler, or the language model's output head."""
    body = getattr(backbone, "base_model", backbone)
    if body is backbone:
        head = backbone.get_output_embeddings() if hasattr(backbone, "get_output_embeddings") else None
        return [name for name, module in backbone.named_modules() if module is head]
    names = [name for name, module in backbone.named_children() if module is not body]
    names = [name for name in names if any(True for _ in backbone.get_submodule(name).parameters())]
    if is_classifier(backbone) and isinstance(getattr(body, "pooler", None), nn.Module):
        names.insert(0, f"{backbone.base_model_prefix}.pooler")
    return names


def linear_names(backbone: Any) -> list[str]:
    """Names of every linear layer an adapter can stand beside."""
    return [name for name, module in backbone.named_modules() if lora.is_linear(module)]


def find_targets(backbone: Any, targets: Sequence[str] | str) -> list[str]:
    """Full names of the layers meant by `targets`. Raises ModelError with the model's real names for unknown ones."""
    names, head = linear_names(backbone), head_modules(backbone)
    in_head = {name for name in names if any(_inside(name, module) for module in head)}
    if targets == ALL_LINEAR or list(targets) == [ALL_LINEAR]:
        return [name for name in names if name not in in_head and not _gate(backbone.get_submodule(name))]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if is_classifier(backbone):
        names = [name for name in names if name not in in_head]
    matches = {target: [name for name in names if _inside_end(name, target)] for target in wanted}
    problems = [_unknown(target, names) for target, found in matches.items() if not found]
    if not wanted:
        problems = ["tune.targets is empty: name layers or write all-linear"]
    if problems:
        raise several(problems, ModelError)
    chosen = {name for found in matches.values() for name in found}
    _refuse_tied(backbone, chosen)
    return [name for name in names if name in chosen]


def experts_note(backbone: nn.Module) -> str:
    """Says how much an adapter on linear layers leaves out in a mixture of experts; empty where there are none."""
    named = [(name, p) for name, p in backbone.named_parameters() if "experts." in name and p.dim() == 3]
    size = sum(p.numel() for _, p in named if not p.requires_grad)
    if not size or not lora.lora_layers(backbone):
        return ""
    return (
        f"{size:,} parameters of experts are one tensor a layer and no linear layers: the adapter does not reach them "
        "and they stay as they are; full and last_layers train them"
    )


def _gate(module: nn.Module) -> bool:
    """A linear that answers with one number, as the gate of shared experts (Qwen2-MoE): no matrix to factorise."""
    return lora.matrix_shape(module)[0] == 1


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _inside_end(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _unknown(target: str, names: Sequence[str]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(target, endings, 1, 0.5)
    hint = f"; did you mean {near[0]}" if near else ""
    return f"target {target!r} matches no linear layer{hint}. This model has: {', '.join(endings)} (or all-linear)"


def _tied(backbone: Any, names: Iterable[str]) -> list[str]:
    """Those of the linears `names` whose weight is also another module's, as of an output head the embedding's."""
    owners: dict[int, int] = {}
    for _, parameter in backbone.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    own = {name: backbone.get_submodule(name)._parameters.get("weight") for name in names}
    return [name for name, weight in own.items() if owners.get(id(weight), 0) > 1]


def _refuse_tied(backbone: Any, chosen: Iterable[str]) -> None:
    """A linear whose weight is also the embedding cannot carry an adapter that merges."""
    tied = _tied(backbone, chosen)
    if tied:
        raise ModelError(f"{', '.join(tied)} shares its weight with another layer (a tied head): use train_also for it")


def _modules_named(backbone: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Modules that `train_also` means: by full name or ending; `embeddings` and `head` work for every family."""
    names = [name for name, module in backbone.named_modules() if name and any(True for _ in module.parameters())]
    found: list[str] = []
    problems = []
    for target in wanted:
        if target == "embeddings":
            matches = [n for n in names if backbone.get_submodule(n) is _embeddings(backbone)]
        elif target == "head" and "head" not in names:
            matches = head_modules(backbone)
        else:
            matches = [name for name in names if _inside_end(name, target)]
        if not matches:
            endings = list(dict.fromkeys(n.rpartition(".")[2] for n in names if not n.rpartition(".")[2].isdigit()))
            problems.append(f"train_also {target!r} matches no module. This model has: {', '.join(endings)}")
        found += [name for name in matches if name not in found]
    if problems:
        raise several(problems, ModelError)
    return found


def _embeddings(backbone: Any) -> nn.Module:
    return backbone.get_input_embeddings()


def _add_adapter(backbone: Any, spec: TrainableSpec, also: list[str]) -> set[str]:
    """Put the adapter in and free it, together with a classifier's head and `train_also`."""
    if spec.adapter is not None:
        return adapters.load_adapter(backbone, Path(spec.adapter)).free(backbone)
    also += [name for name in head_modules(backbone) if name not in also] if is_classifier(backbone) else []
    if spec.method == "peft":
        _refuse_beside_soft_prompt(spec)
        return adapters.add_peft(backbone, _peft_options(backbone, spec), seed=spec.seed, also=also).free(backbone)
    targets = find_targets(backbone, spec.targets)
    clash = [name for name in targets if any(_inside(name, module) for module in also)]
    if clash and spec.targets != ALL_LINEAR:
        raise ModelError(f"{', '.join(clash)} is both a target and in train_also: choose one")
    settings = lora.LoraSpec(
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=spec.dropout,
        init=spec.init,
        rank_stabilized=spec.rank_stabilized,
        dora=spec.dora,
        seed=spec.seed,
    )
    return adapters.add_lora(backbone, [name for name in targets if name not in clash], settings, also=also).free(
        backbone
    )


def _refuse_beside_soft_prompt(spec: TrainableSpec) -> None:
    kind = str((spec.peft or {}).get("peft_type", "")).upper()
    if kind in soft_prompt.KINDS and spec.train_also:
        raise ModelError(
            f"tune.train_also does not go with {kind}, which trains its virtual tokens alone: leave it out"
        )


def _peft_options(backbone: Any, spec: TrainableSpec) -> dict[str, Any]:
    """The method's configuration with its targets in full, so that a head that learns is not wrapped as well."""
    options = dict(spec.peft or {})
    kind = str(options.get("peft_type", "")).upper()
    if kind in soft_prompt.KINDS:
        if isinstance(how := options.get("prompt_tuning_init"), str):
            options["prompt_tuning_init"] = how.upper()
        if options.get("prompt_tuning_init") == "TEXT":
            options.setdefault("tokenizer_name_or_path", backbone.name_or_path or "the base")
        return options
    if kind in ("LN_TUNING", "TRAINABLE_TOKENS") or (kind == "IA3" and not options.get("target_modules")):
        return options
    wanted = options.get("target_modules") or spec.targets
    if wanted == ALL_LINEAR or not isinstance(wanted, str):
        options["target_modules"] = find_targets(backbone, wanted)
    if kind == "IA3" and not isinstance(inner := options.get("feedforward_modules"), str | None):
        options["feedforward_modules"] = [n for n in find_targets(backbone, inner) if n in options["target_modules"]]
    return options
