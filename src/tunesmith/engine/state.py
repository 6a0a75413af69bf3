"""Everything a run needs to go on bit for bit: weights, optimizer, random states, data cursor, progress.

What is not trained is not saved: the base is named by its fingerprint in `identity`, and a run whose
fingerprints changed is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tunesmith.engine.contracts import Progress
from tunesmith.errors import RunError, several

_PLAIN = (bool, int, float, str, type(None))


class Resumable(Protocol):
    """What `TrainState` asks of a source: a cursor of plain JSON values, out and in."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any], /) -> None: ...


@dataclass(slots=True)
class TrainState:
    """The one mutable record of a run.

    `identity` maps a field (data, base, tokenizer, a recipe key) to its fingerprint. `generator` is saved beside
    torch's own CPU and CUDA generators. Construct it before the first step and before any restore: buffers that
    differ from that moment on are saved too.
    """

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    source: Resumable
    progress: Progress = field(default_factory=Progress)
    identity: dict[str, str] = field(default_factory=dict)
    generator: torch.Generator | None = None
    _buffers: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._buffers = {name: _stamp(buffer) for name, buffer in self.model.named_buffers()}

    def capture(self, *, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`(tensors, meta)` for `save_checkpoint`; without `copy` the tensors are live, not snapshots.

        Names: `model.NAME`, `buffer.NAME`, `optimizer.NAME|KEY`, `rng.cpu`, `rng.cuda.I`, `rng.generator`.
        """
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self._trainable().items()}
        for name, buffer in self.model.named_buffers():
            if self._buffers.get(name) != _stamp(buffer):
                tensors[f"buffer.{name}"] = buffer.detach()
        optimizer_tensors, optimizer_meta = self._capture_optimizer()
        tensors |= optimizer_tensors
        if copy:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors |= self._capture_random()
        meta = {
            "step": self.step,
            "progress": asdict(self.progress),
            "identity": dict(self.identity),
            "source": self.source.state(),
            "optimizer": optimizer_meta,
        }
        return tensors, meta

    def restore(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, accept: Collection[str] = ()
    ) -> list[str]:
        """Put everything back bit for bit; returns a sentence for each changed identity field in `accept`.

        Raises `RunError` listing every changed field (old and new), or every tensor that is missing, left over or
        of another shape or type. Nothing is changed when it raises.
        """
        changed = _changes(meta["identity"], self.identity)
        problems = [text for name, text in changed.items() if name not in accept]
        if problems:
            headline = "this run was started with other inputs; restore them, or start a new run:"
            raise several(problems, RunError, headline=headline)
        if problems := self._misfits(tensors, meta):
            headline = "the checkpoint does not fit this model and optimizer:"
            raise several(problems, RunError, headline=headline)
        self._copy_weights(tensors)
        self._restore_optimizer(tensors, meta["optimizer"])
        self.source.restore(meta["source"])
        self.step = meta["step"]
        self.progress = Progress(**meta["progress"])
        self._restore_random(tensors)
        return list(changed.values())

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Put only the trained weights and changed buffers back, as for the best checkpoint; `RunError` as above."""
        if problems := self._weight_misfits(tensors):
            raise several(problems, RunError, headline="the checkpoint does not fit this model:")
        self._copy_weights(tensors)

    def rewind(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put weights and optimizer back and leave step, source and progress where they are; `RunError` as above."""
        if problems := self._misfits(tensors, meta):
            raise several(problems, RunError, headline="the checkpoint does not fit this model and optimizer:")
        self._copy_weights(tensors)
        self._restore_optimizer(tensors, meta["optimizer"])

    @torch.no_grad()
    def _copy_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trainable().items():
            parameter.copy_(tensors[f"model.{name}"])
        for name, buffer in self.model.named_buffers():
            if f"buffer.{name}" in tensors:
                buffer.copy_(tensors[f"buffer.{name}"])
                self._buffers[name] = "differs from the base"  # so it is saved from now on

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _capture_optimizer(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """State as `optimizer.NAME|KEY` tensors; plain values, devices and group settings as JSON."""
        names, tensors = self._names(), {}
        values: dict[str, dict[str, Any]] = {}
        for parameter, entries in self.optimizer.state.items():
            name = names[cast(nn.Parameter, parameter)]
            values[name] = {}
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}|{key}"] = value.detach()
                    values[name][key] = {"tensor": "cpu" if value.device.type == "cpu" else "parameter"}
                else:
                    values[name][key] = {"value": _pack(value, f"optimizer state {name} {key}")}
        groups = []
        for index, group in enumerate(self.optimizer.param_groups):
            settings = {}
            for key, value in group.items():
                if key == "params":
                    continue
                if isinstance(value, Tensor):
                    tensors[f"optimizer.group{index}|{key}"] = value.detach()
                    settings[key] = {"tensor": "cpu"}
                else:
                    settings[key] = {"value": _pack(value, f"optimizer setting {key}")}
            groups.append({"params": [names[p] for p in group["params"]], "settings": settings})
        return tensors, {"state": values, "groups": groups}

    def _restore_optimizer(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Written directly: `load_state_dict` would cast float32 moments to a bfloat16 parameter's type."""
        by_name = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for name, entries in meta["state"].items():
            parameter = by_name[name]
            state = self.optimizer.state[parameter]
            for key, entry in entries.items():
                if "value" in entry:
                    state[key] = _unpack(entry["value"])
                    continue
                device = "cpu" if entry["tensor"] == "cpu" and key == "step" else parameter.device
                state[key] = tensors[f"optimizer.{name}|{key}"].to(device, copy=True)
        for index, (group, saved) in enumerate(zip(self.optimizer.param_groups, meta["groups"], strict=True)):
            for key, entry in saved["settings"].items():
                if "value" in entry:
                    group[key] = _unpack(entry["value"])
                else:
                    group[key] = tensors[f"optimizer.group{index}|{key}"].clone()

    def _capture_random(self) -> dict[str, Tensor]:
        """States as uint8 tensors: bytes, so nothing can be lost in a conversion."""
        states = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        if self.generator is not None:
            states["rng.generator"] = self.generator.get_state()
        return states

    def _restore_random(self, tensors: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(tensors["rng.cpu"].clone())
        for name, state in tensors.items():
            if name.startswith("rng.cuda.") and torch.cuda.is_available():
                torch.cuda.set_rng_state(state.clone(), int(name.removeprefix("rng.cuda.")))
        if self.generator is not None:
            self.generator.set_state(tensors["rng.generator"].clone())

    def _misfits(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[str]:
        """Every reason why `restore` could not be exact."""
        problems, names = self._weight_misfits(tensors), self._names()
        mine = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        if mine != [group["params"] for group in meta["optimizer"]["groups"]]:
            problems.append("the optimizer's groups hold other parameters than the saved ones")
        random = ["rng.cpu"] if self.generator is None else ["rng.cpu", "rng.generator"]
        return problems + [f"{name} is not in the checkpoint" for name in random if name not in tensors]

    def _weight_misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        trained = {f"model.{name}": p.detach() for name, p in self._trainable().items()}
        every = trained | {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        saved = {name for name in tensors if name.startswith(("model.", "buffer."))}
        problems = [f"{name} is not in the checkpoint" for name in sorted(trained.keys() - saved)]
        problems += [f"{name} is not trained by this run" for name in sorted(saved - every.keys())]
        for name in sorted(saved & every.keys()):
            theirs, mine = tensors[name], every[name]
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                old, new = f"{list(theirs.shape)} {theirs.dtype}", f"{list(mine.shape)} {mine.dtype}"
                problems.append(f"{name}: saved {old}, now {new}")
        return problems


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """`field -> sentence` for every field whose fingerprint differs, with both values."""
    fields = sorted(set(old) | set(new))
    changed = [name for name in fields if old.get(name) != new.get(name)]
    return {n: f"{n}: was {old.get(n, 'absent')}, is {new.get(n, 'absent')}" for n in changed}


def _stamp(buffer: Tensor) -> str:
    """Digest of the buffer's bytes. Autograd's version counter will not do: batch norm writes past it.

    Bytes of one-byte types are left out: those are packed frozen weights, large and never written.
    """
    if buffer.dtype.itemsize == 1 or not buffer.numel():
        return "fixed"
    flat = buffer.detach().to("cpu").contiguous().reshape(-1)
    return sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _pack(value: Any, where: str) -> Any:
    """A plain value as JSON that gives the same value back: tuples and non-finite numbers are marked."""
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, where) for item in value]}
    if isinstance(value, list):
        return {"list": [_pack(item, where) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": value.hex() if math.isinf(value) else "nan"}
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_unpack(item) for item in value["tuple"])
    if "list" in value:
        return [_unpack(item) for item in value["list"]]
    return float.fromhex(value["float"])
