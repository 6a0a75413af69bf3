"""Request bodies -> what is asked of the model, and answers in OpenAI's shapes. Knows no socket and no model."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.kinds import Message

DEFAULT_TOKENS = 256
"""Most tokens of a completion when a request does not say."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one request may ask for, and how many may wait."""

    body_bytes: int = 1 << 20
    max_tokens: int = 1024
    completions: int = 16
    texts: int = 256
    stops: int = 4
    connections: int = 64
    waiting: int = 16
    read_seconds: float = 10.0


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status and what OpenAI's error object holds."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def as_json(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Draw:
    """How completions are drawn."""

    max_tokens: int = DEFAULT_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """Texts to go on with, or one conversation to answer."""

    texts: tuple[str, ...]
    messages: tuple[Message, ...]
    draw: Draw


@dataclass(frozen=True, slots=True)
class Written:
    """One completion; `ended` by itself or at a stop text, else at the most tokens."""

    text: str
    num_tokens: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Completions, `n` for each prompt in the prompts' order, and the tokens of the prompts together."""

    written: tuple[Written, ...]
    prompt_tokens: int


_DRAWN = {"max_tokens", "temperature", "top_p", "n", "seed", "stop"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "stream_options": (), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,),
    "best_of": (1,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],),
}  # fmt: skip
"""Keys of OpenAI's that nothing here acts on, with the values that ask for nothing; null is always one."""


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Raises RequestError 400 for anything else, NaN, bottomless nesting and halves of surrogate
    pairs, which are no text, included."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:120]}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError(400, f"the body is a JSON {type(found).__name__}, not an object", code="invalid_json")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def parse_completion(body: Mapping[str, Any], limits: Limits, model: str) -> Ask:
    """The body of `/v1/completions`: texts that are gone on with as they stand."""
    draw = _draw(body, {"prompt"}, limits, model)
    prompt = body.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "`prompt` is a text or a list of texts", param="prompt")
    if len(texts) * draw.n > limits.completions:
        raise RequestError(400, f"{len(texts)} prompts times `n` {draw.n} is more than the {limits.completions} "
                           "completions that one request may ask for", param="n")  # fmt: skip
    return Ask(tuple(texts), (), draw)


def parse_chat(body: Mapping[str, Any], limits: Limits, model: str) -> Ask:
    """The body of `/v1/chat/completions`: a conversation whose next turn is asked for."""
    renamed = dict(body)
    if "max_completion_tokens" in renamed:
        renamed["max_tokens"] = renamed.pop("max_completion_tokens")
    draw = _draw(renamed, {"messages"}, limits, model)
    turns = renamed.get("messages")
    if not isinstance(turns, list) or not turns:
        raise RequestError(400, "`messages` is a list of {role, content}, and not empty", param="messages")
    messages = tuple(_message(turn, i) for i, turn in enumerate(turns))
    if messages[-1].role == "assistant":
        raise RequestError(400, "the last message is the assistant's: end with what it should answer", param="messages")
    return Ask((), messages, draw)


def _message(turn: Any, i: int) -> Message:
    where = f"messages[{i}]"
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise RequestError(400, f"{where} needs a `role`, one of {', '.join(ROLES)}", param=f"{where}.role")
    content = turn.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise RequestError(400, f"{where} needs a `content` that is text", param=f"{where}.content")
    return Message(str(turn["role"]), content)


def _draw(body: Mapping[str, Any], own: set[str], limits: Limits, model: str) -> Draw:
    if body.get("model") not in (None, model):
        raise RequestError(404, f"`model` {body['model']!r} is not here; this server has {model!r}", param="model",
                           code="model_not_found")  # fmt: skip
    _refuse_unknown(body, own | _DRAWN | {"model", "user"})
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > limits.stops:
        raise RequestError(400, f"`stop` is a text or up to {limits.stops} of them, none empty", param="stop")
    most = min(DEFAULT_TOKENS, limits.max_tokens)
    seed = _whole(body, "seed", secrets.randbits(48), 0, 2**63 - 1)
    return Draw(
        max_tokens=_whole(body, "max_tokens", most, 1, limits.max_tokens),
        temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        n=_whole(body, "n", 1, 1, limits.completions),
        seed=seed,
        stop=tuple(stops),
    )


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    """A key that would be ignored is an error, unless its value asks for nothing."""
    for key, value in body.items():
        neutral = value is None or any(value == allowed for allowed in _NEUTRAL.get(key, ()))
        if key not in known and not neutral:
            what = "is not supported here" if key in _NEUTRAL else "is not known"
            raise RequestError(400, f"`{key}` {what}; this endpoint takes {', '.join(sorted(known))}", param=key)


def _whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(400, f"`{name}` is a whole number from {low} to {high}", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(400, f"`{name}` is a number from {low:g} to {high:g}", param=name)
    return float(value) if math.isfinite(value) else default


def parse_texts(body: Mapping[str, Any], limits: Limits, model: str) -> list[str]:
    """The body of `/predict` for a classifier: `text`, or a list `texts`."""
    return [row["text"] for row in _rows(body, ("text",), "texts", limits, model)]


def parse_answers(body: Mapping[str, Any], limits: Limits, model: str) -> list[dict[str, str]]:
    """The body of `/predict` for a reward model: `prompt` and `response`, or a list `rows` of such."""
    return _rows(body, ("prompt", "response"), "rows", limits, model)


def _rows(
    body: Mapping[str, Any], fields: tuple[str, ...], several: str, limits: Limits, model: str
) -> list[dict[str, str]]:
    if body.get("model") not in (None, model):
        raise RequestError(404, f"`model` {body['model']!r} is not here; this server has {model!r}", param="model")
    _refuse_unknown(body, {*fields, several, "model"})
    named = [name for name in fields if name in body]
    if bool(named) == (several in body):
        raise RequestError(400, f"give `{'` and `'.join(fields)}`, or a list `{several}`", param=several)
    rows: Any = body[several] if several in body else [{name: body.get(name) for name in fields}]
    if isinstance(rows, list) and len(fields) == 1 and several in body:
        rows = [{fields[0]: row} for row in rows]
    if not isinstance(rows, list) or not 1 <= len(rows) <= limits.texts:
        raise RequestError(400, f"`{several}` is a list of 1 to {limits.texts}", param=several)
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in fields):
            raise RequestError(400, f"row {i} needs `{'` and `'.join(fields)}` as text", param=several)
    return [{name: row[name] for name in fields} for row in rows]


def completion_json(ask: Ask, answer: Answer, model: str) -> dict[str, Any]:
    """The answer of either endpoint; `seed` is the one that was drawn with."""
    chat = bool(ask.messages)
    choices = [_choice(i, written, chat) for i, written in enumerate(answer.written)]
    written = sum(one.num_tokens for one in answer.written)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": written,
                  "total_tokens": answer.prompt_tokens + written},
        "seed": ask.draw.seed,
    }  # fmt: skip


def _choice(index: int, written: Written, chat: bool) -> dict[str, Any]:
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": written.text}} if chat else {"text": written.text}
    )
    return {"index": index, **said, "logprobs": None, "finish_reason": "stop" if written.ended else "length"}


def models_json(model: str) -> dict[str, Any]:
    """The answer of `/v1/models`."""
    return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "tunesmith"}]}


def predictions_json(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """The answer of `/predict`."""
    return {"model": model, "predictions": [dict(row) for row in rows]}
