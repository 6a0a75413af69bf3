"""Export for other programs: a merged model in the base's dtype, or the adapter alone; verified, then published."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.data.chat import turn_end
from tunesmith.engine.durable import disk_errors, fsync_folder, make_folder, publish, remove_folder
from tunesmith.errors import ModelError
from tunesmith.export.verify import Agreement, agree, logits_of, probe_ids
from tunesmith.model import adapters, lora, peft_methods, quantize, soft_prompt
from tunesmith.model.folder import explained, quiet
from tunesmith.model.load import stored_dtype

Format = Literal["adapter", "merged"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was published: the folder, its bytes, and how far its logits are from the trained model's."""

    folder: Path
    format: str
    num_bytes: int
    agreement: Agreement | None


def export_run(
    backbone: Any,
    tokenizer: Any,
    out: Path | str,
    format: Format = "merged",
    *,
    base_name: str = "",
    dtype: torch.dtype | None = None,
    probes: Sequence[Sequence[int]] | None = None,
    beside: Callable[[Path], object] | None = None,
) -> Exported:
    """Write `backbone` to the new folder `out` with its tokenizer and template; the backbone stays as it is.

    `dtype` None keeps the one the base is stored in; `beside` writes what else belongs into the folder. Nothing is
    published unless the written files, opened again, answer `probes` (token ids) as the trained model does. Raises
    ModelError for NaN or infinity, and RunError when `out` is in use or cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} already exists and is not empty: choose another folder, or remove it first")
    _refuse_nonfinite(backbone)
    with _published(out) as folder, quiet():
        if format == "adapter":
            agreement = _write_adapter(backbone, folder, base_name)
        elif format == "merged":
            agreement = _write_merged(backbone, folder, dtype, probes, end=turn_end(tokenizer))
        else:
            raise ModelError(f"export format {format!r} is not known: choose adapter or merged")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if beside is not None:
            beside(folder)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(out, format, num_bytes, agreement)


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name, flushed, when all went well, and is removed otherwise."""
    folder = out.parent / f".tmp-{os.getpid()}-{out.name}"
    with disk_errors(out):
        make_folder(out.parent)
        remove_folder(folder)
        make_folder(folder)
        try:
            yield folder
            for path in folder.rglob("*"):
                if path.is_file():
                    _flush(path)
            fsync_folder(folder)
            if out.is_dir():
                out.rmdir()
            publish(folder, out)
        except BaseException:
            remove_folder(folder)
            raise


def _flush(path: Path) -> None:
    os.chmod(path, 0o644)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_nonfinite(backbone: nn.Module) -> None:
    bad = [name for name, p in backbone.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ModelError(f"NaN or infinity in {', '.join(bad[:5])}{more}: nothing was exported, the base is unchanged")


def _write_adapter(backbone: Any, folder: Path, base_name: str) -> None:
    if adapters.adapter_of(backbone) is None:
        raise ModelError("this model was trained without an adapter: export it with --format merged")
    if grown := getattr(backbone, "tunesmith_grown", 0):
        raise ModelError(f"the tokenizer has {grown} tokens that the weights of {base_name} have no rows for, and an "
                         "adapter opens beside those weights: export with --format merged, which has them")  # fmt: skip
    adapters.save_adapter(backbone, folder, base_name)
    written, held = load_file(folder / adapters.WEIGHTS), adapters.adapter_tensors(backbone)
    if written.keys() != held.keys() or any(not torch.equal(written[key], held[key]) for key in held):
        raise ModelError("the written adapter is not the trained one: the disk may be failing; nothing was published")


def _write_merged(
    backbone: Any, folder: Path, dtype: torch.dtype | None, probes: Sequence[Sequence[int]] | None, *, end: int | None
) -> Agreement:
    """Merge in fp32, store in the base's dtype, open what was written and compare logits. `end` ends an answer."""
    dtype = dtype or stored_dtype(Path(backbone.name_or_path or os.devnull)) or _main_dtype(backbone)
    config = backbone.config.get_text_config()
    probes = probes or probe_ids(config.vocab_size, avoid=config.pad_token_id)
    merged = merged_model(backbone, dtype)
    _stop_at(merged, end)
    merged.save_pretrained(folder)
    expected = logits_of(backbone, probes)
    with explained(folder, "exported model"):
        again = type(backbone).from_pretrained(folder, dtype=_main_dtype(backbone), use_safetensors=True)
    agreement = agree(expected, logits_of(again.to(backbone.device), probes), dtype)
    if not agreement.holds:
        raise ModelError(
            f"the merged model does not answer as the trained one: its logits differ by {agreement.error:.1e} of the "
            f"largest (allowed {agreement.tolerance:.0e} in {dtype}). Nothing was published; export the adapter instead"
        )
    return agreement


def _stop_at(merged: Any, end: int | None) -> None:
    """Other programs stop at the tokens of the generation config: what ends an answer in the chat is one of them."""
    settings = merged.generation_config
    if end is None or settings is None:
        return
    known = settings.eos_token_id
    ends = known if isinstance(known, list) else [known]
    if end not in ends:
        settings.eos_token_id = [i for i in (*ends, end) if i is not None]


def _main_dtype(backbone: Any) -> torch.dtype:
    """The type most of the frozen weights are in."""
    sizes: dict[torch.dtype, int] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda kind: sizes[kind])


def merged_model(backbone: Any, dtype: torch.dtype) -> Any:
    """The base's own class without adapters, updates added in; a new model, `backbone` is not touched."""
    if getattr(backbone, "peft_config", None) is not None or soft_prompt.held_by(backbone) is not None:
        backbone = copy.deepcopy(backbone)
        peft_methods.merge(backbone)
    state = _merged_state(backbone, dtype)
    config = copy.deepcopy(backbone.config)
    config.dtype = dtype
    config._name_or_path = ""
    with torch.device("meta"):
        merged = type(backbone)(config)
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = merged.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    merged.tie_weights()
    merged.generation_config = copy.deepcopy(getattr(backbone, "generation_config", None))
    return merged.eval()


def _merged_state(backbone: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the base under its own name; a tied one is the same tensor under each of its names.

    A quantised matrix is unpacked and an update added to that, which is the function that was trained.
    """
    layers = lora.lora_layers(backbone)
    matrices = {
        f"{name}.base": _stored(layer.merged_matrix(), layer.base, dtype)
        for name, layer in layers.items()
        if not layer.merged
    }
    packed = {name: layer for name, layer in quantize.quantized_layers(backbone) if name not in matrices}
    matrices |= {name: _stored(layer.matrix(), layer, dtype) for name, layer in packed.items()}
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    inside = tuple(f"{name}." for name in layers)
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if name.startswith(inside) and ".base." not in name:
            continue
        clean = name.replace(".base.", ".") if name.startswith(inside) else name
        owner, _, leaf = name.rpartition(".")
        if owner in matrices and leaf in ("weight", *quantize.STORED):
            state[f"{clean.rpartition('.')[0]}.weight"] = matrices[owner]
            continue
        if id(tensor) not in made:
            value = tensor.detach()
            made[id(tensor)] = value.to(dtype) if value.is_floating_point() else value
        state[clean] = made[id(tensor)]
    return state


def _stored(matrix: Tensor, base: nn.Module, dtype: torch.dtype) -> Tensor:
    """`matrix [d, k]` as the layer `base` stores it."""
    matrix = matrix.to(dtype)
    return matrix.t().contiguous() if lora.is_turned(base) else matrix
