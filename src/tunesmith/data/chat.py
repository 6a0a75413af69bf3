"""Conversations -> token ids and who wrote each, through the tokenizer's own chat template."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tunesmith.data.kinds import Message
from tunesmith.errors import DataError

TEMPLATE_SECONDS = 2
TEMPLATE_BYTES = 512 << 20

_TRIAL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))
from datetime import datetime
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(message):
    sys.exit(7)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.globals.update(raise_exception=refuse, strftime_now=lambda f: datetime.now().strftime(f))
environment.filters["tojson"] = lambda value, **_: str(value)
from jinja2 import nodes
from jinja2.ext import Extension
class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)
    def _same(self, caller):
        return caller()
environment.add_extension(Generation)
messages = [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}]
text = environment.from_string(sys.stdin.read()).render(
    messages=messages, tools=None, documents=None, add_generation_prompt=False, bos_token="", eos_token="", pad_token=""
)
sys.exit(0 if len(text) < 1000000 else 8)
"""


@dataclass(frozen=True, slots=True)
class Rendered:
    """`ids [L]` and, for each, whether predicting it is trained on."""

    ids: list[int]
    trained: list[bool]


@lru_cache(maxsize=32)
def check_template(template: str) -> None:
    """Render the template once in a sandbox, in a child process with limits on time and memory, or raise `DataError`.

    A template is a program that came with a model: the sandbox keeps it from reaching anything, and the limits from
    never ending.
    """
    trial = _TRIAL.format(seconds=TEMPLATE_SECONDS, size=TEMPLATE_BYTES)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", trial],
            input=template.encode(),
            capture_output=True,
            timeout=10 * TEMPLATE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DataError("the chat template does not end; take another tokenizer, or mend chat_template") from None
    if done.returncode in (0, 7):
        return
    if done.returncode < 0 or b"MemoryError" in done.stderr:
        raise DataError(
            f"the chat template takes more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES >> 20} MB for two short turns; "
            "it is broken or hostile, and was not used"
        )
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    raise DataError(f"the chat template cannot be rendered: {last[0][:300]}")


def starts_with_bos(tokenizer: Any) -> bool:
    """True when the tokenizer itself begins a text with its bos token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def tokens_of(text: str, tokenizer: Any) -> list[int]:
    """Ids of `text` alone, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(messages: Sequence[Message], tokenizer: Any, *, tools: Any = None, plain: bool = False) -> Rendered:
    """The conversation as training sees it: assistant turns and their end tokens are trained on.

    Each prompt part is encoded as inference encodes it, and the answer after it on its own. Raises `DataError` when
    the template does not render a conversation as a beginning of its continuation.
    """
    if plain or tokenizer.chat_template is None:
        return _plain(messages, tokenizer)
    check_template(tokenizer.chat_template)
    ids: list[int] = []
    trained: list[bool] = []
    done = ""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _apply(messages[:i], tokenizer, tools, generation=True)
        whole = _apply(messages[: i + 1], tokenizer, tools, generation=False)
        if not whole.startswith(prompt):
            prompt = _header(messages, i, tokenizer, tools, whole)
        if not prompt.startswith(done):
            raise DataError(_NOT_A_PREFIX)
        _add(ids, trained, tokens_of(prompt[len(done) :], tokenizer), False)
        _add(ids, trained, tokens_of(whole[len(prompt) :], tokenizer), message.trained is not False)
        done = whole
    _end(ids, trained, tokenizer)
    return Rendered(ids, trained)


_NOT_A_PREFIX = (
    "the chat template changes earlier turns when a later one is added (it drops thinking, perhaps), so what trains "
    "would not be what is asked; train on single-turn rows, or use a tokenizer with a template that only appends"
)


def _header(messages: Sequence[Message], i: int, tokenizer: Any, tools: Any, whole: str) -> str:
    """Where the answer begins when the generation prompt is not a beginning of the rendered answer."""
    before = _apply(messages[:i], tokenizer, tools, generation=False) if i else ""
    at = whole.find(messages[i].content, len(before))
    if not whole.startswith(before) or at < 0:
        raise DataError(_NOT_A_PREFIX)
    return whole[:at]


def _apply(messages: Sequence[Message], tokenizer: Any, tools: Any, *, generation: bool) -> str:
    turns = [_turn(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=generation))
    except Exception as error:  # a template raises what it likes
        raise DataError(f"the chat template refuses this conversation: {str(error)[:200]}") from None


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    return turn


def _plain(messages: Sequence[Message], tokenizer: Any) -> Rendered:
    """Prompt, completion, end token; turns are set apart by a line end unless white space stands there already."""
    ids: list[int] = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    trained = [False] * len(ids)
    for _i, message in enumerate(messages):
        if message.role == "assistant":
            answer = tokens_of(message.content, tokenizer)
            _add(ids, trained, [*answer, tokenizer.eos_token_id], message.trained is not False)
        else:
            _add(ids, trained, tokens_of(spaced(message.content), tokenizer), False)
    return Rendered(ids, trained)


def spaced(prompt: str) -> str:
    """The prompt with a line end, unless it ends in white space."""
    return prompt if prompt[-1:].isspace() else prompt + "\n"


def _add(ids: list[int], trained: list[bool], new: list[int], on: bool) -> None:
    ids += new
    trained += [on] * len(new)


def _end(ids: list[int], trained: list[bool], tokenizer: Any) -> None:
    """The last trained turn must close with a special token, or the model never learns to stop."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tail = [i for i, on in zip(ids[-4:], trained[-4:], strict=True) if on]
    if ids and trained[-1] and not any(i in special for i in tail) and tokenizer.eos_token_id is not None:
        _add(ids, trained, [tokenizer.eos_token_id], True)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any, *, plain: bool = False, raw: bool = False) -> list[int]:
    """What stands before an answer at inference, exactly as training has it; `raw` adds nothing but bos."""
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    if not plain and not raw and tokenizer.chat_template is not None:
        check_template(tokenizer.chat_template)
        return tokens_of(_apply(messages, tokenizer, None, generation=True), tokenizer)
    start = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    texts = [m.content if raw else spaced(m.content) for m in messages]
    return start + [i for text in texts for i in tokens_of(text, tokenizer)]
