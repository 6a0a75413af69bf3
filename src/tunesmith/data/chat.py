"""Conversations -> token ids and who wrote each, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.kinds import Message
from tunesmith.data.sandbox import check_template
from tunesmith.data.tokens import Asked, Ids, Work, alone, encode_text
from tunesmith.errors import DataError

_STAND_IN = "stand0in1for2an3answer"
_NOT_A_PREFIX = (
    "the chat template changes earlier turns when a later one is added (it drops thinking, perhaps), so what trains "
    "would not be what is asked; train on single-turn rows, or use a tokenizer with a template that only appends"
)
_NO_END = (
    "the tokenizer has no end token, so that no answer would ever end; name one as eos_token in tokenizer_config.json"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """`ids [L]` and, for each, whether predicting it is trained on."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class Marks:
    """The ids that a tokenizer itself puts before and after a text, its bos among them, and all its special ids."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    bos: tuple[int, ...]
    special: frozenset[int]


def marks_of(tokenizer: Any) -> Marks:
    """What `tokenizer` puts round a text."""
    inside, whole = encode_text(tokenizer, "a"), encode_text(tokenizer, "a", special=True)
    spots = range(len(whole) - len(inside) + 1)
    start = next((i for i in spots if whole[i : i + len(inside)] == inside), None)
    before, after = ((), ()) if start is None else (tuple(whole[:start]), tuple(whole[start + len(inside) :]))
    bos = (tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None else ()
    special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    return Marks(before, after, bos if bos == tuple(whole[:1]) else (), special)


def render(
    messages: Sequence[Message], tokenizer: Any, *, tools: Any = None, plain: bool = False, marks: Marks | None = None
) -> Rendered:
    """The conversation as training sees it: assistant turns and their end tokens are trained on.

    Each prompt part is encoded as inference encodes it, and the answer after it on its own. Raises `DataError` when
    the template does not render a conversation as a beginning of its continuation.
    """
    work = rendering(messages, tokenizer, tools=tools, plain=plain, marks=marks or marks_of(tokenizer))
    return alone(work, tokenizer)


def rendering(
    messages: Sequence[Message], tokenizer: Any, *, tools: Any = None, plain: bool = False, marks: Marks
) -> Work[Rendered]:
    """`render` as a work, which can be done together with others."""
    if plain or tokenizer.chat_template is None:
        return (yield from _plain(messages, tokenizer, marks))
    _check_templates(tokenizer)
    rendered = yield from _joined(_pieces(messages, tokenizer, tools), marks)
    _end(rendered, tokenizer, marks)
    return rendered


@dataclass(frozen=True, slots=True)
class _Piece:
    """What the template has written between two places where a writer changes; of a prompt nothing is trained on."""

    text: str
    answer: bool
    trained: bool


def _pieces(messages: Sequence[Message], tokenizer: Any, tools: Any) -> list[_Piece]:
    """The rendered conversation up to its last answer: a prompt part before each answer, by turns."""
    pieces: list[_Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        whole = _apply(messages[: i + 1], tokenizer, tools, generation=False)
        prompt = _prompt_of(messages, i, whole, tokenizer, tools)
        if not prompt.startswith(done):
            raise DataError(_NOT_A_PREFIX)
        pieces.append(_Piece(prompt[len(done) :], answer=False, trained=False))
        pieces.append(_Piece(whole[len(prompt) :], answer=True, trained=message.trained is not False))
        done = whole
    return pieces


def _joined(pieces: Sequence[_Piece], marks: Marks) -> Work[Rendered]:
    """An answer up to its end token is learned; white space after that is the template's, not the model's."""
    bodies = [piece.text.rstrip() if piece.answer else piece.text for piece in pieces]
    inside = yield [Asked(body) for body in bodies]
    ended = [bool(ids) and ids[-1] in marks.special for ids in inside]
    parts = list(zip(pieces, bodies, inside, ended, strict=True))
    spaced_out = yield [
        Asked(piece.text[len(body) :] if closed else piece.text)
        for piece, body, _, closed in parts
        if len(body) < len(piece.text)
    ]
    rendered, others = Rendered([], []), iter(spaced_out)
    for piece, body, ids, closed in parts:
        whole = len(body) == len(piece.text)
        if whole or closed:
            _add(rendered, ids, piece.trained)
        if not whole:
            _add(rendered, next(others), piece.trained and not closed)
    return rendered


def _check_templates(tokenizer: Any) -> None:
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else (template,):
        check_template(text)


def _prompt_of(messages: Sequence[Message], i: int, whole: str, tokenizer: Any, tools: Any) -> str:
    """The text that stands before the answer `messages[i]`: a beginning of `whole`, the same as at inference."""
    prompt = _apply(messages[:i], tokenizer, tools, generation=True)
    answer = messages[i].content.strip()
    if not (answer and whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith(answer)):
        prompt = _opening(messages[:i], tokenizer, tools)
    if not whole.startswith(prompt):
        raise DataError(_NOT_A_PREFIX)
    return prompt


def _opening(messages: Sequence[Message], tokenizer: Any, tools: Any) -> str:
    """The prompt up to where an answer begins.

    That is the generation prompt, unless the template has none, or one that it does not write before answers: then it
    is what the template writes before a stand-in.
    """
    asked = _apply(messages, tokenizer, tools, generation=True)
    whole = _apply([*messages, Message("assistant", _STAND_IN)], tokenizer, tools, generation=False)
    at = whole.find(_STAND_IN)
    if at < 0:
        raise DataError("the chat template leaves out the assistant's answers; mend chat_template")
    bare = _apply(messages, tokenizer, tools, generation=False)
    if whole.startswith(asked) and (asked != bare or not whole[len(asked) : at].strip()):
        return asked
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


def _plain(messages: Sequence[Message], tokenizer: Any, marks: Marks) -> Work[Rendered]:
    """Prompt, completion, end token; turns are set apart by a line end unless white space stands there already."""
    if tokenizer.eos_token_id is None:
        raise DataError(_NO_END)
    found = yield [Asked(m.content if m.role == "assistant" else spaced(m.content)) for m in messages]
    rendered = Rendered(list(marks.bos), [False] * len(marks.bos))
    for message, ids in zip(messages, found, strict=True):
        if message.role == "assistant":
            _add(rendered, [*ids, tokenizer.eos_token_id], message.trained is not False)
        else:
            _add(rendered, ids, False)
    return rendered


def spaced(prompt: str) -> str:
    """The prompt with a line end, unless it ends in white space."""
    return prompt if prompt[-1:].isspace() else prompt + "\n"


def _add(rendered: Rendered, new: Ids, on: bool) -> None:
    rendered.ids.extend(new)
    rendered.trained.extend([on] * len(new))


def _end(rendered: Rendered, tokenizer: Any, marks: Marks) -> None:
    """The last turn, if it is trained on, must close with a special token, or the model never learns to stop."""
    if not rendered.ids or not rendered.trained[-1] or rendered.ids[-1] in marks.special:
        return
    if tokenizer.eos_token_id is None:
        raise DataError(_NO_END)
    _add(rendered, [tokenizer.eos_token_id], True)


def turn_end(tokenizer: Any) -> int | None:
    """The token that ends an answer under the chat template, as training has it: often another than the end token.

    None without a template, or for one that does not take a plain question.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        rendered = render([Message("user", "a"), Message("assistant", _STAND_IN)], tokenizer)
    except DataError:
        return None
    return next(i for i, on in zip(reversed(rendered.ids), reversed(rendered.trained), strict=True) if on)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any, *, plain: bool = False, raw: bool = False) -> list[int]:
    """What stands before an answer at inference, exactly as training has it; `raw` adds nothing but bos."""
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return alone(prompting(messages, tokenizer, plain=plain, raw=raw), tokenizer)


def prompting(
    messages: Sequence[Message], tokenizer: Any, *, plain: bool = False, raw: bool = False, marks: Marks | None = None
) -> Work[list[int]]:
    """`prompt_ids` as a work, which can be done together with others."""
    if plain or raw or tokenizer.chat_template is None:
        bos = (marks or marks_of(tokenizer)).bos
        found = yield [Asked(m.content if raw else spaced(m.content)) for m in messages]
        return [*bos, *(i for ids in found for i in ids)]
    _check_templates(tokenizer)
    (ids,) = yield [Asked(_opening(messages, tokenizer, None))]
    return list(ids)
