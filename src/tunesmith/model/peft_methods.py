"""PEFT's other methods (IA3, LoHa, LoKr, VeRA, OFT, ...), put in and taken out through PEFT itself.

Prompt and prefix tuning stand in `model/soft_prompt.py`; of PEFT they have the configuration and the file alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model import soft_prompt, soft_start
from tunesmith.model.lora import place

_NAME = "default"
_PREFIX = "base_model.model."
_SHARING = ("VERA", "TINYLORA", "UNILORA", "VBLORA")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("tune.method peft needs the peft package: pip install 'tunesmith[peft]'") from error
    return peft


def methods() -> list[str]:
    """The peft_type names that can be put into a model: layer by layer, or as virtual tokens before every segment."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    apart = {"ADAPTION_PROMPT", "SHADOW", "XLORA", "CPT", "CARTRIDGE", "POLY", "PVERA", "FROD"}
    known = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind in PEFT_TYPE_TO_TUNER_MAPPING]
    layered = {k for k in known if k not in apart and not k.endswith(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"))}
    return sorted(layered | set(soft_prompt.KINDS))


def make_config(options: Mapping[str, Any]) -> Any:
    """A PEFT configuration from the recipe's mapping; unknown types and keys are ModelErrors listing the known ones."""
    _peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    rest = dict(options)
    kind = str(rest.pop("peft_type", "")).upper()
    if kind.endswith(("P_TUNING", "PROMPT_TUNING")) and kind not in methods():
        raise ModelError(f"tune.peft.peft_type {kind} is not supported: use PROMPT_TUNING or PREFIX_TUNING")
    if kind not in methods():
        raise ModelError(f"tune.peft.peft_type {kind or 'is missing'!r}: choose one of {', '.join(methods())}")
    cls = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value == kind)
    known = {field.name for field in fields(cls) if field.init}
    unknown = sorted(set(rest) - known)
    if unknown:
        raise ModelError(f"tune.peft: {kind} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    try:
        return cls(**rest)
    except (TypeError, ValueError) as error:
        raise ModelError(f"tune.peft: {kind} refuses these settings: {error}") from error


def read_config(folder: Path) -> Any:
    """The configuration in an adapter folder; modules kept whole are not PEFT's business here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = _peft().PeftConfig.from_pretrained(str(folder))
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}: PEFT cannot read this adapter: {error}") from error
    kind = _value(config.peft_type)
    if kind not in methods():
        raise ModelError(f"{folder}: {kind} adapters are not supported; these are: {', '.join(methods())}")
    if kind == "PREFIX_TUNING":
        config.prefix_projection = False  # the file holds what the projection gave
    config.modules_to_save, config.inference_mode = None, kind in soft_prompt.KINDS
    return config


def inject(backbone: Any, config: Any, *, seed: int = 0) -> None:
    """Put the method's layers in, in place, initialised from `seed` without touching the global random state."""
    if _value(config.peft_type) in soft_prompt.KINDS:
        soft_start.put_in(backbone, config, seed=seed)
        return
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            if _value(config.peft_type) in _SHARING:
                # The wrapper owns what the layers share; hidden from the backbone's modules, which it contains.
                backbone.__dict__["tunesmith_peft"] = _peft().get_peft_model(backbone, config, _NAME)
            else:
                _peft().inject_adapter_in_model(config, backbone, _NAME)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise ModelError(f"PEFT cannot put this adapter into {type(backbone).__name__}: {error}") from error


def _value(kind: Any) -> str:
    return str(getattr(kind, "value", kind))


def file_prefix(kind: Any) -> str:
    """What PEFT writes before the names of modules kept whole: it does not wrap a base twice for a soft prompt."""
    return "base_model." if _value(kind) in soft_prompt.KINDS else _PREFIX


def _carrier(backbone: Any) -> Any:
    """What PEFT's functions take: the wrapper of a method with shared state, else the backbone."""
    return backbone.__dict__.get("tunesmith_peft", backbone)


def adapter_parameters(backbone: nn.Module) -> set[str]:
    """Names of the parameters that PEFT made and lets learn, read just after `inject`."""
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def _layers(backbone: nn.Module) -> dict[str, Any]:
    if not hasattr(backbone, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)}


def tensors(backbone: Any) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's full names."""
    if (soft := soft_prompt.held_by(backbone)) is not None:
        return {soft_prompt.TENSOR: soft.prompt_embeddings}
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model_state_dict(_carrier(backbone), adapter_name=_NAME, save_embedding_layers=False)
    return {key if key.startswith("base_model.") else _PREFIX + key: value for key, value in found.items()}


def load_tensors(backbone: Any, values: Mapping[str, Tensor]) -> None:
    """Fill the layers put in by `inject`. Raises ModelError when the file holds what they do not have."""
    if soft_prompt.held_by(backbone) is not None:
        soft_prompt.load_values(backbone, values)
        return
    from peft import set_peft_model_state_dict

    try:
        full = {key if key.startswith("base_model.") else _PREFIX + key: value for key, value in values.items()}
        result = set_peft_model_state_dict(_carrier(backbone), full, adapter_name=_NAME)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ModelError(f"this adapter's tensors do not fit this base: {error}") from error
    if result.unexpected_keys:
        raise ModelError(f"this adapter holds tensors that its layers do not have: {result.unexpected_keys[:5]}")


def config_dict(config: Any, base_name: str) -> dict[str, Any]:
    """The configuration as JSON can hold it; a tokenizer that it names is the base's, wherever that lay."""
    found = {key: _plain(value) for key, value in config.to_dict().items()}
    return found | ({"tokenizer_name_or_path": base_name} if found.get("tokenizer_name_or_path") else {})


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value) if not isinstance(value, (str, int, float, bool, type(None))) else value


def remove(backbone: Any) -> None:
    """Take PEFT's layers, or the soft prompt, out again."""
    if soft_prompt.held_by(backbone) is not None:
        delattr(backbone, soft_prompt.PLACE)
        return
    for name, layer in _layers(backbone).items():
        place(backbone, name, layer.get_base_layer())
    _forget(backbone)


def _forget(backbone: Any) -> None:
    del backbone.peft_config
    backbone.__dict__.pop("tunesmith_peft", None)


def merge(backbone: Any) -> None:
    """Merge PEFT's layers into their base layers and take them out. Raises ModelError where the method cannot merge."""
    if soft_prompt.held_by(backbone) is not None:
        raise ModelError(
            "a soft prompt cannot be merged: it stands before every text, not in the base's weights. Export it as an "
            "adapter (--format adapter)"
        )
    try:
        for name, layer in _layers(backbone).items():
            layer.merge(safe_merge=True)
            place(backbone, name, layer.get_base_layer())
    except (ValueError, AttributeError, NotImplementedError, TypeError) as error:
        raise ModelError(f"this adapter cannot be merged: {error}. Export it as an adapter") from error
    _forget(backbone)


@contextmanager
def switched_off(backbone: nn.Module) -> Iterator[None]:
    """PEFT's layers pass their base's output through for a while; a soft prompt is not there."""
    layers, soft = list(_layers(backbone).values()), soft_prompt.held_by(backbone)
    was = soft is not None and soft.enabled
    grads = {id(p): p.requires_grad for p in backbone.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        if soft is not None:
            soft.enabled = False
        yield
    finally:
        if soft is not None:
            soft.enabled = was
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in backbone.parameters():
            parameter.requires_grad_(grads[id(parameter)])
