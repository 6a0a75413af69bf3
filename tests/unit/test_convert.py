"""Rows become records: what each format gives, and what is wrong with a row."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.records import Chat, Labelled, Message, Pair, Prompt, Ranking, Text, read_records
from tunesmith.errors import DataError


def _records(tmp_path, *rows, stage, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_records(path, stage=stage, **options))


def _one(tmp_path, row, stage, **options):
    return _records(tmp_path, row, stage=stage, **options)[0]


def _said(tmp_path, row, stage, **options):
    with pytest.raises(DataError) as refused:
        _records(tmp_path, row, stage=stage, **options)
    return str(refused.value)


def test_alpaca_puts_the_input_below_the_instruction(tmp_path):
    plain, with_input = _records(
        tmp_path, {"instruction": "Add.", "input": "", "output": "3"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"}, stage="sft",
    )  # fmt: skip
    assert plain.messages == (Message("user", "Add."), Message("assistant", "3"))
    assert with_input.messages[0].content == "Add.\n\n1 and 2" and with_input.origin.endswith("data.jsonl:2")


def test_each_nested_instance_is_a_record(tmp_path):
    row = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "4"}]}
    first, second = _records(tmp_path, row, stage="sft")
    assert first.messages[0].content == "Add.\n\n1 2" and second.messages == (
        Message("user", "Add."), Message("assistant", "4"))  # fmt: skip
    assert [r.origin.rpartition(":")[2] for r in (first, second)] == ["1[1]", "1[2]"]


def test_tool_calls_tools_and_results_are_kept(tmp_path):
    function = {"name": "add", "arguments": '{"a": 1}'}
    row = {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"},
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
            {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
            {"role": "assistant", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "."}]},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
    }  # fmt: skip
    record = _one(tmp_path, row, "sft")
    assert isinstance(record, Chat) and record.tools == ({"type": "function", "function": {"name": "add"}},)
    assert record.messages[2].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert record.messages[3].name == "add" and record.messages[4].content == "Two."


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([("assistant", "a")], "begins with assistant"),
        ([("user", "a")], "no assistant message"),
        ([("user", "a"), ("system", "b"), ("assistant", "c")], "a system message that is not the first"),
        ([("user", "a"), ("assistant", "b"), ("tool", "c")], "a tool result that no tool call asked for"),
        ([("user", "a"), ("bot", "b")], "unknown role 'bot'"),
        ([("user", " "), ("assistant", "b")], "the content is empty"),
    ],
)
def test_a_conversation_that_is_none_is_refused(messages, said, tmp_path):
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    assert said in _said(tmp_path, row, "sft")


def test_labels_are_names_numbers_lists_and_truth_values(tmp_path):
    labels = ["good", 1, 2.0, True, ["a", "b"], []]
    found = [r.label for r in _records(tmp_path, *({"text": "t", "label": v} for v in labels), stage="classify")]
    assert found == ["good", "1", "2", "true", ("a", "b"), ()]
    assert _one(tmp_path, {"premise": "a", "hypothesis": "b", "label": 0}, "classify") == Labelled(
        "a", "0", "b", f"{tmp_path}/data.jsonl:1")  # fmt: skip
    for value in (None, 0.5, " ", {"a": 1}, ["a", "a"]):
        with pytest.raises(DataError, match=r"data.jsonl:2: 'label'"):
            _records(tmp_path, {"text": "t", "label": 1}, {"text": "t", "label": value}, stage="classify")


def test_pairs_from_text_messages_and_dialogues(tmp_path):
    asked, talk = (Message("user", "Hi?"),), [{"role": "user", "content": "Hi?"}]
    good, bad = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
    for row in (
        {"prompt": "Hi?", "chosen": "a", "rejected": "b"},
        {"prompt": talk, "chosen": good, "rejected": bad},
        {"chosen": talk + good, "rejected": talk + bad},
        {"prompt": talk, "chosen": talk + good, "rejected": talk + bad},
        {"prompt": "Hi?", "chosen": talk + good, "rejected": talk + bad},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: a", "rejected": "\n\nHuman: Hi?\n\nAssistant: b"},
    ):
        record = _one(tmp_path, row, "dpo")
        assert isinstance(record, Pair) and (record.prompt, record.chosen, record.rejected) == (asked, "a", "b"), row
    record = _one(tmp_path, {"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": 1.5}, "reward")
    assert record.margin == 1.5
    assert "a margin is 0 or more" in _said(
        tmp_path, {"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": -1}, "reward")  # fmt: skip
    other = [{"role": "user", "content": "Ho?"}]
    assert "differ before the last answer" in _said(tmp_path, {"chosen": talk + good, "rejected": other + bad}, "dpo")


@pytest.mark.parametrize(
    ("row", "ranks"),
    [
        ({"ranks": [2, 1, 2]}, (2, 1, 2)),
        ({"ranking": [[1], [0, 2]]}, (2, 1, 2)),
        ({"scores": [0.1, 5, 0.1]}, (2, 1, 2)),
        ({"scores": [3, 2, 1]}, (1, 2, 3)),
        ({"ranks": [1, 1, 1]}, (1, 1, 1)),
    ],
)
def test_rankings_of_k_from_ranks_orders_and_scores(row, ranks, tmp_path):
    record = _one(tmp_path, {"prompt": "p", "completions": ["a", "b", "c"], **row}, "reward")
    assert isinstance(record, Ranking) and record.ranks == ranks and record.completions == ("a", "b", "c")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ranks": [0, 1, 2]}, "ranks are whole numbers from 1"),
        ({"ranks": [1, 2]}, "has 2 entries for 3 answers"),
        ({"ranks": [1, 2, None]}, "not a number"),
        ({"ranking": [[0], [0, 1]]}, "does not name each of the 3 answers once"),
        ({"scores": [1, 2, "x"]}, "'x', not a number"),
        ({"completions": ["a"], "ranks": [1]}, "no list of at least two answers"),
        ({"completions": ["a", "", "c"], "ranks": [1, 2, 3]}, "answer 2 is no text or empty"),
    ],
)
def test_a_ranking_that_is_none_is_refused(row, said, tmp_path):
    assert said in _said(tmp_path, {"prompt": "p", "completions": ["a", "b", "c"], **row}, "reward")


def test_prompts_keep_the_other_fields_of_their_row(tmp_path):
    record = _one(tmp_path, {"question": "2+2?", "answer": "4", "level": 3, "tags": ["a"]}, "grpo")
    assert record == Prompt((Message("user", "2+2?"),), "4", {"answer": "4", "level": 3, "tags": ["a"]}, record.origin)
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello"}]
    record = _one(tmp_path, {"messages": talk}, "ppo")
    assert record.messages == (Message("user", "Hi?"),) and record.answer == "Hello"


def test_a_template_merges_columns_and_is_the_whole_prompt_where_nothing_is_answered(tmp_path):
    row = {"quote": "Be yourself", "tags": ["a", "b"], "label": "x", "chosen": "c", "rejected": "r"}
    text = "{quote} ->: {tags}"
    assert _one(tmp_path, row, "pretrain", template=text) == Text("Be yourself ->: a, b", f"{tmp_path}/data.jsonl:1")
    answered = _one(tmp_path, row, "sft", template=text)
    assert answered.plain and [m.content for m in answered.messages] == ["Be yourself ->: ", "a, b"]
    assert _one(tmp_path, row, "classify", template=text).text == "Be yourself ->: a, b"
    assert _one(tmp_path, row, "dpo", template=text).prompt[0].content == "Be yourself ->: a, b"
    assert _one(tmp_path, row, "grpo", template=text).messages[0].content == "Be yourself ->: a, b"


def test_a_label_is_never_pasted_into_the_text_that_is_classified(tmp_path):
    record = _one(tmp_path, {"text": "Good", "label": "pos"}, "classify", template="classify")
    assert "pos" not in record.text and record.label == "pos" and "Good" in record.text


def test_a_template_finds_columns_by_role_and_names_what_it_misses(tmp_path):
    record = _one(tmp_path, {"Frage": "Wer?", "Antwort": "Kennedy"}, "sft", template="qa")
    assert record.messages[0].content == "Please answer the following question.\n\nQ: Wer?\n\nA: "
    assert "{rezension} is no column" in _said(tmp_path, {"text": "a"}, "pretrain", template="{rezension}")
    assert "nothing but empty text" in _said(tmp_path, {"a": "", "b": " "}, "pretrain", template="{a}{b}")
    assert "'answer' is empty" in _said(
        tmp_path, {"question": "Wer?", "answer": ""}, "sft", template="qa")  # fmt: skip
