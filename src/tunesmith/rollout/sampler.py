"""Sampler: prompts -> completions with their log-probs, from a KV cache, each rollout with its own random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.data.chat import turn_end
from tunesmith.errors import ModelError
from tunesmith.model import soft_prompt
from tunesmith.model.decoding import Decoder, UnreadableError, why_not
from tunesmith.model.heads import language_head
from tunesmith.model.lean import narrowed
from tunesmith.model.packing import evaluating
from tunesmith.rollout.steps import FamilySteps, Steps, cache_name

PART = 256
"""Vocabulary entries that are summed together when a token is drawn."""


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

    @property
    def done(self) -> bool:
        return self.ended or len(self.ids) >= self.limit


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
    share its prefill, and finished rows leave the batch. `why_slow` is empty when the layers are read for decoding
    (`model/decoding.py`), and says why the family's own forward runs otherwise. `uses_cache` is False for families
    whose cache cannot be padded (recurrent layers); there every step computes the whole text again.
    """

    def __init__(self, language_model: Any, tokenizer: Any, *, max_cache_tokens: int = 1 << 16) -> None:
        self.model = language_model
        self.tokenizer = tokenizer
        self.max_cache_tokens = max_cache_tokens
        config = language_model.backbone.config.get_text_config()
        self.uses_cache: bool = cache_name(language_model.backbone) is not None
        softcap = getattr(config, "attn_logit_softcapping", None)
        self._pads = self.uses_cache and softcap is None  # a soft-capped row that sees nothing would be NaN
        self._pad_id: int = config.pad_token_id or 0
        self._turn_end = turn_end(tokenizer)
        self.why_slow: str | None = None if self.uses_cache else "its cache cannot be padded"
        self._behind = soft_prompt.num_virtual(language_model.backbone)

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
        with evaluating(self.model), self._steps() as steps:
            for indices in self._groups(prompts, num_per_prompt, max_tokens):
                rows = [self._row(i, k, prompts[i], max_tokens, seed) for i in indices for k in range(num_per_prompt)]
                self._complete(steps, rows, num_per_prompt, draw, stops)
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
        longest = soft_prompt.context_tokens(self.model.backbone)
        if longest is not None:
            problems += [
                f"prompt {i} has {len(p)} tokens and the model takes {longest} in all: shorten it"
                for i, p in enumerate(prompts)
                if len(p) >= longest
            ]
        if num_per_prompt < 1 or max_tokens < 1:
            problems.append(f"num_per_prompt {num_per_prompt} and max_tokens {max_tokens} must be at least 1")
        if not all(stop):
            problems.append("a stop string is empty: it would end every completion at once")
        if problems:
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ModelError("sampling: " + "; ".join(problems[:20]) + more)

    def _row(self, index: int, number: int, prompt: Sequence[int], max_tokens: int, seed: int) -> _Row:
        longest = soft_prompt.context_tokens(self.model.backbone)
        room = max_tokens if longest is None else min(max_tokens, longest - len(prompt))
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
        more = soft_prompt.num_virtual(self.model.backbone) + max_tokens
        for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
            full = (len(group) + 1) * num * (len(prompts[i]) + more) > self.max_cache_tokens
            if group and (full or (not self._pads and len(prompts[i]) != len(prompts[group[-1]]))):
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    @contextmanager
    def _steps(self) -> Iterator[Steps]:
        """What makes the next logits, with the weights as they are now."""
        model = self.model
        with torch.autocast(model.backbone.device.type, enabled=False):
            if (decoder := self._decoder()) is not None:
                yield decoder
                return
        with narrowed(model.backbone, model.compute):
            yield FamilySteps(model, cached=self.uses_cache)

    def _decoder(self) -> Decoder | None:
        """The backbone read for decoding, where it can be: a reading that fails this time says nothing of the next."""
        backbone, compute = self.model.backbone, self.model.compute
        head = language_head(backbone, causal=True)
        behind = soft_prompt.num_virtual(backbone)
        if self.why_slow is None or (self.uses_cache and behind != self._behind):
            self.why_slow, self._behind = why_not(backbone, head, compute), behind
        if head is None or self.why_slow:
            return None
        try:
            return Decoder(backbone, head, compute)
        except UnreadableError:
            return None

    def _complete(self, steps: Steps, rows: list[_Row], num: int, draw: Draw, stops: _Stops) -> None:
        """Grow every row until it ends. The prompt runs once for `num` neighbouring rows."""
        device = self.model.backbone.device
        ids, real = _left_padded([row.prompt for row in rows[::num]], self._pad_id, device)
        logits = steps.begin(ids, real, num, max(row.limit for row in rows))
        while True:
            tokens, logprobs = next_tokens(
                logits, draw, [row.generator for row in rows], temperature=self.model.temperature
            )
            _grow(rows, tokens, logprobs, stops)
            alive = [i for i, row in enumerate(rows) if not row.done]
            if not alive:
                return
            if len(alive) < len(rows) and len(alive) <= (1 - steps.spare) * len(rows):
                rows = [rows[i] for i in alive]
                kept = torch.tensor(alive, device=device)
                tokens = tokens[kept]
                steps.keep(kept)
            logits = steps.step(tokens)


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
    scaled = logits if temperature == 1.0 else logits / temperature
    own = _probabilities(scaled)
    if draw.temperature == 0.0:
        tokens = logits.argmax(1)
    elif draw == Draw(temperature):
        tokens = _drawn(own, generators)
    else:
        warm = logits if draw.temperature == 1.0 else logits / draw.temperature
        tokens = _drawn(_probabilities(cut(warm, draw)), generators)
    below = scaled.gather(1, tokens[:, None])[:, 0] - scaled.amax(1)
    return tokens, below + own.amax(1).log()  # from the likeliest down: a token's own probability may be 0 in fp32


def _probabilities(logits: Tensor) -> Tensor:
    """softmax(logits) `[N, V]`, where there is a distribution to draw from."""
    found = logits.softmax(1)
    bad = ~found[:, 0].isfinite()  # one number that is none makes the whole row so
    if bool(bad.any()):
        raise ModelError(
            f"no next token can be drawn: the logits of {int(bad.sum())} of {len(logits)} rows hold NaN or "
            "infinity. The model's weights are damaged, or the temperature is too near 0: 0 itself is greedy"
        )
    return found


def _drawn(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row of probabilities `[N, V]`, by one uniform number per row and the inverse of the distribution.

    The sums are taken in two stages, over parts of the vocabulary and inside the part that is hit, then in float64:
    no cumulative sum over the vocabulary and no noise of its size (docs/log.md).
    """
    more = -weights.shape[1] % PART
    parts = (nn.functional.pad(weights, (0, more)) if more else weights).view(len(weights), -1, PART)
    edges = parts.sum(2).double().cumsum(1)
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64, device=g.device) for g in generators])
    aim = uniform * edges[:, -1]
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


def _grow(rows: Sequence[_Row], tokens: Tensor, logprobs: Tensor, stops: _Stops) -> None:
    """Append what was drawn to the rows that are not done."""
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        if row.done:
            continue
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.stop = "" if token in stops.ids else stops.found(row.ids)
        row.ended = token in stops.ids or bool(row.stop)
