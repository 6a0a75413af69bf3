"""Sampler: prompts -> completions with their log-probs, from a KV cache, each rollout with its own random stream."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.data.chat import turn_end
from tunesmith.errors import ModelError
from tunesmith.model.lean import narrowed

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the KV cache, newest name first."""
PART = 256
"""Vocabulary entries that are summed together when a token is drawn."""
ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layers whose cache can be padded on the left and thinned by rows; recurrent ones cannot."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion. `ids` holds the end token when `ended`; `logprobs` has one fp32 number (nats) per id.

    `logprobs` are those of the model itself (its own temperature, nothing cut off), so they equal what
    `LanguageModel.forward` says of the same tokens, whatever temperature drew them. `text` is the completion without
    special tokens; a stop string that ended it (`stop`) and what its last token wrote behind it are cut off there,
    while `ids` keep every token that was drawn: stopping was the policy's own choice and is learned from.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    prompt_index: int = 0
    sample_index: int = 0
    text: str = ""
    stop: str = ""


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token is chosen: `temperature` 0 is the likeliest token; `top_k` 0 and `top_p` 1 cut nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature {self.temperature} must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p {self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k} must be 0 (off) or positive")
        if problems:
            raise ModelError("sampling: " + "; ".join(problems))


@dataclass(slots=True)
class _Row:
    """A rollout while it grows."""

    index: int
    number: int
    prompt: Sequence[int]
    limit: int
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    stop: str = ""


@dataclass(frozen=True, slots=True)
class _Stops:
    """What ends a completion: token ids, and strings looked for in the text of the last `window` tokens."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Any
    hidden: frozenset[int]

    def found(self, ids: Sequence[int]) -> str:
        """The string that the newest token completes, or nothing.

        A token that shows writes at least one byte, so no string lies outside the last `4 * len + 4` of them; the
        first of these may have lost a leading space to the decoder, so four are there to spare.
        """
        if not self.strings:
            return ""
        window = 4 * max(len(string) for string in self.strings) + 4
        shown = [i for i in ids if i not in self.hidden]
        tail = self.tokenizer.decode(shown[-window:])
        if not any(string in tail for string in self.strings):
            return ""
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        return first_stop(whole, self.strings)


class Sampler:
    """Completes prompts with a causal `LanguageModel`; at most `max_cache_tokens` stand in the cache at once.

    Prompts of like length share a forward (left padded, where the family allows it), completions of one prompt
    share its prefill, and finished rows leave the batch. `uses_cache` is False for families whose cache cannot be
    used so (recurrent layers); there every step computes the whole text again.
    """

    def __init__(self, language_model: Any, tokenizer: Any, *, max_cache_tokens: int = 1 << 16) -> None:
        self.model = language_model
        self.tokenizer = tokenizer
        self.max_cache_tokens = max_cache_tokens
        config = language_model.backbone.config.get_text_config()
        accepted = inspect.signature(language_model.backbone.forward).parameters
        self._cache_name = next((n for n in CACHE_NAMES if n in accepted), None)
        kinds = set(getattr(config, "layer_types", None) or ())
        self.uses_cache: bool = self._cache_name is not None and "position_ids" in accepted and kinds <= ATTENTION_KINDS
        softcap = getattr(config, "attn_logit_softcapping", None)
        self._pads = self.uses_cache and softcap is None  # a soft-capped row that sees nothing would be NaN
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._pad_id: int = config.pad_token_id or 0
        self._turn_end = turn_end(tokenizer)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_per_prompt: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens: int = 64,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> list[Rollout]:
        """`num_per_prompt` rollouts of every prompt, in the prompts' order.

        Rollout k of prompt i draws from a stream seeded by (seed, i, k): its neighbours do not change it.
        An end token is one of `end_ids` or of `stop_ids`; a completion also ends with
        the token that completes one of the strings in `stop`, wherever tokens begin and end.
        """
        draw = Draw(temperature, top_p, top_k)
        self._check(prompts, num_per_prompt, max_tokens, stop)
        ends = frozenset(self.end_ids()) | frozenset(int(i) for i in stop_ids)
        stops = _Stops(ends, tuple(stop), self.tokenizer, frozenset(self.tokenizer.all_special_ids))
        done: dict[tuple[int, int], _Row] = {}
        with _evaluating(self.model), narrowed(self.model.backbone, self.model.compute):
            for indices in self._groups(prompts, num_per_prompt, max_tokens):
                rows = [self._row(i, k, prompts[i], max_tokens, seed) for i in indices for k in range(num_per_prompt)]
                self._complete(rows, num_per_prompt, draw, stops)
                done.update({(row.index, row.number): row for row in rows})
        return [self._rollout(done[i, k]) for i in range(len(prompts)) for k in range(num_per_prompt)]

    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the tokenizer's end token, what ends an answer in its chat template, and those of
        the generation config."""
        settings = getattr(self.model.backbone, "generation_config", None)
        found = [self.tokenizer.eos_token_id, self._turn_end, getattr(settings, "eos_token_id", None)]
        flat = [i for entry in found for i in (entry if isinstance(entry, list) else [entry])]
        return tuple(sorted({int(i) for i in flat if i is not None}))

    def _check(
        self, prompts: Sequence[Sequence[int]], num_per_prompt: int, max_tokens: int, stop: Sequence[str]
    ) -> None:
        problems = [
            f"prompt {i} is empty: begin with a token, for instance bos" for i, p in enumerate(prompts) if len(p) == 0
        ]
        if self._max_positions is not None:
            problems += [
                f"prompt {i} has {len(p)} tokens and the model takes {self._max_positions} in all: shorten it"
                for i, p in enumerate(prompts)
                if len(p) >= self._max_positions
            ]
        if num_per_prompt < 1 or max_tokens < 1:
            problems.append(f"num_per_prompt {num_per_prompt} and max_tokens {max_tokens} must be at least 1")
        if not all(stop):
            problems.append("a stop string is empty: it would end every completion at once")
        if problems:
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ModelError("sampling: " + "; ".join(problems[:20]) + more)

    def _row(self, index: int, number: int, prompt: Sequence[int], max_tokens: int, seed: int) -> _Row:
        room = max_tokens if self._max_positions is None else min(max_tokens, self._max_positions - len(prompt))
        generator = torch.Generator(device=self.model.backbone.device).manual_seed(stream_seed(seed, index, number))
        return _Row(index, number, prompt, room, generator)

    def _rollout(self, row: _Row) -> Rollout:
        prompt = tuple(int(i) for i in row.prompt)
        text = str(self.tokenizer.decode(row.ids, skip_special_tokens=True))
        if row.stop:
            text = text[: text.index(row.stop)]
        ids, logprobs = tuple(row.ids), tuple(row.logprobs)
        return Rollout(prompt, ids, logprobs, row.ended, row.index, row.number, text, row.stop)

    def _groups(self, prompts: Sequence[Sequence[int]], num: int, max_tokens: int) -> Iterator[list[int]]:
        """Indices of prompts that share a batch: sorted by length, within the cache budget."""
        group: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
            full = (len(group) + 1) * num * (len(prompts[i]) + max_tokens) > self.max_cache_tokens
            if group and (full or (not self._pads and len(prompts[i]) != len(prompts[group[-1]]))):
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _complete(self, rows: list[_Row], num: int, draw: Draw, stops: _Stops) -> None:
        """Grow every row until it ends. The prompt runs once for `num` neighbouring rows."""
        device = self.model.backbone.device
        ids, mask = _left_padded([row.prompt for row in rows[::num]], self._pad_id, device)
        logits, cache = self._forward(ids, mask, None)
        ids, mask, logits = (t.repeat_interleave(num, 0) for t in (ids, mask, logits))
        if cache is not None and num > 1:
            cache.batch_repeat_interleave(num)
        while True:
            tokens, logprobs = next_tokens(
                logits, draw, [row.generator for row in rows], temperature=self.model.temperature
            )
            alive = _grow(rows, tokens, logprobs, stops)
            if not alive:
                return
            if len(alive) < len(rows):
                rows = [rows[i] for i in alive]
                kept = torch.tensor(alive, device=device)
                ids, mask, tokens = ids[kept], mask[kept], tokens[kept]
                if cache is not None:
                    cache.batch_select_indices(kept)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            ids = torch.cat([ids, tokens[:, None]], 1)
            logits, cache = self._forward(ids, mask, cache)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """fp32 logits of the next token `[N, V]` and the cache; without a cache everything is computed again."""
        model = self.model
        low = model.compute != torch.float32
        with torch.autocast(ids.device.type, model.compute, enabled=low):
            if not self.uses_cache:
                return model.backbone(input_ids=ids, use_cache=False, **self._keep).logits[:, -1].float(), None
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            if cache is not None:
                ids, positions = ids[:, -1:], positions[:, -1:]
            out = model.backbone(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{str(self._cache_name): cache},
                **self._keep,
            )
        return out.logits[:, -1].float(), out[str(self._cache_name)]


def first_stop(text: str, strings: Sequence[str]) -> str:
    """The string that begins first in `text` (the longest of several at one place), or nothing."""
    places = [(text.index(string), -len(string), string) for string in strings if string in text]
    return min(places)[2] if places else ""


def stream_seed(seed: int, index: int, number: int) -> int:
    """A 63-bit seed for rollout `number` of prompt `index`; near arguments give unrelated seeds."""
    digest = hashlib.blake2b(f"rollout/{seed}/{index}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def next_tokens(
    logits: Tensor, draw: Draw, generators: Sequence[torch.Generator], *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row: `logits [N, V]` -> ids `[N]`, and log-probs `[N]` (nats) at the model's `temperature`.

    Raises ModelError where a row's logits, or what the temperature makes of them, are no numbers.
    """
    own = logits if temperature == 1.0 else logits / temperature
    total = _sound(own.logsumexp(1))
    if draw.temperature == 0.0:
        tokens = logits.argmax(1)
    else:
        warm = logits if draw.temperature == 1.0 else logits / draw.temperature
        tokens = _drawn(cut(warm, draw), generators)
    return tokens, own.gather(1, tokens[:, None])[:, 0] - total


def _sound(sums: Tensor) -> Tensor:
    """`sums` over the vocabulary, which are finite where there is a distribution to draw from."""
    bad = ~sums.isfinite()
    if bool(bad.any()):
        raise ModelError(
            f"no next token can be drawn: the logits of {int(bad.sum())} of {len(sums)} rows hold NaN or "
            "infinity. The model's weights are damaged, or the temperature is too near 0: 0 itself is greedy"
        )
    return sums


def _drawn(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row from softmax(logits), by one uniform number per row and the inverse of the distribution.

    The sums are taken in two stages, over parts of the vocabulary and inside the part that is hit, in float64: no
    cumulative sum over the vocabulary and no noise of its size (docs/log.md).
    """
    weights = (logits - logits.amax(1, keepdim=True)).exp_()
    parts = nn.functional.pad(weights, (0, -weights.shape[1] % PART)).view(len(weights), -1, PART)
    edges = parts.sum(2, dtype=torch.float64).cumsum(1)
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64, device=g.device) for g in generators])
    aim = uniform * _sound(edges[:, -1])
    part = torch.searchsorted(edges, aim[:, None], right=True).clamp_max(edges.shape[1] - 1)
    before = torch.where(part > 0, edges.gather(1, (part - 1).clamp_min(0)), 0.0)
    inside = parts.gather(1, part[:, :, None].expand(-1, -1, PART))[:, 0].double().cumsum(1)
    rest = torch.minimum(aim[:, None] - before, inside[:, -1:] * (1 - 1e-12))
    return (part * PART + torch.searchsorted(inside, rest, right=True))[:, 0]


def cut(logits: Tensor, draw: Draw) -> Tensor:
    """`logits [N, V]` with -inf outside the `top_k` likeliest, then outside the smallest set of mass >= `top_p`.

    With probabilities 0.5, 0.3, 0.2: top_p 0.5 keeps the first, 0.6 the first two (nucleus, 1904.09751, 3.1).
    """
    if 0 < draw.top_k < logits.shape[1]:
        best = logits.topk(draw.top_k, dim=1)
        logits = torch.full_like(logits, float("-inf")).scatter(1, best.indices, best.values)
    if draw.top_p < 1.0:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        mass = ordered.softmax(1)
        outside = mass.cumsum(1) - mass >= draw.top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.gather(1, order.argsort(1)), float("-inf"))
    return logits


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(p)) + [int(i) for i in p] for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _grow(rows: Sequence[_Row], tokens: Tensor, logprobs: Tensor, stops: _Stops) -> list[int]:
    """Append what was drawn; indices of the rows that go on."""
    alive = []
    for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.stop = "" if token in stops.ids else stops.found(row.ids)
        row.ended = token in stops.ids or bool(row.stop)
        if not row.ended and len(row.ids) < row.limit:
            alive.append(i)
    return alive


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients; every submodule's own mode is put back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
