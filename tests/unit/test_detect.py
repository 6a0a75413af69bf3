"""Which format rows have, told from names and values; where there is doubt, an error that asks."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.records import read_records
from tunesmith.errors import DataError

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
TURNS = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
CALL = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Two."},
]  # fmt: skip
DIALOGUE = "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: "

RECOGNISED = [
    ({"text": "raw text"}, "pretrain", "text"),
    ({"content": "raw text", "url": "http://x", "id": 3}, "mlm", "text"),
    ({"instruction": "Do it.", "input": "", "output": "Done."}, "sft", "alpaca"),
    ({"prompt": "Hi", "completion": "Hello"}, "sft", "prompt_completion"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "sft", "prompt_completion"),
    ({"question": "Hi?", "answer": "Hello"}, "sft", "question_answer"),
    ({"Frage": "Hi?", "Antwort": "Hello", "Nr": "7"}, "sft", "question_answer"),
    ({"user_question": "Hi?", "bot-answer": "Hello", "created_at": "2020"}, "sft", "question_answer"),
    ({"wissen": "Wer war das?", "kunde": "Kennedy"}, "sft", "question_answer"),
    ({"messages": CHAT}, "sft", "messages"),
    ({"messages": CALL, "tools": [{"type": "function", "function": {"name": "add"}}]}, "sft", "messages"),
    ({"conversations": TURNS, "system": "Be kind."}, "sft", "sharegpt"),
    ({"instruction": "Do", "instances": [{"input": "", "output": "Done"}], "id": "x"}, "sft", "instances"),
    ({"text": "Good film", "label": 1}, "classify", "labelled"),
    ({"review": "Good film", "sentiment": "pos", "id": 3}, "classify", "labelled"),
    ({"premise": "A", "hypothesis": "B", "label": "entails"}, "classify", "labelled"),
    ({"text": "Good film", "labels": ["a", "b"]}, "classify", "labelled"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "dpo", "preference"),
    ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, "reward", "preference"),
    ({"chosen": CHAT, "rejected": CHAT}, "dpo", "preference"),
    ({"chosen": TURNS, "rejected": TURNS}, "dpo", "preference"),
    ({"chosen": DIALOGUE + "Bye.", "rejected": DIALOGUE + "No."}, "reward", "dialogue_pairs"),
    ({"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}, "reward", "ranking"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [0.5, 2]}, "reward", "scored"),
    ({"prompt": "Hi", "target": 3}, "grpo", "prompts"),
    ({"question": "2+2?", "answer": "4"}, "ppo", "prompts"),
    ({"messages": CHAT[:1], "answer": "4"}, "grpo", "prompts"),
    ({"problem": "2+2?", "solution": "It is 4", "answer": "4"}, "grpo", "prompts"),
]


def _write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "stage", "format"), RECOGNISED, ids=lambda value: str(value)[:50])
def test_formats_are_recognised_and_shown(row, stage, format, tmp_path):
    records = read_records(_write(tmp_path, *[row] * 5), stage=stage)
    assert records.format == format and len(records) == 5
    described = records.describe()
    assert f"format: {format} (jsonl)" in described and "first: " in described
    assert all(repr(column) in described for column in records.columns.values())


@pytest.mark.parametrize(
    ("row", "stage", "said"),
    [
        (
            {"a": "one text", "b": "another"},
            "sft",
            r"which columns are meant.*data.columns: \{question: a, answer: b\}",
        ),
        ({"question": "q", "response": "r", "answer": "a"}, "sft", "in doubt: several"),
        ({"question": "q", "answer": "a", "context": "c"}, "sft", "'context' would be left out; a template"),
        ({"text": "t", "body": "b", "x": 1}, "sft", "which columns"),
        ({"title": "t", "abstract": "b", "body": "c"}, "pretrain", "several columns could be the text"),
        ({"text": "a", "intent": "x", "topic": "y"}, "classify", "several columns could be the label: intent, topic"),
        ({"text": "a", "label": 1}, "sft", "these rows fit the stage classify"),
        ({"chosen": "a", "rejected": "b"}, "sft", "these rows fit the stages dpo, reward"),
        ({"prompt": "Hi", "completions": ["a", "b"]}, "reward", "not ranked yet: `tunesmith rank FILE`"),
        ({"question": "q?", "context": "c", "answers": {"text": ["a"]}}, "sft", "which columns are meant"),
        ({"x": 1}, "pretrain", r"Columns: x \(number\)"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_doubt_is_an_error_that_asks(row, stage, said, tmp_path):
    with pytest.raises(DataError, match=rf"(?s){said}"):
        list(read_records(_write(tmp_path, *[row] * 5), stage=stage))


def test_columns_are_named_by_role_and_mistakes_in_naming_are_all_listed(tmp_path):
    path = _write(tmp_path, {"a": "one text", "b": "another", "c": 3})
    records = read_records(path, stage="sft", columns={"question": "b", "answer": "a"})
    assert next(iter(records)).messages[0].content == "another"
    assert read_records(path, stage="classify", columns={"text": "a", "label": "c"}).format == "labelled"
    with pytest.raises(DataError) as refused:
        read_records(path, stage="sft", columns={"quesion": "a", "answer": "bb"})
    assert "did you mean question" in str(refused.value) and "there is no column 'bb'" in str(refused.value)


def test_formats_are_chosen_by_name_and_typos_named(tmp_path):
    path = _write(tmp_path, {"prompt": "Hi", "completion": "Hello", "text": "t"})
    assert read_records(path, stage="sft", format="prompt_completion").format == "prompt_completion"
    for name, said in (("alpcaa", "did you mean alpaca"), ("labelled", "stage sft does not read the format labelled")):
        with pytest.raises(DataError, match=said):
            read_records(path, stage="sft", format=name)
    for stage, policy in (("sfd", "error"), ("sft", "ignore")):
        with pytest.raises(DataError, match="is not known"):
            read_records(path, stage=stage, on_bad_row=policy)
