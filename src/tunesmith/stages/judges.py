"""Who judges two answers: a reward model, a function of the user's, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import http.client
import inspect
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.engine.durable import file_sha256
from tunesmith.errors import RecipeError, RewardError, RunError
from tunesmith.evaluate.winrate import INSTRUCTION, question, read_reply
from tunesmith.rollout.function import load_function, scored_by
from tunesmith.rollout.rewards import Completed, Part, Reward, Score
from tunesmith.rundir import model_run, open_run
from tunesmith.stages import from_run
from tunesmith.stages.rewarding import run_score

PART = 32
TRIES = 4
REPLY_TOKENS = 512
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Match:
    """Two answers to one prompt in the order they are shown."""

    first: Completed
    second: Completed


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a judge thought of the answer shown first: 1 better, 0.5 as good, 0 worse, None when it did not say.

    `detail` goes to the file of judged pairs: the scores of both, or the reply.
    """

    first: float | None
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Judge:
    """`name` says who it is in words, `content` names its weights or code, for runs trained on the same."""

    name: str
    content: str
    judge: Callable[[Sequence[Match]], Iterator[Opinion]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A chat-completions address and how it is asked. `key` is never shown, written or put into a message."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_seconds: float = 120.0

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def open_judge(
    spec: str, *, model: str | None = None, key_from: str | None = None, label: str | None = None, margin: float = 0.0
) -> Judge:
    """The judge that `spec` names: `reward:RUN`, `file.py:function`, or the https address of an endpoint.

    A difference of scores of at most `margin` is a tie. `RecipeError` for anything else.
    """
    if spec.startswith("reward:"):
        _refuse(spec, model=model, key=key_from)
        return _reward_judge(spec.removeprefix("reward:"), label, margin)
    if spec.startswith(("http://", "https://")):
        return _endpoint_judge(_endpoint(spec, model, key_from))
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py") and name.isidentifier():
        _refuse(spec, model=model, key=key_from)
        return _function_judge(Path(path), name, margin)
    raise RecipeError(f"--judge {spec}: write reward:RUN, file.py:function, or the https address of an endpoint")


def _refuse(spec: str, *, model: str | None, key: str | None) -> None:
    if model is not None or key is not None:
        raise RecipeError(f"--judge-model and --judge-key-env are for an endpoint; the judge is {spec}")


def _reward_judge(target: str, label: str | None, margin: float) -> Judge:
    run = model_run(open_run(target))
    score = run_score(run, label=label)
    part = Part("run", score, source=f"reward run {target}")
    return Judge(f"reward model {target}", from_run.content(run), _by_score(Reward((part,)), margin))


def _function_judge(path: Path, name: str, margin: float) -> Judge:
    """By its parameters: `(prompt, first, second)` compares, `(prompts, completions, ...)` scores."""
    function, where = load_function(path, name), f"{path}:{name}"
    content = f"{file_sha256(path)}:{name}"
    parameters = list(inspect.signature(function).parameters)
    if parameters[:3] == ["prompt", "first", "second"]:
        return Judge(f"function {where}", content, _by_comparing(function, where))
    part = Part(name, scored_by(function, (), where), source=f"judge {where}")
    return Judge(f"function {where}", content, _by_score(Reward((part,)), margin))


def _by_score(reward: Reward, margin: float) -> Callable[[Sequence[Match]], Iterator[Opinion]]:
    """Both answers scored on their own; the higher score wins."""

    def judge(matches: Sequence[Match]) -> Iterator[Opinion]:
        for start in range(0, len(matches), PART):
            part = matches[start : start + PART]
            scores = reward([side for match in part for side in (match.first, match.second)]).total.tolist()
            for first, second in zip(scores[::2], scores[1::2], strict=True):
                better = 0.5 if abs(first - second) <= margin else float(first > second)
                yield Opinion(better, {"scores": {"first": first, "second": second}})

    return judge


def _by_comparing(function: Callable[..., Any], where: str) -> Callable[[Sequence[Match]], Iterator[Opinion]]:
    """`function(prompt, first, second)` gives 1 when the first is better, 0 when the second is, 0.5 for a tie."""

    def judge(matches: Sequence[Match]) -> Iterator[Opinion]:
        for match in matches:
            try:
                found = function(match.first.prompt, match.first.completion, match.second.completion)
                value = float(found)
            except Exception as error:  # the user's own code raises what it likes
                what = f"{type(error).__name__}: {error}"
                raise RewardError(f"judge {where} failed on prompt {match.first.origin}: {what}") from error
            if not math.isfinite(value) or not 0 <= value <= 1:
                raise RewardError(f"judge {where} gave {found!r} for prompt {match.first.origin}; it must be 0 to 1")
            yield Opinion(0.5 if value == 0.5 else float(value > 0.5), {"value": value})

    return judge


def _endpoint(url: str, model: str | None, key_from: str | None) -> Endpoint:
    parts = urllib.parse.urlsplit(url)
    if model is None:
        raise RecipeError(f"--judge {url}: name the model to ask with --judge-model")
    if not parts.hostname or parts.username or parts.password:
        raise RecipeError("--judge: an address is https://HOST/v1, without a user or a password in it")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise RecipeError(f"--judge {parts.hostname}: over the network only https is used; http is for this machine")
    key = ""
    if key_from is not None:
        key = os.environ.get(key_from, "")
        if not key:
            raise RecipeError(f"--judge-key-env: there is no environment variable {key_from}, or it is empty")
    path = parts.path.rstrip("/")
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return Endpoint(urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), model, key)


def _endpoint_judge(endpoint: Endpoint) -> Judge:
    def judge(matches: Sequence[Match]) -> Iterator[Opinion]:
        opener = _opener(endpoint)
        for match in matches:
            text = question(match.first.prompt, match.first.completion, match.second.completion)
            reply = _ask(opener, endpoint, text)
            yield Opinion(read_reply(reply), {"reply": reply[:2000]})

    name = f"{endpoint.model} at {endpoint.shown}"
    return Judge(name, name, judge)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to an address that nobody named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(endpoint: Endpoint) -> urllib.request.OpenerDirector:
    handlers: list[Any] = [_NoRedirect()]
    if urllib.parse.urlsplit(endpoint.url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _ask(opener: urllib.request.OpenerDirector, endpoint: Endpoint, text: str) -> str:
    """The reply's text. A busy server is asked again, up to four times; `RunError` names what it said."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": REPLY_TOKENS,
    }
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    )
    request = urllib.request.Request(endpoint.url, json.dumps(body).encode(), headers, method="POST")
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            with opener.open(request, timeout=endpoint.timeout_seconds) as answer:
                return _content_of(answer.read(), endpoint)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            problem = f"HTTP {error.code}: {_without(endpoint.key, said)}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = f"{type(error).__name__}: {_without(endpoint.key, str(error))}"
    raise RunError(f"the judge at {endpoint.shown} did not answer ({problem}); what was judged is kept, and the same "
                   "command goes on from there")  # fmt: skip


def _content_of(answer: bytes, endpoint: Endpoint) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        shown = _without(endpoint.key, answer[:200].decode(errors="replace"))
        raise RunError(f"the judge at {endpoint.shown} answered, but with no chat completion: {shown}") from None
    return content if isinstance(content, str) else ""


def _without(key: str, text: str) -> str:
    return text.replace(key, "[key]") if key else text


__all__ = ["Judge", "Match", "Opinion", "Score", "open_judge"]
