"""Texts encoded together: the same samples, tallies and errors as one by one, and no more in memory than a part."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.tiny import tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tunesmith.data.chat import prompt_ids, render
from tunesmith.data.encode import POLICIES, Encoder
from tunesmith.data.kinds import Chat, Labelled, Message, Pair, Prompt, Ranking, Record, Text
from tunesmith.data.prompts import encode_prompts
from tunesmith.data.store import build_store
from tunesmith.data.tokens import CHARACTERS, WORKS, Asked, Work, alone, encode_text, merged, together
from tunesmith.errors import DataError
from tunesmith.start.looking import _sizes

NUM = WORKS + 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOOSE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
"""Nothing special ends an answer, so its white space is encoded with it."""


def _tokenizer(chat: str | None = None, *, marked: bool = False) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    if chat == CHATML:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if marked:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> $B <sep>", special_tokens=[("<cls>", 5), ("<sep>", 6)]
        )
    return tokenizer


class Watched:
    """A tokenizer that notes for every call how many texts it was given: None for one that came by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, list[int | None]()

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        self.calls.append(None if isinstance(text, str) else len(text))
        return self.tokenizer(text, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _words(rng: random.Random, most: int = 12) -> str:
    return " ".join(
        rng.choices(["cat", "mat", "ünï", "sat\n\non", "42", "—", "<unk>", "漢", "end. "], k=rng.randint(1, most))
    )


def _talk(rng: random.Random, turns: int) -> tuple[Message, ...]:
    roles = [role for _ in range(turns) for role in ("user", "assistant")]
    return tuple(Message(r, _words(rng), rng.choice([None, True, False]) if r != "user" and i < 2 * turns - 1 else None)
                 for i, r in enumerate(roles))  # fmt: skip


def _asked(rng: random.Random) -> tuple[Message, ...]:
    return (Message("user", rng.choice(["", "?", " "]) + _words(rng)),)


MAKERS: dict[str, tuple[str, Any, Callable[[random.Random, str], Record]]] = {
    "text": ("pretrain", _tokenizer(), lambda rng, at: Text(_words(rng), at)),
    "masked text": ("mlm", _tokenizer(marked=True), lambda rng, at: Text(_words(rng), at)),
    "labelled": ("classify", _tokenizer(marked=True), lambda rng, at: Labelled(
        _words(rng), rng.choice("ab"), None, at)),
    "two texts": ("classify", _tokenizer(marked=True), lambda rng, at: Labelled(
        _words(rng), "a", rng.choice([None, "", _words(rng)]), at)),
    "plain chat": ("sft", _tokenizer(), lambda rng, at: Chat(_talk(rng, 1), origin=at)),
    "chat": ("sft", _tokenizer(CHATML), lambda rng, at: Chat(_talk(rng, rng.randint(1, 3)), origin=at)),
    "chat with loose ends": ("sft", _tokenizer(LOOSE), lambda rng, at: Chat(
        _talk(rng, rng.randint(1, 2)), plain=rng.random() < 0.3, origin=at)),
    "pair": ("dpo", _tokenizer(CHATML), lambda rng, at: Pair(
        _asked(rng), _words(rng), _words(rng), at, rng.choice([None, 0.5]), rng.random() < 0.3)),
    "ranking": ("reward", _tokenizer(), lambda rng, at: Ranking(
        _asked(rng), tuple(_words(rng) for _ in range(3)), (2, 1, 2), at)),
}  # fmt: skip


def _shown(samples: list[Any]) -> list[Any]:
    return [(s.ids.tolist(), s.weights.tolist(), s.label, s.group, s.origin) for s in samples]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_records_encoded_together_are_as_records_encoded_one_by_one(kind: str, policy: str):
    stage, tokenizer, make = MAKERS[kind]
    rng, num = random.Random(3), NUM if policy.startswith("truncate") else 100
    records = [make(rng, f"f:{n}") for n in range(1, num + 1)]
    watched = Watched(tokenizer)
    one, many = (Encoder(t, stage, 24, policy, label_names=("a", "b")) for t in (tokenizer, watched))
    watched.calls.clear()
    wanted = [_shown(one(record)) for record in records]
    assert [_shown(samples) for samples in many.many(records)] == wanted and many.tally == one.tally
    assert sum(one.tally.values()) > 10 and any(wanted), "the control: rows were cut, dropped or counted, and some left"
    assert None not in watched.calls and num // WORKS < len(watched.calls) <= 8, "few calls, none for a single text"


def test_a_store_is_made_of_many_texts_a_call_and_lies_the_same_on_disk(tmp_path):
    class Records:
        fingerprint, files = "x", ("f",)

        def __iter__(self) -> Iterator[Record]:
            return iter([Text(f"row {n} of many", f"f:{n}") for n in range(NUM)])

    watched = Watched(_tokenizer())
    encoder = Encoder(watched, "pretrain", 64)
    watched.calls.clear()
    store = build_store(Records(), encoder, tmp_path)
    assert watched.calls == [WORKS, NUM - WORKS]
    assert _shown(list(store)) == _shown(
        [s for record in Records() for s in Encoder(_tokenizer(), "pretrain", 64)(record)]
    )


def test_a_text_that_stands_in_many_records_is_encoded_once():
    watched = Watched(_tokenizer())
    encoder = Encoder(watched, "reward", 64)
    watched.calls.clear()
    list(encoder.many(Pair((Message("user", "the same"),), "good", "bad") for _ in range(100)))
    assert watched.calls == [3]


def _first_error(samples: Iterator[Any]) -> tuple[int, str]:
    seen = 0
    with pytest.raises(DataError) as refused:
        for _ in samples:
            seen += 1
    return seen, str(refused.value)


@pytest.mark.parametrize("bad", [1, 7, WORKS, WORKS + 1, WORKS + 9])
def test_the_first_bad_record_is_the_one_that_is_told_after_all_before_it(bad: int):
    rows: list[Record] = [Labelled(f"text {n}", "a", origin=f"f:{n}") for n in range(1, NUM + 1)]
    rows[bad - 1] = Labelled("odd", "unknown", origin=f"f:{bad}")
    rows[-1] = Chat((Message("user", "q"),), origin="f:last")
    encoder = Encoder(_tokenizer(marked=True), "classify", 64, label_names=("a",))
    told = _first_error(encoder.many(rows))
    assert told == _first_error(map(encoder, rows)) and told[0] == bad - 1 and told[1].startswith(f"f:{bad}: the label")


def test_an_error_in_reading_comes_after_the_rows_read_before_it():
    def broken(label: str) -> Iterator[Record]:
        yield Labelled("fine", "a", origin="f:1")
        yield Labelled("fine", label, origin="f:2")
        raise DataError("f:3: not JSON")

    encoder = Encoder(_tokenizer(marked=True), "classify", 64, label_names=("a",))
    assert _first_error(encoder.many(broken("a"))) == (2, "f:3: not JSON")
    assert _first_error(encoder.many(broken("b")))[1].startswith("f:2: the label 'b' is unknown")


def test_no_row_is_read_behind_one_that_cannot_be_rendered():
    read = []
    asked = (Message("user", "q"),)

    def rows() -> Iterator[Record]:
        for n in range(1, 10):
            read.append(n)
            yield Chat((*asked, Message("assistant", "a"))) if n != 4 else Pair(asked, "a", "b", "f:4")

    seen, told = _first_error(Encoder(_tokenizer(), "sft", 64).many(rows()))
    assert (seen, read) == (3, [1, 2, 3, 4]) and told.startswith("f:4: stage sft cannot train on a Pair")


def _panicking() -> Any:
    hostile = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<e>": 2}, unk_token="<unk>"))
    hostile.normalizer = normalizers.Replace(Regex("(a+)+$"), "b")
    return PreTrainedTokenizerFast(tokenizer_object=hostile, unk_token="<unk>", eos_token="<e>")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_a_tokenizer_that_panics_is_told_at_the_row_that_it_panics_on(stage: str, capfd):
    crash = "a" * 40 + "!"

    def row(n: int) -> Record:
        text, origin = crash if n in (7, 9) else f"b{n}", f"f:{n}"
        asked = Message("user", "q")
        return {"pretrain": Text(text, origin), "sft": Chat((asked, Message("assistant", text)), origin=origin),
                "reward": Pair((asked,), "fine", text, origin)}[stage]  # fmt: skip

    encoder = Encoder(_panicking(), stage, 64)
    rows = [row(n) for n in range(1, 12)]
    with pytest.raises(BaseException) as raw:
        encoder.tokenizer(["b", crash])
    assert not isinstance(raw.value, Exception), "the control: what escapes from a call for many is no Exception"
    told = _first_error(encoder.many(rows))
    assert told == _first_error(map(encoder, rows))
    assert told[0] == 6 and told[1].startswith("f:7: the tokenizer crashed on this text")
    capfd.readouterr()


def test_a_tokenizer_that_takes_no_list_still_works_and_a_pressed_key_stops():
    class OneByOne(Watched):
        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            if not isinstance(text, str):
                raise TypeError("one text, please")
            return super().__call__(text, *args, **options)

    class Pressed(Watched):
        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            if not isinstance(text, str):
                raise KeyboardInterrupt
            return super().__call__(text, *args, **options)

    rows = [Text(f"row {n}", f"f:{n}") for n in range(20)]
    wanted = [_shown(Encoder(_tokenizer(), "pretrain", 64)(row)) for row in rows]
    assert [_shown(s) for s in Encoder(OneByOne(_tokenizer()), "pretrain", 64).many(rows)] == wanted
    with pytest.raises(KeyboardInterrupt):
        list(Encoder(Pressed(_tokenizer()), "pretrain", 64).many(rows))


def test_an_empty_second_text_is_none_for_one_text_and_for_many():
    """A tokenizer written in Python tells an empty second text from none."""
    given: list[Any] = []

    def python(text: Any, pair: Any = None, **_: Any) -> dict[str, Any]:
        given.append(pair)
        return {"input_ids": [1] if isinstance(text, str) else [[1]] * len(text)}

    def work() -> Work[Any]:
        return (yield [Asked("x", "", special=True)])

    one, many = encode_text(python, "x", "", special=True), list(together([work()], python))
    assert many == [alone(work(), python)] == [[one]]
    assert given == [None, None, None]


def test_long_texts_that_are_only_looked_at_do_not_pile_up_either():
    watched = Watched(_tokenizer())
    texts = [Text(f"{n} " + "cat " * (CHARACTERS // 6), f"f:{n}") for n in range(6)]
    made = _sizes(iter(texts), "pretrain", watched, (), False)
    watched.calls.clear()
    assert len(list(made)) == 6 and max(call or 0 for call in watched.calls) <= 2


def _lengths(texts: list[str], *_: Any, **__: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": [[len(text)] for text in texts]}


def _length(text: str) -> Work[int]:
    (ids,) = yield [Asked(text)]
    return ids[0]


def test_no_more_is_read_ahead_than_so_many_records_or_so_many_characters():
    read = []

    def works(length: int) -> Iterator[Work[int]]:
        for n in range(5 * WORKS):
            read.append(n)
            yield _length(f"{n:0{length}}")

    for length, ahead in ((4, WORKS), (CHARACTERS // 8, 8), (2 * CHARACTERS, 1)):
        read.clear()
        made = together(works(length), _lengths)
        for part in range(1, 4):
            assert [next(made) for _ in range(ahead)] == [length] * ahead and len(read) == part * ahead


def test_merged_works_ask_together_as_often_as_the_longest_of_them_asks():
    def times(num: int) -> Work[int]:
        total = 0
        for n in range(num):
            (ids,) = yield [Asked("x" * (n + 1))]
            total += ids[0]
        return total

    asked = []

    def noting(texts: list[str], *_: Any, **__: Any) -> dict[str, list[list[int]]]:
        asked.append(texts)
        return _lengths(texts)

    assert list(together([merged(times(n) for n in (0, 3, 1))], noting)) == [[0, 6, 1]]
    assert asked == [["x"], ["xx"], ["xxx"]]
    assert alone(merged([]), noting) == []


@pytest.mark.parametrize("chat", [None, CHATML])
@pytest.mark.parametrize("raw", [False, True])
def test_prompts_are_encoded_together_as_each_is_at_inference(chat: str | None, raw: bool):
    rng, watched = random.Random(4), Watched(_tokenizer(chat))
    prompts = [Prompt(_asked(rng), origin=f"f:{n}", plain=n % 3 == 0) for n in range(NUM)]
    made = encode_prompts(
        prompts, watched, max_tokens=99, room="test", on_too_long="error", fingerprint="x", raw=raw
    )  # fmt: skip
    assert list(made.ids) == [tuple(prompt_ids(p.messages, _tokenizer(chat), plain=p.plain, raw=raw)) for p in prompts]
    assert made.records == tuple(prompts) and len(watched.calls) == 4, "two for the marks, two for all prompts"


def test_ids_that_records_share_are_not_changed_by_one_of_them():
    talk = (Message("user", "q"), Message("assistant", "a"), Message("user", "q"), Message("assistant", "a"))
    encoder = Encoder(_tokenizer(CHATML), "sft", 64)
    found = [samples[0].ids.tolist() for samples in encoder.many([Chat(talk)] * 3)]
    assert found == [render(talk, encoder.tokenizer).ids] * 3
