"""What is trained on, and what becomes of rows that are too long: counted as an independent recount counts."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tests.tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from tunesmith.data.encode import POLICIES, Encoder, tokenizer_hash
from tunesmith.data.kinds import Chat, Labelled, Message, Pair, Ranking, Text
from tunesmith.data.records import read_records
from tunesmith.data.store import build_store
from tunesmith.errors import DataError


def _tokenizer(*, cls: bool = False, bos: bool = False, **options):
    """Tiny, with [cls] a [sep] round a text, or bos before it."""
    tokenizer = tiny_tokenizer(**options)
    if cls:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> $B <sep>", special_tokens=[("<cls>", 5), ("<sep>", 6)]
        )
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return tokenizer


def _ids(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


WORDS = " ".join(f"w{n}" for n in range(200))


def _talk(prompt: str, answer: str) -> Chat:
    return Chat((Message("user", prompt), Message("assistant", answer)), origin="f:1")


def test_raw_text_is_all_targets_but_the_first_token():
    for tokenizer, start in ((_tokenizer(), []), (_tokenizer(bos=True), [1])):
        (sample,) = Encoder(tokenizer, "pretrain", 64)(Text("the cat sat", "f:1"))
        assert sample.ids.tolist() == [*start, *_ids("the cat sat"), 2]
        assert sample.weights.tolist() == [0.0] + [1.0] * (len(sample) - 1) and sample.origin == "f:1"


def test_only_the_answer_has_weight_unless_the_prompt_is_wanted():
    tokenizer = _tokenizer()
    (sample,) = Encoder(tokenizer, "sft", 64)(_talk("two plus two?", "four"))
    assert tokenizer.decode(sample.ids[sample.weights > 0]) == "four<eos>"
    (whole,) = Encoder(tokenizer, "sft", 64, mask_prompt=False)(_talk("two plus two?", "four"))
    assert whole.ids.tolist() == sample.ids.tolist() and whole.weights.tolist() == [0.0] + [1.0] * (len(whole) - 1)


def test_a_long_text_keeps_its_last_tokens_and_the_special_ones():
    text = " ".join(f"w{n}" for n in range(300))
    body = _ids(text)
    assert len(body) > 600
    encoder = Encoder(_tokenizer(cls=True), "classify", 512, "truncate_left", label_names=("0", "1"))
    (sample,) = encoder(Labelled(text, "1", origin="f:1"))
    assert sample.ids.tolist() == [5, *body[-510:], 6] and len(sample) == 512 and sample.label == 1
    assert dict(encoder.tally) == {"truncated": 1, "tokens_lost": len(body) - 510}
    encoder = Encoder(_tokenizer(cls=True), "classify", 512, "truncate_right", label_names=("0", "1"))
    assert encoder(Labelled(text, "0"))[0].ids.tolist() == [5, *body[:510], 6]


CUTS = [(stage, policy) for stage in ("pretrain", "mlm", "sft", "classify") for policy in POLICIES[1:]]


@pytest.mark.parametrize(("stage", "policy"), [c for c in CUTS if c not in (("sft", "split"), ("classify", "split"))])
def test_what_a_policy_does_is_counted_as_a_recount_counts(stage, policy):
    rng, limit = random.Random(1), 40
    tokenizer = _tokenizer(cls=stage in ("mlm", "classify"))
    encoder = Encoder(tokenizer, stage, limit, policy, label_names=("0",))
    wanted = dict.fromkeys(("truncated", "split", "tokens_lost", "dropped_too_long", "dropped_no_answer_left"), 0)
    for _ in range(100):
        text = " ".join(WORDS.split()[: rng.randint(1, 60)])
        record = {"sft": _talk("a b c d", text), "classify": Labelled(text, "0")}.get(stage, Text(text))
        around = {"sft": len(_ids("<|user|>a b c d<eos><|assistant|>")) + 1, "pretrain": 1}.get(stage, 2)
        length, samples = len(_ids(text)) + around, encoder(record)
        assert all(len(sample) <= limit for sample in samples)
        if length > limit and policy.startswith("truncate"):
            wanted["truncated"] += 1
            wanted["tokens_lost"] += length - limit
            assert len(samples) == 1 and len(samples[0]) == limit
        elif length > limit:
            wanted["split" if policy == "split" else "dropped_too_long"] += 1
            assert (len(samples) > 1) == (policy == "split")
        else:
            assert len(samples) == 1 and len(samples[0]) == length
    assert {k: v for k, v in encoder.tally.items() if v} == {k: v for k, v in wanted.items() if v}
    assert wanted["truncated"] + wanted["split"] + wanted["dropped_too_long"] > 25


def test_splitting_loses_no_target():
    tokenizer = _tokenizer()
    ids = [*_ids(WORDS), 2]
    samples = Encoder(tokenizer, "pretrain", 50, "split")(Text(WORDS))
    assert [i for s in samples for i, w in zip(s.ids.tolist(), s.weights, strict=True) if w] == ids[1:]
    masked = Encoder(_tokenizer(cls=True), "mlm", 50, "split")(Text(WORDS))
    assert [i for s in masked for i in s.ids.tolist()[1:-1]] == ids[:-1]


def test_an_answer_cut_away_whole_is_dropped_and_counted():
    encoder = Encoder(_tokenizer(), "sft", 20, "truncate_right")
    assert encoder(_talk(WORDS, "answer")) == [] and encoder.tally["dropped_no_answer_left"] == 1
    encoder = Encoder(_tokenizer(), "pretrain", 20)
    assert Encoder(tiny_tokenizer(), "mlm", 20)(Text("a")) and encoder(Text("a"))
    encoder.tokenizer.eos_token = None
    assert encoder(Text("a")) == [] and encoder.tally["dropped_nothing_to_predict"] == 1


def _store(tmp_path, rows, stage="sft", limit=40, policy="error", tokenizer=None, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(path, stage=stage)
    return build_store(records, Encoder(tokenizer or _tokenizer(), stage, limit, policy, **options), tmp_path / "cache")


def test_rows_too_long_are_an_error_that_names_the_lengths_that_would_do(tmp_path):
    rows = [{"text": " ".join(WORDS.split()[: n + 1])} for n in range(100)]
    lengths = sorted(len(_ids(row["text"])) + 1 for row in rows)
    with pytest.raises(DataError) as refused:
        _store(tmp_path, rows, stage="pretrain")
    said = str(refused.value)
    assert f"{sum(length > 40 for length in lengths)} of 100 rows have more than 40 tokens" in said
    for share, length in ((100, lengths[99]), (99, lengths[98]), (95, lengths[94])):
        assert f"{length} keeps {share} %" in said
        assert len(_store(tmp_path, rows, stage="pretrain", limit=length, policy="drop")) == share
    for policy in ("truncate_left", "truncate_right", "split", "drop"):
        assert policy in said


def test_a_limit_without_room_for_a_token_is_refused():
    for stage, limit in (("classify", 2), ("mlm", 2), ("pretrain", 1), ("sft", 1)):
        with pytest.raises(DataError, match=r"data.max_length is \d; a row needs at least"):
            Encoder(_tokenizer(cls=True), stage, limit, "truncate_left")


def test_labels_are_indices_or_one_number_a_class():
    tokenizer = _tokenizer(cls=True)
    single = Encoder(tokenizer, "classify", 64, label_names=("no", "yes"))
    assert single(Labelled("a", "yes"))[0].label == 1
    several = Encoder(tokenizer, "classify", 64, label_names=("a", "b", "c"), multi_label=True)
    assert several(Labelled("t", ("c", "a")))[0].label == (1.0, 0.0, 1.0) and several(Labelled("t", ()))[0].label == (
        0,
        0,
        0,
    )
    with pytest.raises(DataError, match=r"f:7: the label 'maybe' is unknown; known are no, yes"):
        single(Labelled("a", "maybe", origin="f:7"))
    with pytest.raises(DataError, match="2 labels where one is wanted"):
        single(Labelled("a", ("no", "yes")))


def test_two_texts_keep_the_tokens_round_and_between_them():
    (sample,) = Encoder(_tokenizer(cls=True), "classify", 64, label_names=("0",))(Labelled("aa", "0", "bb"))
    assert sample.ids.tolist() == [5, *_ids("aa"), 6, *_ids("bb"), 6]


def test_a_row_that_does_not_fit_the_stage_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"f:3: stage pretrain cannot train on a Chat row|f:3"):
        Encoder(_tokenizer(), "pretrain", 64)(Pair((Message("user", "q"),), "a", "b", "f:3"))


def test_answers_to_one_prompt_are_one_group_with_their_ranks():
    encoder = Encoder(_tokenizer(), "reward", 64)
    samples = encoder(Ranking((Message("user", "q"),), ("a", "b", "c"), (2, 1, 2), "f:1"))
    assert [s.label for s in samples] == [(2, 0), (1, 0), (2, 0)] and len({s.group for s in samples}) == 1
    assert encoder(Ranking((Message("user", "q"),), ("a", "b"), (1, 1))) == []
    assert encoder.tally["dropped_nothing_to_compare"] == 1


def test_the_key_changes_with_everything_that_decides_the_samples():
    def key(tokenizer=None, stage="sft", limit=64, **options):
        return Encoder(tokenizer or _tokenizer(), stage, limit, **options).key

    changed = _tokenizer()
    changed.chat_template = changed.chat_template + " "
    grown = _tokenizer()
    grown.add_tokens(["newword"])
    keys = [
        key(), key(limit=65), key(stage="pretrain"), key(on_too_long="drop"), key(mask_prompt=False),
        key(label_names=("a",)), key(multi_label=True), key(changed), key(grown), key(_tokenizer(cls=True)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) and key() == key()
    assert tokenizer_hash(_tokenizer()) == tokenizer_hash(_tokenizer()) != tokenizer_hash(grown)


def test_encoding_says_nothing_about_lengths(tmp_path, caplog, capfd):
    tokenizer = _tokenizer(cls=True)
    tokenizer.model_max_length = 16
    store = _store(
        tmp_path, [{"text": WORDS, "label": 0}] * 3, "classify", 32, "truncate_left", tokenizer, label_names=("0",)
    )
    assert len(store) == 3 and not caplog.records and capfd.readouterr() == ("", "")


def test_ids_come_back_as_the_text_they_were_made_of():
    rng, tokenizer = random.Random(2), _tokenizer()
    for _ in range(200):
        text = "".join(rng.choices("aé\n 漢\t{}🙂ß'\"0", k=rng.randint(1, 30)))
        (sample,) = Encoder(tokenizer, "pretrain", 512)(Text(text))
        assert tokenizer.decode(sample.ids[:-1]) == text and np.all(sample.ids < len(tokenizer))


def test_a_text_of_nothing_but_special_tokens_has_nothing_to_mask_and_is_left_out():
    encoder = Encoder(_tokenizer(cls=True), "mlm", 20)
    assert encoder(Text("<unk><unk>")) == [] and encoder.tally["dropped_nothing_to_predict"] == 1
    assert len(encoder(Text("<unk> a"))) == 1 and encoder.tally["dropped_nothing_to_predict"] == 1
