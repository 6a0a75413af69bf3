"""Gates, figures, near duplicates and tokens of the pre-flight page: planted faults are found, clean data is not."""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from tests.tiny import tiny_tokenizer

from tunesmith.cli_output import painted
from tunesmith.data.check import check_records
from tunesmith.data.encode import Encoder
from tunesmith.data.kinds import Chat, Labelled, Message, Pair, Text
from tunesmith.data.preview import preview, text_kept
from tunesmith.data.scan import Scan, end_ids, scan
from tunesmith.data.similar import similar_rows
from tunesmith.plan.page import Painted, row_lines
from tunesmith.plan.preflight import GATES, NAMES, found_values, judge, refusals, scan_values
from tunesmith.recipe_preflight import GateName
from tunesmith.stages import beforehand

ROOT = Path(__file__).resolve().parents[2]
PAD, BOS, EOS, UNK = 0, 1, 2, 3


class Rows:
    """Samples in memory, one behind the other, as a store gives them."""

    def __init__(self, *rows: tuple[list[int], list[float]]) -> None:
        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows], np.int64)

    def flat(self, start: int, stop: int) -> tuple[Any, Any]:
        ids, weights = zip(*self.rows[start:stop], strict=True)
        return np.concatenate([np.array(i, np.int32) for i in ids]), np.concatenate([np.array(w) for w in weights])


def chat(question: str, answer: str, origin: str = "") -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)), origin=origin)


def kinds(*args: Any, **options: Any) -> dict[str, Any]:
    return {finding.kind: finding for finding in check_records(*args, **options)}


@pytest.mark.parametrize("gate", GATES, ids=NAMES)
def test_a_figure_at_its_limit_passes_and_one_beyond_is_refused_unless_it_is_allowed(gate):
    beyond = gate.limit - 1e-6 if gate.least else gate.limit + 1e-6
    assert judge({gate.name: gate.limit}, ())[0].state == "passed"
    (failed,) = judge({gate.name: beyond}, ())
    assert failed.state == "failed" and gate.name in refusals([failed])[0]
    assert f"preflight.allow: [{gate.name}]" in refusals([failed])[0]
    (passed,) = judge({gate.name: beyond}, (gate.name,))
    assert passed.state == "allowed" and not refusals([passed])


def test_what_is_not_known_is_not_judged():
    assert judge({"end_tokens": None}, ()) == ()


def test_the_recipe_and_the_page_know_the_gates_of_the_table():
    assert sorted(get_args(GateName)) == sorted(NAMES)
    text = (ROOT / "docs" / "preflight.md").read_text(encoding="utf-8")
    for gate in GATES:
        bound = "at least" if gate.least else "at most"
        limit = "none" if gate.limit == 0 else f"{bound} {100 * gate.limit:g} %"
        assert f"| `{gate.name}` | {limit} |" in text, gate.name


def test_the_figures_of_encoded_rows_are_counted():
    whole = ([BOS, 10, 11, EOS], [0, 0, 1, 1])
    cut = ([BOS, 10, UNK, 12], [0, 0, 1, 1])
    twice = ([BOS, BOS, 10, EOS], [0, 0, 0, 1])
    found = scan(Rows(whole, cut, twice), tiny_tokenizer(), [EOS])
    assert (found.samples, found.tokens, found.trained) == (3, 12, 5)
    assert (found.answers, found.ended, found.unknown, found.doubled) == (3, 2, 1, 1)
    assert found.plain == 5
    values = scan_values(found, "sft", 3, {"dropped_too_long": 1, "truncated": 7})
    assert values["end_tokens"] == pytest.approx(2 / 3) and values["rows_left"] == 0.75
    assert values["double_bos"] == pytest.approx(1 / 3) and values["unknown_tokens"] == pytest.approx(1 / 6)
    assert scan_values(found, "classify", 3, {})["trained_share"] is None


def test_a_scan_in_blocks_is_the_scan_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [([BOS, *rng.integers(7, 50, rng.integers(1, 9)).tolist()], [0.0] + [1.0] * 8) for _ in range(40)]
    rows = [(ids, weights[: len(ids)]) for ids, weights in rows]
    whole = scan(Rows(*rows), tiny_tokenizer(), [20, 21])
    monkeypatch.setattr("tunesmith.data.scan._BLOCK_TOKENS", 16)
    parts = scan(Rows(*rows), tiny_tokenizer(), [20, 21])
    names = ("samples", "tokens", "plain", "trained", "answers", "ended", "doubled")
    assert [getattr(whole, n) for n in names] == [getattr(parts, n) for n in names]
    monkeypatch.setattr("tunesmith.data.scan.MAX_TOKENS", 30)
    assert scan(Rows(*rows), tiny_tokenizer(), [20]).samples < 40


def test_a_limit_is_told_with_what_it_cuts():
    found = Scan(100, lengths=np.array([10] * 95 + [20] * 4 + [100]))
    limits = {row["share"]: (row["max_length"], row["tokens_cut"]) for row in found.limits()}
    assert limits[0.95] == (10, pytest.approx((40 + 90) / 1130))
    assert limits[0.99] == (20, pytest.approx(80 / 1130)) and limits[1.0] == (100, 0.0)
    assert found.quantiles == {"shortest": 10, "5 %": 10, "50 %": 10, "95 %": 10, "99 %": 20, "longest": 100}


def _rows(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, 3000) for _ in range(rng.randrange(30, 120))] for _ in range(count)]


def _similar(rows: list[list[int]]) -> Any:
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return similar_rows(np.array([i for row in rows for i in row], np.int32), bounds, len(rows))


def test_rows_with_a_word_changed_are_near_duplicates_and_others_are_not():
    rows = _rows(400, 1)
    changed = [[*row[:-1], 6] for row in rows[:20]]
    halves = [row[: len(row) // 2] + other for row, other in zip(rows[50:60], _rows(10, 2), strict=True)]
    found = _similar([*rows, *changed, *halves, *rows[100:105]])
    assert {tuple(pair) for pair in found.pairs.tolist()} == {(400 + i, i) for i in range(20)}
    assert found.repeats == 5
    assert len(_similar(rows).pairs) == 0


def test_a_form_that_many_rows_share_makes_no_near_duplicates():
    form = list(range(100, 200))
    rows = [[*form, *row[:12]] for row in _rows(300, 3)]
    assert len(_similar(rows).pairs) == 0
    assert len(_similar([*rows[:3], [*rows[0][:-1], 6]]).pairs) == 3, "the control: four rows are no form"


def test_one_question_with_two_answers_and_one_answer_to_all_are_told():
    rows = [chat(f"question {i}?", f"answer {i}") for i in range(30)]
    assert not {"two_answers", "one_answer"} & set(kinds(rows))
    assert kinds([*rows, chat("Question  3?", "another")])["two_answers"].count == 1
    assert kinds([chat(f"question {i}?", "yes") for i in range(30)])["one_answer"].count == 30


def test_pairs_in_both_orders_are_told():
    ask = (Message("user", "which?"),)
    one, other = Pair(ask, "good", "bad", "p:1"), Pair(ask, "Bad", "good", "p:2")
    assert kinds([one, other])["both_orders"].examples == ("p:1 = p:2",)
    assert "both_orders" not in kinds([one, Pair(ask, "good", "worse", "p:3")])


def test_special_tokens_in_the_text_are_told():
    rows = [Text("plain text", "t:1"), Text("an <eos> in it", "t:2")]
    assert kinds(rows, marks=["<eos>", "<|im_end|>"])["special_text"].examples == ("t:2",)
    assert "special_text" not in kinds(rows, marks=["<|im_end|>"])


def test_held_out_rows_of_one_label_are_told():
    train = [Labelled(f"text {i}", "ab"[i % 2]) for i in range(8)]
    assert kinds(train, [Labelled("x", "a"), Labelled("y", "a")])["one_held_out_label"].count == 2
    assert "one_held_out_label" not in kinds(train, [Labelled("x", "a"), Labelled("y", "b")])


@pytest.mark.parametrize(("rows", "figure"), [(2, 0.0), (9, 0.0), (10, 1.0)])
def test_a_few_held_out_rows_may_have_one_label_by_chance(rows, figure):
    train = [Labelled(f"text {i}", "ab"[i % 2]) for i in range(8)]
    values, _ = found_values(check_records(train, [Labelled(f"held {i}", "a") for i in range(rows)]))
    assert values["one_class"] == figure


def test_findings_become_shares_with_their_first_places():
    train = [Labelled(f"text {i}", "ab"[i % 2], origin=f"t:{i}") for i in range(8)]
    values, details = found_values(check_records([*train, Labelled("text 0", "b", origin="t:8")], train[:2]))
    assert values["overlap"] == 1.0 and values["conflicts"] == pytest.approx(1 / 9)
    assert details["conflicts"] == "t:0 = t:8" and values["duplicates"] == 0.0


def _shown(record: Any, **settings: Any) -> list[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    samples = Encoder(tokenizer, "sft", settings.get("max_length", 200), "truncate_left")(record)
    ends = end_ids(tokenizer, tokenizer.eos_token_id)
    return preview(samples, [record], tokenizer, ends=ends, names={}, rows=3)


def test_tokens_are_told_with_who_wrote_them_and_whether_they_are_trained_on():
    (row,) = _shown(chat("Wie heißt du?", "Jürgen 🙂", "talk.jsonl:7"))
    assert row["origin"] == "talk.jsonl:7" and row["left_out"] == 0
    said = {who: "".join(t["text"] for t in row["tokens"] if t["author"] == who) for who in ("user", "assistant")}
    assert said == {"user": "Wie heißt du?", "assistant": "Jürgen 🙂"}
    trained = [t for t in row["tokens"] if t["trained"]]
    assert "".join(t["text"] for t in trained) == "Jürgen 🙂<eos>"
    assert [t["end"] for t in trained] == [False] * (len(trained) - 1) + [True]
    assert {t["author"] for t in row["tokens"] if t["special"]} == {"template"}


def test_a_row_whose_beginning_was_cut_off_still_says_who_wrote_the_rest():
    (row,) = _shown(chat("one two three four five six seven eight nine", "the answer"), max_length=30)
    assert {t["author"] for t in row["tokens"]} == {"user", "template", "assistant"}


def test_the_middle_of_a_long_row_is_counted_not_shown():
    (row,) = _shown(chat("word " * 200, "the end"), max_length=2000)
    assert row["left_out"] == row["num_tokens"] - len(row["tokens"]) > 0
    assert any("are not shown" in line for line in row_lines(row, 400))
    assert row["tokens"][-1]["end"]


def test_a_text_that_does_not_come_back_is_shown():
    tokenizer = tiny_tokenizer()
    assert text_kept([Text("Any text: ü 🙂")], tokenizer) == {"rows": 1, "same": 1, "example": None}

    class Folding:
        def __call__(self, text: str, **_: Any) -> Any:
            return tokenizer(text.lower(), add_special_tokens=False)

        decode = tokenizer.decode

    lossy = text_kept([Text("The cat SAT")], Folding())
    assert lossy["same"] == 0 and lossy["example"][0].startswith("The cat")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_stand_on_a_terminal_only_and_not_where_they_are_not_wanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    line = Painted(("", "  + "), ("trained", "ans\x1b[2Jwer"), ("end", "<eos>"))
    plain = "  + ans\\x1b[2Jwer<eos>"
    assert painted(line, io.StringIO()) == plain
    assert painted(line, Terminal()) == "  + \x1b[32mans\\x1b[2Jwer\x1b[0m\x1b[7;32m<eos>\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted(line, Terminal()) == plain


@pytest.mark.parametrize(
    ("method", "device", "precision", "held"),
    [("lora", "cuda", "bfloat16", 200), ("lora", "cpu", "bfloat16", 400), ("lora", "cuda", "float32", 400),
     ("full", "cuda", "bfloat16", 1600)],
)  # fmt: skip
def test_a_frozen_base_is_held_on_a_gpu_in_the_type_of_its_products(monkeypatch, method, device, precision, held):
    monkeypatch.setattr(beforehand, "available_memory", lambda device: 1000)
    recipe: Any = SimpleNamespace(
        tune=SimpleNamespace(method=method, quantize=None), train=SimpleNamespace(optimizer="adamw")
    )
    assert beforehand._memory(recipe, {"parameters": 100}, device, precision) == {"held": held, "room": 1000}
