"""Adapters in PEFT's folder format, both ways: `adapter_config.json` + `adapter_model.safetensors`, PEFT's key names.

Beside them `tunesmith.json` records the base's name and content hash, so that an adapter of another base is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.errors import ModelError, several
from tunesmith.model import lora, peft_methods, quantize
from tunesmith.model.hashing import backbone_hash

PREFIX = "base_model.model."
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "tunesmith.json"
_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
# What PEFT's LoRA can do beyond ours goes through PEFT itself.
_THROUGH_PEFT = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "exclude_modules",
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What was added to a base. `modules` are trained fully beside it; `originals` hold their values before training.

    `config` is the PEFT configuration object of another method, None for LoRA. `base_hash` is the base's content.
    """

    parameters: frozenset[str]
    modules: tuple[str, ...]
    originals: Mapping[str, Tensor]
    config: Any | None
    base_hash: str | None

    def free(self, backbone: nn.Module) -> set[str]:
        """Let exactly this adapter's parameters learn; their names."""
        names = set(self.parameters) | set(self.originals)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in names)
        return names


def adapter_of(backbone: Any) -> Adapter | None:
    """The adapter that `backbone` carries."""
    return getattr(backbone, "tunesmith_adapter", None)


def _carried(backbone: Any) -> Adapter:
    adapter = adapter_of(backbone)
    if adapter is None:
        raise ModelError("this model carries no adapter")
    return adapter


def add_lora(backbone: Any, names: Iterable[str], spec: lora.LoraSpec, *, also: Iterable[str] = ()) -> Adapter:
    """Put LoRA beside the named linears, and let the modules `also` learn fully."""
    modules, originals, base_hash = _set_aside(backbone, also)
    layers = lora.inject(backbone, names, spec)
    if not layers:
        raise ModelError("no linear layer is left to put an adapter beside")
    return _attach(backbone, modules, originals, base_hash, None)


def add_peft(backbone: Any, options: Mapping[str, Any], *, seed: int = 0, also: Iterable[str] = ()) -> Adapter:
    """Put another PEFT method into the base: `options` is its configuration, `peft_type` included."""
    modules, originals, base_hash = _set_aside(backbone, also)
    config = peft_methods.make_config(options)
    peft_methods.inject(backbone, config, seed=seed)
    return _attach(backbone, modules, originals, base_hash, config)


def _set_aside(backbone: Any, also: Iterable[str]) -> tuple[tuple[str, ...], dict[str, Tensor], str | None]:
    """The modules to train fully (with those that share a tied weight), copies of their values, the base's hash."""
    if adapter_of(backbone) is not None:
        raise ModelError("this model already carries an adapter: take it off first")
    modules = list(dict.fromkeys(also))
    shared = {id(p) for name in modules for p in backbone.get_submodule(name).parameters()}
    for name, module in backbone.named_modules():
        tied = any(id(p) in shared for p in module.parameters(recurse=False))
        if tied and not any(name == m or name.startswith(m + ".") for m in modules):
            modules.append(name)
    originals = {n: p.detach().clone() for n, p in backbone.named_parameters() if id(p) in shared}
    return tuple(modules), originals, backbone_hash(backbone, skip=modules)


def _attach(
    backbone: Any, modules: tuple[str, ...], originals: dict[str, Tensor], base_hash: str | None, config: Any
) -> Adapter:
    mark = peft_methods.adapter_parameters(backbone) if config is not None else _lora_parameters(backbone)
    adapter = Adapter(frozenset(mark), modules, originals, config, base_hash)
    backbone.tunesmith_adapter = adapter
    return adapter


def _lora_parameters(backbone: nn.Module) -> set[str]:
    layers = lora.lora_layers(backbone)
    return {f"{name}.{part}" for name, layer in layers.items() for part in _PARTS if getattr(layer, part) is not None}


def remove(backbone: Any) -> None:
    """Take the adapter off: the base stands there again, bit for bit."""
    adapter = _carried(backbone)
    if any(layer.merged for layer in lora.lora_layers(backbone).values()):
        raise ModelError("this adapter is merged into the base: unmerge it first, or load the base anew")
    _exchange(backbone, adapter.originals)
    if adapter.config is None:
        lora.remove(backbone)
    else:
        peft_methods.remove(backbone)
    del backbone.tunesmith_adapter


def _exchange(backbone: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `values` in place of the parameters' own data; what stood there before."""
    before = {}
    for name, value in values.items():
        parameter = backbone.get_parameter(name)
        before[name] = parameter.data
        parameter.data = value.to(parameter.device)
    return before


@contextmanager
def disabled(backbone: Any) -> Iterator[None]:
    """The base exactly, as it was before the adapter; the adapter again afterwards. Without one, nothing happens."""
    adapter = adapter_of(backbone)
    if adapter is None:
        yield
        return
    if any(layer.merged for layer in lora.lora_layers(backbone).values()):
        raise ModelError("this adapter is merged into the base and cannot be switched off: unmerge it first")
    trained = _exchange(backbone, adapter.originals)
    try:
        with lora.switched_off(backbone), peft_methods.switched_off(backbone):
            yield
    finally:
        _exchange(backbone, trained)


def adapter_tensors(backbone: Any) -> dict[str, Tensor]:
    """Every tensor of the adapter under PEFT's key name, detached, on the CPU, contiguous."""
    adapter = _carried(backbone)
    found: dict[str, Tensor] = {} if adapter.config is None else peft_methods.tensors(backbone)
    for name, layer in lora.lora_layers(backbone).items():
        a, b = layer.pair()
        found[f"{PREFIX}{name}.lora_A.weight"], found[f"{PREFIX}{name}.lora_B.weight"] = a, b
        if layer.lora_magnitude_vector is not None:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    prefix = PREFIX if adapter.config is None else peft_methods.file_prefix(adapter.config.peft_type)
    for module in adapter.modules:
        for name, parameter in backbone.get_submodule(module).named_parameters():
            found[f"{prefix}{module}.{name}"] = parameter
    return {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}


def save_adapter(backbone: Any, folder: Path | str, base_name: str) -> Path:
    """Write the adapter as PEFT reads it. NaN and infinity are refused, naming the tensors."""
    adapter = _carried(backbone)
    tensors = adapter_tensors(backbone)
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ModelError(f"the adapter holds NaN or infinity in {', '.join(bad[:5])}: nothing was written")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _lora_config(backbone) if adapter.config is None else peft_methods.config_dict(adapter.config, base_name)
    config |= {
        "base_model_name_or_path": base_name,
        "task_type": _task(backbone),
        "modules_to_save": list(adapter.modules) or None,
        "inference_mode": True,
    }
    record = {"format": 1, "base": base_name, "base_hash": adapter.base_hash}
    if (kind := quantize.quantized_as(backbone)) is not None:
        record["trained_beside"] = f"the base in {kind}"
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _task(backbone: Any) -> str | None:
    name = type(backbone).__name__
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
    return next((task for ending, task in kinds.items() if name.endswith(ending)), None)


def _lora_config(backbone: nn.Module) -> dict[str, Any]:
    layers = lora.lora_layers(backbone)
    stabilized = any(layer.rank_stabilized for layer in layers.values())
    ranks = {name: layer.pair()[0].shape[0] for name, layer in layers.items()}
    alphas = {n: layer.scaling * (math.sqrt(ranks[n]) if stabilized else ranks[n]) for n, layer in layers.items()}
    alphas = {name: round(a) if abs(a - round(a)) < 1e-9 else a for name, a in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(layers.values())).dropout,
        "target_modules": _short(backbone, set(layers)),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": stabilized,
        "use_dora": any(layer.lora_magnitude_vector is not None for layer in layers.values()),
        "fan_in_fan_out": all(lora.is_turned(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "bias": "none",
    }


def _short(backbone: nn.Module, names: set[str]) -> list[str]:
    """The targets as name endings where an ending means exactly these layers, else in full."""
    endings: dict[str, set[str]] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, lora.LoraLinear) or lora.is_linear(module):
            name = name.removesuffix(".base")
            endings.setdefault(name.rpartition(".")[2], set()).add(name)
    short = {ending for ending, owners in endings.items() if owners <= names}
    return sorted({n.rpartition(".")[2] if n.rpartition(".")[2] in short else n for n in names})


def load_adapter(backbone: Any, folder: Path | str, *, base_name: str | None = None) -> Adapter:
    """Open an adapter folder, ours or PEFT's, onto its base; frozen until `Adapter.free`.

    Raises ModelError, the base unchanged, for another base, a pickled or broken file, or layers that do not fit.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    _refuse_other_base(backbone, folder, config, base_name)
    also = _also(backbone, config.get("modules_to_save") or (), tensors)
    _refuse_misfits(backbone, folder, tensors, also)
    full = {k: v for k, v in tensors.items() if any(k.startswith(m + ".") for m in also)}
    own = {k: v for k, v in tensors.items() if k not in full}
    if _is_ours(config, own):
        adapter = _load_lora(backbone, config, own, also)
    else:
        modules, originals, base_hash = _set_aside(backbone, also)
        peft_config = peft_methods.read_config(folder)
        peft_methods.inject(backbone, peft_config)
        peft_methods.load_tensors(backbone, own)
        adapter = _attach(backbone, modules, originals, base_hash, peft_config)
    with torch.no_grad():
        for key, value in full.items():
            backbone.get_parameter(key).copy_(value)
    backbone.requires_grad_(False)
    return adapter


def whole_modules(backbone: nn.Module, folder: Path) -> list[str]:
    """Names of the modules that the adapter in `folder` holds whole, beside its low-rank parts."""
    config, tensors = _read(folder)
    return _also(backbone, config.get("modules_to_save") or (), tensors)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is not an adapter: it has no {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        way = (
            f"; {pickled[0]} is a pickle, which can run code: save it anew as safetensors with PEFT" if pickled else ""
        )
        raise ModelError(f"{folder} has no {WEIGHTS}{way}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter is damaged ({error}): fetch or train it again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ModelError(f"{folder / CONFIG} does not say its peft_type: this is not a PEFT adapter")
    pattern = config.get("alpha_pattern") or {}
    alphas = [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    if config["peft_type"] == "LORA" and not all(isinstance(alpha, int | float) for alpha in alphas):
        raise ModelError(f"{folder / CONFIG} gives no number as lora_alpha: fetch or train the adapter again")
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ModelError(f"{folder}: the adapter holds NaN or infinity in {', '.join(bad[:5])}")
    prefix = peft_methods.file_prefix(config["peft_type"])
    clean = {k.removeprefix(prefix).replace(".modules_to_save.", "."): v for k, v in tensors.items()}
    return config, {k: v for k, v in clean.items() if ".original_module." not in k}


def _refuse_other_base(backbone: Any, folder: Path, config: Mapping[str, Any], base_name: str | None) -> None:
    record: Any = {}
    try:
        if (folder / RECORD).is_file():
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / RECORD} is damaged ({error}): fetch or train the adapter again") from error
    if not isinstance(record, dict):
        raise ModelError(f"{folder / RECORD} is damaged (no object): fetch or train the adapter again")
    theirs, name = record.get("base_hash"), record.get("base") or config.get("base_model_name_or_path") or "?"
    ours = backbone_hash(backbone, skip=config.get("modules_to_save") or ()) if theirs else None
    if theirs and ours and theirs != ours:
        mine = base_name or getattr(backbone, "name_or_path", "") or type(backbone).__name__
        raise ModelError(
            f"{folder} was trained on another base: {name} (content {theirs[:12]}), this is {mine} "
            f"(content {ours[:12]}). Load it onto {name}"
        )


def _also(backbone: nn.Module, wanted: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Full names of the modules that the file holds whole."""
    names = [n for n, _ in backbone.named_modules() if n and any(n == w or n.endswith(w) for w in wanted)]
    return [n for n in names if any(k.startswith(n + ".") and "lora_" not in k for k in tensors)]


def _refuse_misfits(backbone: nn.Module, folder: Path, tensors: Mapping[str, Tensor], also: list[str]) -> None:
    modules = dict(backbone.named_modules())
    problems = _unpaired(tensors)
    for key, tensor in tensors.items():
        name, _, part = key.partition(".lora_")
        if part and name not in modules:
            problems.append(f"{name}: this base has no such layer")
        elif part in ("A.weight", "B.weight") and tensor.dim() == 2 and lora.is_linear(modules[name]):
            d, k = lora.matrix_shape(modules[name])
            found, fits = (tensor.shape[1], k) if part[0] == "A" else (tensor.shape[0], d)
            if found != fits:
                problems.append(f"{key}: made for width {found}, this base has {fits}")
        elif any(key.startswith(m + ".") for m in also):
            parameter = dict(backbone.named_parameters(remove_duplicate=False)).get(key)
            if parameter is None or parameter.shape != tensor.shape:
                has = None if parameter is None else tuple(parameter.shape)
                problems.append(f"{key}: {tuple(tensor.shape)} in the adapter, {has} in this base")
    if problems:
        headline = f"{folder} does not fit this base ({type(backbone).__name__}), {len(problems)} tensors:"
        raise several(problems[:10], ModelError, headline=headline)


def _unpaired(tensors: Mapping[str, Tensor]) -> list[str]:
    """LoRA matrices without the other one of their layer, or of another rank than that."""
    problems = []
    ends = (".lora_A.weight", ".lora_B.weight")
    for name in dict.fromkeys(key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)):
        a, b = (tensors.get(name + end) for end in ends)
        if a is None or b is None:
            problems.append(f"{name}: {ends[a is not None][1:]} is missing")
        elif a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
            problems.append(f"{name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} have no common rank")
    return problems


def _is_ours(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    if config["peft_type"] != "LORA" or any(config.get(key) for key in _THROUGH_PEFT):
        return False
    plain = config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
    known = all(key.endswith(tuple("." + part for part in _PARTS.values())) for key in tensors)
    return plain and known and config.get("bias", "none") == "none"


def _load_lora(backbone: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], also: Iterable[str]) -> Adapter:
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    if odd := [name for name in names if not lora.is_linear(backbone.get_submodule(name))]:
        raise ModelError(f"the adapter stands beside {', '.join(odd[:5])}, which is no linear layer of this base")
    modules, originals, base_hash = _set_aside(backbone, also)
    stabilized = bool(config.get("use_rslora"))
    for name in names:
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        spec = lora.LoraSpec(
            rank=a.shape[0],
            alpha=float(alpha),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilized=stabilized,
            dora=magnitude is not None,
        )
        layer = lora.place(backbone, name, lora.LoraLinear(backbone.get_submodule(name), spec, name=name))
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)
        if magnitude is not None:
            layer.lora_magnitude_vector.data.copy_(magnitude.reshape(-1))
    return _attach(backbone, modules, originals, base_hash, None)


def _by_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    return next((v for key, v in pattern.items() if name == key or name.endswith("." + key)), default)
