"""How a family sees several segments at once - packed, padded or alone - proven on the model itself at load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.errors import ModelError
from tunesmith.model import attention, soft_prompt
from tunesmith.model.folder import quiet

PROBE_LENGTHS = (5, 9, 3)
PAST_WINDOW = 8
MAX_WINDOW = 512
MAX_PROBE_LOGITS = 1 << 26
_WINDOWS = ("sliding_window", "local_attention", "window_size", "attention_window", "attention_chunk_size")


class Layout(Enum):
    """How segments are laid out for the backbone."""

    PACKED = "packed"
    PADDED = "padded"
    ALONE = "one by one"


def recompute_activations(backbone: Any) -> None:
    """Keep the input of each block alone and compute the rest again in the backward (1604.06174)."""
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def position_offset(backbone: Any) -> int:
    """What the family adds to positions: 0, or pad + 1 for RoBERTa and its kin."""
    embeddings = getattr(backbone.base_model, "embeddings", None)
    if embeddings is not None and hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1
    return 0


def flat_hidden(backbone: Any, batch: Batch, *, causal: bool, offset: int) -> Tensor:
    """Last hidden states of a flat row, `[T, D]`, each segment blind to the others and behind the soft prompt."""
    extra = {"use_cache": False} if causal else {}
    ids, positions, lengths = _rounded(batch) if batch.input_ids.device.type == "cpu" else _as_it_is(batch)
    if soft_prompt.active(backbone) is not None:
        inputs, real = soft_prompt.packed_inputs(backbone, ids, lengths)
        return backbone.base_model(**inputs, **extra)[0][0, real[: batch.input_ids.shape[1]]]
    out = backbone.base_model(input_ids=ids, position_ids=positions + offset, segment_lengths=lengths, **extra)
    return out[0][0, : batch.input_ids.shape[1]]


def segment_hidden(backbone: Any, batch: Batch, layout: Layout, *, causal: bool, offset: int) -> Tensor:
    """Last hidden states of a flat row in the family's layout, `[T, D]`, each segment blind to the others."""
    if layout_for(backbone, layout, batch) is Layout.PACKED:
        return flat_hidden(backbone, batch, causal=causal, offset=offset)
    rows = batch.input_ids[batch.segments >= 0].split(list(batch.lengths))
    return torch.cat([_hidden_of_row(backbone, row, causal=causal) for row in rows])


def _hidden_of_row(backbone: Any, row: Tensor, *, causal: bool) -> Tensor:
    inputs, before = soft_prompt.row_inputs(backbone, row[None])
    return backbone.base_model(**inputs, **({"use_cache": False} if causal else {}))[0][0, before:]


def _as_it_is(batch: Batch) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    return batch.input_ids, batch.positions, tuple(batch.lengths)


def _rounded(batch: Batch) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Ids, positions and lengths with more segments, of token 0, that bring the row to a round size.

    A CPU's matrix products are compiled for each new number of rows (docs/log.md); at most 1 in 16 is added. None is
    longer than the longest there is: a family may have no positions beyond.
    """
    tokens = batch.input_ids.shape[1]
    step = max(8, 1 << max(0, (tokens // 16).bit_length() - 1))
    more = -tokens % step
    if not more:
        return _as_it_is(batch)
    ids = nn.functional.pad(batch.input_ids, (0, more))
    longest = max(batch.lengths)
    positions = torch.cat([batch.positions, torch.arange(more)[None] % longest], 1)
    last = (more % longest,) if more % longest else ()
    return ids, positions, (*batch.lengths, *(longest,) * (more // longest), *last)


def without_cache(backbone: Any) -> dict[str, bool]:
    """The argument that keeps a forward from filling a KV cache, where the family takes it."""
    return {"use_cache": False} if "use_cache" in signature(backbone.forward).parameters else {}


def own_logits(backbone: Any, batch: Batch, layout: Layout) -> Tensor:
    """Logits of the family's own forward: `[T, V]` for language models, `[S, C]` for classifiers."""
    rows = batch.input_ids[batch.segments >= 0].split(list(batch.lengths))
    if layout is Layout.ALONE or soft_prompt.active(backbone) is not None:
        return torch.cat([_of_row(backbone, row) for row in rows])
    pad_id = backbone.config.get_text_config().pad_token_id or 0
    input_ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    sizes = torch.tensor(batch.lengths, device=input_ids.device)
    mask = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < sizes[:, None]
    logits = backbone(input_ids=input_ids, attention_mask=mask.long(), **without_cache(backbone)).logits
    return logits[mask] if logits.dim() == 3 else logits


def _of_row(backbone: Any, row: Tensor) -> Tensor:
    """Logits of the tokens of `row [T]`: `[T, V]`, or `[1, C]` of a classifier."""
    inputs, before = soft_prompt.row_inputs(backbone, row[None])
    with quiet():  # a classifier remarks that it sees no padding in embeddings
        logits = backbone(**without_cache(backbone), **inputs).logits
    return logits[0, before:] if logits.dim() == 3 else logits


def probe_batch(backbone: Any) -> Batch:
    """Segments of seeded random tokens, pad token avoided: three short ones, and one past the family's window."""
    config = backbone.config.get_text_config()
    pad, lengths = config.pad_token_id, PROBE_LENGTHS + _past_window(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    if pad is not None:
        ids = torch.where(ids == pad, (ids + 1) % config.vocab_size, ids)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    row = ids[None]
    return Batch(row, row, torch.ones(row.shape), positions[None], segments[None], lengths=lengths)


def _past_window(config: Any) -> tuple[int, ...]:
    """The length of a segment that a window of attention cuts, where the model has one; a window that lives in the
    mask alone shows there only. Left out where it would not be cheap: a long window, or logits of 256 MB."""
    windows = attention_windows(config)
    longest = int(getattr(config, "max_position_embeddings", None) or MAX_WINDOW + PAST_WINDOW)
    lengths = [w + PAST_WINDOW for w in windows if 0 < w <= MAX_WINDOW]
    fit = [n for n in lengths if n <= longest and (n + sum(PROBE_LENGTHS)) * config.vocab_size <= MAX_PROBE_LOGITS]
    return (max(fit),) if fit else ()


def attention_windows(config: Any) -> list[int]:
    """The windows that a configuration names; which layers look through one is the family's own business."""
    return [value for name in _WINDOWS if isinstance(value := getattr(config, name, None), int)]


def switch_tokens(config: Any) -> int | None:
    """The length beyond which a row changes the rotary scaling of every row beside it (longrope, dynamic NTK)."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    ends = [
        one.get("original_max_position_embeddings") or config.max_position_embeddings
        for one in kinds
        if one.get("rope_type") == "longrope" or "dynamic" in str(one.get("rope_type"))
    ]
    return min(ends, default=None)


def layout_for(backbone: Any, layout: Layout, batch: Batch) -> Layout:
    """The layout for this batch: one by one where a long row would change the rotary scaling of its neighbours."""
    switch = switch_tokens(backbone.config.get_text_config())
    if switch is None or len(batch.lengths) < 2:
        return layout
    return Layout.ALONE if max(batch.lengths) + soft_prompt.num_virtual(backbone) > switch else layout


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients; every submodule's own mode is put back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def choose_layout(backbone: Any, packed_logits: Callable[[Batch], Tensor] | None) -> tuple[Layout, str]:
    """The fastest layout whose logits equal the family's own, one segment at a time; and why not a faster one.

    `packed_logits(batch)` gives `[T, V]` or `[S, C]` from one flat row, or is None when the head is not known.
    """
    batch = probe_batch(backbone).to(backbone.device)
    original = backbone.config._attn_implementation
    if soft_prompt.held_by(backbone) is not None:
        return _packed_only(backbone, batch, packed_logits)
    with evaluating(backbone):
        alone = own_logits(backbone, batch, Layout.ALONE)
        why = "its output head has a structure not known here" if packed_logits is None else ""
        if packed_logits is not None:
            why = _packs(backbone, batch, alone, packed_logits)
            if not why:
                return Layout.PACKED, ""
            with quiet():
                backbone.set_attn_implementation(original)
        try:
            error = _difference(own_logits(backbone, batch, Layout.PADDED), alone)
        except (ValueError, RuntimeError, IndexError):
            error = float("inf")
    return (Layout.PADDED if error <= _tolerance(alone) else Layout.ALONE), why


def _packed_only(backbone: Any, batch: Batch, packed_logits: Callable[[Batch], Tensor] | None) -> tuple[Layout, str]:
    """With a soft prompt a row is packed and equal to the family's own forward behind it, or refused."""
    why = "its output head has a structure not known here"
    with evaluating(backbone):
        if packed_logits is not None:
            try:
                why = _packs(backbone, batch, own_logits(backbone, batch, Layout.ALONE), packed_logits)
            except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as problem:
                why = f"its own forward cannot run behind one ({type(problem).__name__})"
    if why:
        raise ModelError(f"{type(backbone).__name__} cannot have a soft prompt: {why}; use tune.method lora")
    return Layout.PACKED, ""


def _packs(backbone: Any, batch: Batch, alone: Tensor, packed_logits: Callable[[Batch], Tensor]) -> str:
    """Empty when packed equals one by one, else what happened."""
    try:
        with quiet():
            backbone.set_attn_implementation(attention.NAME)
        if backbone.config.get_text_config()._attn_implementation != attention.NAME:
            return "it has attention of its own, which would see a packed row as one long text"
        error = _difference(packed_logits(batch), alone)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as problem:
        return f"it cannot run a packed row ({type(problem).__name__})"
    return "" if error <= _tolerance(alone) else f"packed logits differ from its own by {error:.1e}"


def same_logits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two forwards of the same model agree as far as rounding lets them."""
    return _difference(ours, theirs) <= _tolerance(theirs)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    scale = theirs.float().abs().max().clamp_min(1e-6)
    return float((ours.float() - theirs.float()).abs().max() / scale)


def _tolerance(logits: Tensor) -> float:
    return 1e-4 if logits.dtype in (torch.float32, torch.float64) else 5e-2
