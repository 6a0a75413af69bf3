"""Decoding for Llama-like families: one more token for many rows in few large products, and a cache that never moves.

What a family's own forward does for one token is mostly overhead: masks, rotary tables and caches made anew, three
products where one would do. Here the layers are read once into what a step needs. A backbone that is built in any
other way, by its structure or by the logits of a probe, is not read at all, and the sampler runs the family's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model import soft_prompt
from tunesmith.model.heads import LanguageHead
from tunesmith.model.lean import FrozenLinear, LeanRMSNorm, lean_norm
from tunesmith.model.lora import LoraLinear, weight_matrix
from tunesmith.model.packing import attention_windows, switch_tokens
from tunesmith.ops_norm import rms_norm

JOINED = 1 << 22
"""Elements up to which the matrices of several linears with one input are copied into one; larger ones are not held
twice."""
AGREE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of a probe's logits from the family's own, as a share of the largest logit. Only a backbone whose
weights are all held in 16 bits is probed in them: they tell kindred families apart less surely."""
PROBE = ((5, 9, 3, 7, 4, 6), (8, 3, 6))
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_CORE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_ROTARY = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate", "original_max_position_embeddings",
    "partial_rotary_factor",
}  # fmt: skip
"""What rotary parameters may hold: all of it ends up in the tables of `rotary_emb`."""


class UnreadableError(Exception):
    """The backbone is not built the way that is read here; the message says where."""


@dataclass(frozen=True, slots=True)
class _Product:
    """x [n, k] -> [n, d]: `x Wᵀ + bias + (x Aᵀ) Bᵀ` of linears with one input, side by side; B holds the scaling."""

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.weights) == 1:
            out = F.linear(x, self.weights[0].to(x.dtype), self.bias)
        else:
            out = torch.cat([F.linear(x, weight.to(x.dtype)) for weight in self.weights], 1)
            out = out if self.bias is None else out.add_(self.bias)
        return out if self.down is None or self.up is None else out.addmm_(x @ self.down, self.up)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block: what stands before and after attention, and the gated MLP."""

    before: _Norm
    query_key_value: _Product
    head_norms: tuple[_Norm, _Norm] | None
    out: _Product
    after: _Norm
    gate_up: _Product
    activation: Callable[[Tensor], Tensor]
    down: _Product
    scaling: float


class Decoder:
    """Logits of the next token for rows that grow together: `begin` with prompts, then `step` by step.

    Adapters are applied as they stand beside their frozen linears; weights are read when it is made, so make it anew
    after a change. The cache of each layer has its full length from the start, keys `[rows · Hkv, d, longest]` as the
    product with queries reads them fastest and values `[rows · Hkv, longest, d]` (docs/log.md). Thinning it copies it,
    so an eighth of the rows may be finished and stay (`spare`).
    """

    spare = 0.125

    def __init__(self, backbone: Any, head: LanguageHead, dtype: torch.dtype, *, copies: bool = True) -> None:
        """Without `copies` weights stay as they are held, and are widened or rounded one by one at every product.

        Raises UnreadableError.
        """
        core, read = _core(backbone, head), partial(_product, dtype=dtype, copies=copies)
        self._rotary, self._embed = core.rotary_emb, core.embed_tokens
        self._layers = [_read_layer(layer, dtype, read) for layer in core.layers]
        self._norm, self._head = _norm(core.norm, dtype), read([head.decoder])
        self._scale, self._softcap = head.scale, head.softcap
        self._size, self._query_heads, self._key_heads = _heads(core.layers)
        self._dtype = dtype
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._used = 0

    def begin(self, ids: Tensor, real: Tensor, num: int, room: int) -> Tensor:
        """Run left-padded prompts `ids, real [N, T]` -> logits `[N * num, V]`, `num` neighbouring rows of each prompt;
        `room` more tokens will fit."""
        rows, width = ids.shape
        self._keys, self._values = [], []  # those of rows before leave first
        heads, longest = rows * num * self._key_heads, width + room
        empty = partial(torch.empty, dtype=self._dtype, device=ids.device)
        self._keys = [empty(heads, self._size, longest) for _ in self._layers]
        self._values = [empty(heads, longest, self._size) for _ in self._layers]
        self._places = (real.cumsum(1) - 1).clamp_min(0)
        self._rotation = self._turns(longest)
        lowest = torch.finfo(self._dtype).min
        self._hidden = torch.zeros(rows, 1, 1, longest, device=ids.device)
        self._hidden[..., :width].masked_fill_(~real[:, None, None].bool(), lowest)
        self._used = 0
        hidden = self._forward(ids, self._places, self._prompt_mask(width), num)
        self._hidden = self._hidden.repeat_interleave(num, 0)
        self._places = self._places[:, -1:].repeat_interleave(num, 0)
        return self._logits(hidden.view(rows, width, -1)[:, -1]).repeat_interleave(num, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Put `tokens [N]` behind the rows -> logits `[N, V]`, fp32."""
        self._places = self._places + 1
        hidden = self._hidden[..., : self._used + 1]
        return self._logits(self._forward(tokens[:, None], self._places, hidden, 1))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        heads = (rows[:, None] * self._key_heads + torch.arange(self._key_heads, device=rows.device)).flatten()
        for cache in (self._keys, self._values):
            for number, kept in enumerate(cache):
                cache[number] = kept[heads]
        self._hidden, self._places = self._hidden[rows], self._places[rows]

    def _prompt_mask(self, width: int) -> Tensor | None:
        """What is added to the scores of left-padded prompts, `[N, 1, T, T]`; None where they are all of one length."""
        padding = self._hidden[..., :width]
        if not bool(padding.any()):
            return None
        ahead = torch.full((width, width), torch.finfo(self._dtype).min, device=padding.device).triu_(1)
        return torch.minimum(padding, ahead).to(self._dtype)

    def _turns(self, longest: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of every position, `[longest, d]`: x turned is x cos + roll(x, d / 2) sin."""
        positions = torch.arange(longest, device=self._embed.weight.device)[None]
        cos, sin = (part[0] for part in self._rotary(torch.empty(0, device=positions.device), positions))
        if cos.shape[-1] != self._size:
            raise UnreadableError("only a part of each head is turned")
        half = self._size // 2
        return cos.to(self._dtype), torch.cat([-sin[:, :half], sin[:, half:]], 1).to(self._dtype)

    def _forward(self, ids: Tensor, places: Tensor, hidden: Tensor | None, num: int) -> Tensor:
        """Last hidden states `[N * T, D]` of `ids [N, T]`, whose keys and values go into the cache."""
        rows, width = ids.shape
        x = self._embed(ids.reshape(-1)).float()
        cos, sin = (part[places].view(rows * width, 1, -1) for part in self._rotation)
        for number, layer in enumerate(self._layers):
            q, k, v = self._turned(layer, layer.before(x), cos, sin)
            k, v = self._cached(number, k.view(rows, width, -1, self._size), v.view(rows, width, -1, self._size), num)
            x.add_(layer.out(self._attended(q.view(rows, width, -1, self._size), k, v, hidden, layer.scaling)))
            gate, up = layer.gate_up(layer.after(x)).chunk(2, 1)
            x.add_(layer.down(layer.activation(gate).mul_(up)))
        self._used += width
        return x

    def _cached(self, number: int, k: Tensor, v: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Put new keys and values `[N, T, Hkv, d]` into a layer's cache -> all that a query may see,
        `[N · Hkv, d, S]` and `[N · Hkv, S, d]`."""
        here = slice(self._used, self._used + k.shape[1])
        k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)
        kept = (k, v) if num == 1 else (part.repeat_interleave(num, 0) for part in (k, v))
        for cache, part, place in zip((self._keys[number], self._values[number]), kept, (2, 1), strict=True):
            cache.narrow(place, here.start, here.stop - here.start).copy_(part.flatten(0, 1))
        if not self._used:
            return k.flatten(0, 1), v.flatten(0, 1)
        return self._keys[number][:, :, : here.stop], self._values[number][:, : here.stop]

    def _turned(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[n, heads, d]`; the first two turned by their positions."""
        every = layer.query_key_value(x).view(len(x), -1, self._size)
        both, values = every.split([self._query_heads + self._key_heads, self._key_heads], 1)
        if layer.head_norms is not None:
            parts = both.split([self._query_heads, self._key_heads], 1)
            both = torch.cat([norm(part) for norm, part in zip(layer.head_norms, parts, strict=True)], 1)
        both = torch.addcmul(both * cos, both.roll(self._size // 2, -1), sin)
        queries, keys = both.split([self._query_heads, self._key_heads], 1)
        return queries, keys, values

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scaling: float) -> Tensor:
        """`q [N, T, H, d]` over cached keys and values -> `[N · T, H · d]`.

        For one query a row, heads that share a key stand below each other as if they were queries of one head, and
        weights are fp32; a prompt's are never all there at one time.
        """
        rows, width, heads, size = q.shape
        if width > 1:
            keys = k.view(rows, -1, size, width).transpose(2, 3).contiguous()
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, v.reshape(keys.shape), attn_mask=hidden, is_causal=hidden is None,
                scale=scaling, enable_gqa=heads != keys.shape[1],
            )  # fmt: skip
            return out.transpose(1, 2).reshape(rows * width, -1)
        scores = torch.bmm(q.reshape(len(k), -1, size), k).view(rows, heads, 1, -1).float().mul_(scaling)
        weights = (scores if hidden is None else scores.add_(hidden)).softmax(-1).to(self._dtype)
        return torch.bmm(weights.view(len(k), -1, k.shape[2]), v).view(rows, -1)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(self._norm(hidden)).float()
        logits = logits if self._scale == 1.0 else logits.mul_(self._scale)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


@torch.no_grad()
def why_not(backbone: Any, head: LanguageHead | None, dtype: torch.dtype) -> str:
    """Empty when a Decoder reads this backbone and gives its logits; else what is different."""
    if head is None:
        return "its output head has a structure not known here"
    held = backbone.get_input_embeddings().weight.dtype
    if held not in (torch.float32, dtype):
        return f"it is held in {held} and computed in {dtype}"
    vocabulary = int(backbone.config.get_text_config().vocab_size)
    probe = [[i % vocabulary for i in row] for row in PROBE]
    try:
        found = _probed(Decoder(backbone, head, held, copies=False), probe, backbone.device)
        rows = [torch.tensor([row], device=backbone.device) for row in probe]
        expected = torch.cat([backbone(input_ids=row, use_cache=False).logits[:, -1] for row in rows]).float()
    except torch.OutOfMemoryError:
        raise
    except (UnreadableError, AttributeError, TypeError, IndexError, RuntimeError) as problem:
        return str(problem).splitlines()[0]
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return "" if error <= AGREE[held] else f"its logits differ from the family's own by {error:.1e}"


def _probed(decoder: Decoder, probe: Sequence[Sequence[int]], device: Any) -> Tensor:
    """Logits behind the last token of each row; all but that token are the prompt."""
    width = max(map(len, probe)) - 1
    prompts = [[0] * (width - len(row) + 1) + list(row[:-1]) for row in probe]
    real = [[0] * (width - len(row) + 1) + [1] * (len(row) - 1) for row in probe]
    decoder.begin(torch.tensor(prompts, device=device), torch.tensor(real, device=device), 1, 1)
    return decoder.step(torch.tensor([row[-1] for row in probe], device=device))


def _core(backbone: Any, head: LanguageHead) -> Any:
    """The part below the head, when all it has is what is read here."""
    core = backbone.base_model
    if soft_prompt.active(backbone) is not None:
        raise UnreadableError("a soft prompt stands before its tokens")
    if _children(core) != _CORE or not all(_children(layer) == _LAYER for layer in core.layers):
        raise UnreadableError(f"{type(core).__name__} is not built like a Llama")
    config = backbone.config.get_text_config()
    if switch_tokens(config) is not None:
        raise UnreadableError("its rotary scaling changes with the length")
    if attention_windows(config):
        raise UnreadableError("its attention sees a window")
    if unknown := set(getattr(config, "rope_parameters", None) or {}) - _ROTARY:
        raise UnreadableError(f"its rotary parameters hold {', '.join(sorted(unknown))}")
    if type(core.embed_tokens) is not nn.Embedding:
        raise UnreadableError("its embeddings are of a kind not known here")
    inner = [part for layer in core.layers for part in (layer, layer.self_attn, layer.mlp)]
    if any(next(part.parameters(recurse=False), None) is not None for part in (core, *inner)):
        raise UnreadableError("it has parameters outside linears, norms and embeddings")
    return core


def _heads(layers: Any) -> tuple[int, int, int]:
    """(size of a head, query heads, key heads), the same in every layer."""
    parts = [layer.self_attn for layer in layers]
    shapes = {(int(part.head_dim), part.q_proj.out_features, part.k_proj.out_features) for part in parts}
    if len(shapes) > 1 or not all(getattr(part, "use_rope", True) for part in parts):
        raise UnreadableError("its layers differ in their attention")
    size, queries, keys = shapes.pop()
    return size, queries // size, keys // size


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _read_layer(layer: Any, dtype: torch.dtype, read: Callable[[Sequence[nn.Module]], _Product]) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    extra = _children(attention) - _ATTENTION
    if extra not in (set(), {"q_norm", "k_norm"}) or _children(mlp) - {"act_fn"} != _MLP:
        raise UnreadableError(f"{type(attention).__name__} or {type(mlp).__name__} has parts not known here")
    norms = (_norm(attention.q_norm, dtype), _norm(attention.k_norm, dtype)) if extra else None
    return _Layer(
        before=_norm(layer.input_layernorm, dtype),
        query_key_value=read([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=norms,
        out=read([attention.o_proj]),
        after=_norm(layer.post_attention_layernorm, dtype),
        gate_up=read([mlp.gate_proj, mlp.up_proj]),
        activation=getattr(mlp, "act_fn", F.silu),
        down=read([mlp.down_proj]),
        scaling=float(attention.scaling),
    )


def _norm(module: nn.Module, dtype: torch.dtype) -> _Norm:
    lean = module if isinstance(module, LeanRMSNorm) else lean_norm(module)
    if lean is None:
        raise UnreadableError(f"{type(module).__name__} is not an RMSNorm known here")
    return _Norm((lean.weight + lean.offset).float(), lean.eps, dtype)


def _product(modules: Sequence[nn.Module], *, dtype: torch.dtype, copies: bool) -> _Product:
    bases = [module.base if isinstance(module, LoraLinear) else module for module in modules]
    odd = next((base for base in bases if type(base) not in (nn.Linear, FrozenLinear)), None)
    if odd is not None:
        raise UnreadableError(f"it has a {type(odd).__name__} where a linear is expected")
    biases = [cast("Tensor | None", base.bias) for base in bases]
    down, up = _update([m for m in modules if isinstance(m, LoraLinear)], modules, dtype)
    weights = [weight_matrix(base, dtype if copies else None) for base in bases]
    if copies and len(weights) > 1 and sum(weight.numel() for weight in weights) <= JOINED:
        weights = [torch.cat(weights)]
    bias = None
    if any(part is not None for part in biases):
        sizes = [weight_matrix(base).shape[0] for base in bases]
        none = partial(torch.zeros, dtype=dtype, device=weights[0].device)
        parts = [none(n) if b is None else b.to(dtype) for b, n in zip(biases, sizes, strict=True)]
        bias = torch.cat(parts)
    return _Product(tuple(weights), bias, down, up)


def _update(
    layers: Sequence[LoraLinear], modules: Sequence[nn.Module], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(Aᵀ [k, ΣR], s Bᵀ [ΣR, Σd]) of the adapters beside these linears: each writes to its own columns."""
    live = [layer for layer in layers if layer.enabled and not layer.merged]
    if any(layer.lora_magnitude_vector is not None for layer in live):
        raise UnreadableError("DoRA stretches what its linears give")
    if not live:
        return None, None
    pairs = {id(layer): layer.pair() for layer in live}
    sizes = [cast(Any, module).out_features for module in modules]
    up = live[0].lora_B.new_zeros(sum(a.shape[0] for a, _ in pairs.values()), sum(sizes))
    row = column = 0
    for module, size in zip(modules, sizes, strict=True):
        if id(module) in pairs:
            _, b = pairs[id(module)]
            up[row : row + b.shape[1], column : column + size] = b.t() * cast(LoraLinear, module).scaling
            row += b.shape[1]
        column += size
    return torch.cat([a for a, _ in pairs.values()]).t().to(dtype), up.to(dtype)
