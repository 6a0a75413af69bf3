"""What is trained on in a conversation, against an independent count; templates that are refused, and hostile ones."""

from __future__ import annotations

import random

import pytest
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.chat import marks_of, prompt_ids, render, turn_end
from tunesmith.data.kinds import Message
from tunesmith.data.sandbox import check_template
from tunesmith.data.tokens import encode_text
from tunesmith.errors import DataError

MARKED = (
    "{% for m in messages %}{{ 'START'.replace('ROLE', m['role']) + m['content'] + 'END' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'OPENING' }}{% endif %}"
)


def _marked(start: str, end: str, opening: str) -> str:
    return MARKED.replace("START", start).replace("END", end).replace("OPENING", opening)


# name -> (template, special tokens, what begins a turn of each role, what ends it, the generation prompt, begin)
GEMMA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = 'user' %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
SILENT = _marked("<|im_start|>ROLE\\n", "<|im_end|>\\n", "")
DEEP = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}{% else %}"
    "{{ '<A>' + m['content'] + '<E>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<A><think>\\n' }}"
    "{% endif %}"
)
TEMPLATES = {
    "chatml": (_marked("<|im_start|>ROLE\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n"),
               ("<|im_start|>", "<|im_end|>"), "<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "chatml without a generation prompt": (
        SILENT, ("<|im_start|>", "<|im_end|>"), "<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "zephyr": (_marked("<|ROLE|>\\n", "<eos>\\n", "<|assistant|>\\n"), (), "<|{role}|>\n", "<eos>", "\n"),
    "phi": (_marked("<|ROLE|>\\n", "<|end|>\\n", "<|assistant|>\\n"),
            ("<|user|>", "<|assistant|>", "<|end|>"), "<|{role}|>\n", "<|end|>", "\n"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<start_of_turn>{role}\n", "<end_of_turn>", "\n"),
    "llama2": (LLAMA2, (), None, None, None),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
               "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "tiny": (CHAT_TEMPLATE, (), "<|{role}|>", "<eos>", ""),
    "a generation prompt that answers do not have": (DEEP, ("<U>", "<A>", "<E>"), None, None, None),
}  # fmt: skip


def _tokenizer(template: str, special: tuple[str, ...] = ()):
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def _talk(rng: random.Random) -> list[Message]:
    words = ["cat", "mat", "ünïcode", "sat\n\non", "42", "{{ x }}", "a: b", "—", "'s", "end."]
    return [
        Message("user" if i % 2 == 0 else "assistant", " ".join(rng.choices(words, k=rng.randint(1, 6))))
        for i in range(2 * rng.randint(1, 4))
    ]


def _expected(name: str, talk: list[Message]) -> list[tuple[str, bool]]:
    """(piece of text, trained) written out by hand for each template: the independent counter."""
    _, _, start, end, after = TEMPLATES[name]
    pieces: list[tuple[str, bool]] = [("<bos>", False)] if name == "llama3" else []
    for message in talk:
        answers = message.role == "assistant"
        if name == "llama2":
            pieces.append((f" {message.content} <eos>", True) if answers
                          else (f"<bos>[INST] {message.content} [/INST]", False))  # fmt: skip
        elif name.startswith("a generation"):
            pieces += (
                [("<A>", False), (f"{message.content}<E>", True)] if answers else [(f"<U>{message.content}", False)]
            )
        else:
            role = "model" if name == "gemma" and answers else message.role
            pieces += [(start.format(role=role), False), (message.content + end, answers), (after, False)]
    return pieces


def _bytes_of() -> dict[str, int]:
    """The alphabet of byte-level tokens: a printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _spelled(ids: list[int], tokenizer) -> list[bytes]:
    alphabet, special = _bytes_of(), set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [t.encode() if i in special else bytes(alphabet[c] for c in t) for i, t in zip(ids, tokens, strict=True)]


def _count_wrong(name: str, talk: list[Message], ids: list[int], trained: list[bool], tokenizer) -> int:
    pieces = _expected(name, talk)
    wanted = [flag for text, flag in pieces for _ in text.encode()]
    spelled = _spelled(ids, tokenizer)
    assert b"".join(spelled) == "".join(text for text, _ in pieces).encode()
    flags = [flag for token, flag in zip(spelled, trained, strict=True) for _ in token]
    return sum(mine != theirs for mine, theirs in zip(flags, wanted, strict=True))


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.evidence)])
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_end_tokens_are_trained_on_and_nothing_else(name, count):
    template, special, *_ = TEMPLATES[name]
    tokenizer, rng = _tokenizer(template, special), random.Random(5)
    marks = marks_of(tokenizer)
    for _ in range(count):
        talk = _talk(rng)
        rendered = render(talk, tokenizer, marks=marks)
        assert _count_wrong(name, talk, rendered.ids, rendered.trained, tokenizer) == 0
        assert rendered.ids[max(i for i, on in enumerate(rendered.trained) if on)] in marks.special
        assert rendered.ids[: len(prompt_ids(talk[:1], tokenizer))] == prompt_ids(talk[:1], tokenizer)
    shifted = [rendered.trained[-1], *rendered.trained[:-1]]
    assert _count_wrong(name, talk, rendered.ids, shifted, tokenizer) > 0, "the control: a mask shifted by one"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_at_inference_is_where_the_first_answer_begins_in_training(name):
    tokenizer = _tokenizer(*TEMPLATES[name][:2])
    talk = [Message("user", "two plus two?"), Message("assistant", "four")]
    rendered = render(talk, tokenizer)
    assert prompt_ids("two plus two?", tokenizer) == rendered.ids[: rendered.trained.index(True)]


def test_a_template_that_rewrites_earlier_turns_is_refused_but_takes_single_turns():
    thinking = (
        "{% for m in messages %}{{ '<U>' if m['role'] == 'user' else '<A>' }}{% if m['role'] == 'assistant' and "
        "loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<E>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A>' }}{% endif %}"
    )
    tokenizer = _tokenizer(thinking, ("<U>", "<A>", "<E>"))
    one = [Message("user", "a"), Message("assistant", "b")]
    rendered = render(one, tokenizer)
    answer = [i for i, on in zip(rendered.ids, rendered.trained, strict=True) if on]
    assert tokenizer.decode(answer) == "<think></think>b<E>"
    with pytest.raises(DataError, match="changes earlier turns"):
        render([*one, *one], tokenizer)


def test_a_template_that_drops_the_answers_is_refused():
    with pytest.raises(DataError, match="leaves out the assistant"):
        render(
            [Message("user", "a"), Message("assistant", "b")],
            _tokenizer("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"),
        )


def test_turns_marked_as_not_trained_are_context():
    tokenizer = _tokenizer(CHAT_TEMPLATE)
    talk = [Message("user", "a"), Message("assistant", "bb", trained=False), Message("user", "c"),
            Message("assistant", "dd")]  # fmt: skip
    rendered = render(talk, tokenizer)
    assert tokenizer.decode([i for i, on in zip(rendered.ids, rendered.trained, strict=True) if on]) == "dd<eos>"


def test_a_tool_call_is_trained_on_and_its_result_is_not():
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{{ 'CALL ' + c['function']['name'] + (c['function']['arguments'] | tojson) }}{% endfor %}{{ '<E>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer = _tokenizer(template, ("<E>",))
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    talk = [Message("user", "1+1?"), Message("assistant", "", tool_calls=(call,)), Message("tool", "2", name="add"),
            Message("assistant", "two")]  # fmt: skip
    rendered = render(talk, tokenizer, tools=[{"type": "function", "function": {"name": "add"}}])
    trained = tokenizer.decode([i for i, on in zip(rendered.ids, rendered.trained, strict=True) if on])
    assert trained == 'CALL add{"x": 1}<E>two<E>'


def test_without_a_template_prompt_and_answer_are_set_apart_and_closed():
    tokenizer = tiny_tokenizer(chat=False)
    for prompt, between in (("Q: two?", "\n"), ("Q: two?\nA: ", "")):
        rendered = render([Message("user", prompt), Message("assistant", "four")], tokenizer)
        assert tokenizer.decode(rendered.ids) == f"{prompt}{between}four<eos>"
        assert rendered.ids[: rendered.trained.index(True)] == prompt_ids(prompt, tokenizer)
    assert tokenizer.decode(prompt_ids("as it is", tokenizer, raw=True)) == "as it is"


@pytest.mark.parametrize("chat", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_no_end_token_is_an_error_that_names_it(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = chat, None
    with pytest.raises(DataError, match="eos_token"):
        render([Message("user", "a"), Message("assistant", "b")], tokenizer)


def test_a_long_text_makes_no_noise(caplog, recwarn, capfd):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    assert len(encode_text(tokenizer, "the cat sat " * 50, special=True)) > 8
    assert not caplog.records and not recwarn.list and capfd.readouterr() == ("", "")
    tokenizer("the cat sat " * 50)
    assert "longer than the specified maximum" in caplog.text, "the control: what transformers says by itself"


def test_a_tokenizer_that_panics_is_an_error_like_any_other(capfd):
    hostile = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    hostile.normalizer = normalizers.Replace(Regex("(a+)+$"), "b")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=hostile, unk_token="<unk>", eos_token="<e>")
    bad = "a" * 40 + "!"
    with pytest.raises(BaseException) as raw:
        tokenizer(bad)
    assert not isinstance(raw.value, Exception), "the control: what escapes is no Exception"
    with pytest.raises(DataError, match="crashed on this text"):
        encode_text(tokenizer, bad)
    with pytest.raises(KeyboardInterrupt):
        encode_text(_interrupting, "a")
    capfd.readouterr()


def _interrupting(*_, **__):
    raise KeyboardInterrupt


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ ('%s' | format(messages.__class__)) }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% set _ = messages[0].update({'content': 'x'}) %}",
    "{{ (messages | map(attribute='__class__') | list) }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{{ caller.__code__ }}{{ config }}{{ request.application.__globals__ }}",
)
BOMBS = (
    "{% for i in range(100000) %}{% for j in range(100000) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{{ '%1000000000d' | format(1) }}",
    "{% if messages | length > 8 %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    "{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}",
)


@pytest.mark.parametrize("payload", ESCAPES)
def test_a_template_reaches_nothing(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}|" + payload
    try:
        shown = tokenizer.decode(render([Message("user", "a"), Message("assistant", "b")], tokenizer).ids)
    except DataError as error:
        shown = str(error)
    leaks = ("<class", "<module", "<function", "root:x", "subclasses__() }}", "built-in")
    assert not any(leak in shown for leak in leaks) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("payload", BOMBS)
def test_a_template_that_never_ends_is_stopped(payload):
    with pytest.raises(DataError, match=r"hostile|cannot be rendered|does not end"):
        check_template(payload)


def test_a_template_that_refuses_by_itself_is_sound_and_a_broken_one_is_named():
    check_template("{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}")
    check_template("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}")
    with pytest.raises(DataError, match=r"cannot be rendered.*is undefined"):
        check_template("{{ nothing.at.all }}")
    with pytest.raises(DataError, match=r"cannot be rendered.*TemplateSyntaxError"):
        check_template("{% for m in %}")


ENDS = {"chatml": "<|im_end|>", "chatml without a generation prompt": "<|im_end|>", "phi": "<|end|>", "tiny": "<eos>",
        "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "llama2": "<eos>", "zephyr": "<eos>"}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_at_what_its_training_ends_with(name: str):
    tokenizer = _tokenizer(*TEMPLATES[name][:2])
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(ENDS[name])


def test_without_a_template_or_a_plain_question_there_is_no_end_of_turn():
    assert turn_end(tiny_tokenizer(chat=False)) is None
    assert turn_end(_tokenizer("{{ raise_exception('tools only') }}")) is None
