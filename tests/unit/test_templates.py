"""Prompt templates byte for byte, the same at inference, and every mistake named."""

from __future__ import annotations

import pytest
from tests.tiny import tiny_tokenizer

from tunesmith.data.chat import prompt_ids, render
from tunesmith.data.kinds import Message
from tunesmith.data.templates import TEMPLATES, Template, get_template, placeholders
from tunesmith.errors import DataError

QUESTION = "Who was the 35th President of the United States?"


def test_the_question_template_byte_for_byte():
    prompt, completion = get_template("qa").render({"question": QUESTION, "answer": "John F. Kennedy"})
    whole = b"Please answer the following question.\n\nQ: Who was the 35th President of the United States?\n\nA: "
    assert (prompt.encode(), completion.encode()) == (whole, b"John F. Kennedy")


def test_inference_has_the_prompt_of_training_and_nothing_of_the_answer():
    template, tokenizer = get_template("qa"), tiny_tokenizer()
    prompt, answer = template.render({"question": QUESTION, "answer": "John F. Kennedy"})
    asked, empty = template.render({"question": QUESTION}, completion=False)
    assert (asked, empty) == (prompt, "")
    trained = render([Message("user", prompt), Message("assistant", answer)], tokenizer, plain=True)
    start = trained.trained.index(True)
    assert prompt_ids(asked, tokenizer, plain=True) == trained.ids[:start]
    assert tokenizer.decode(trained.ids[start:]) == "John F. Kennedy<eos>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_hold_every_column_and_come_back_from_what_is_saved(name):
    template = get_template(name)
    values = {column: f"<{column} {{x}}>" for column in template.columns}
    prompt, completion = template.render(values)
    assert all((value in prompt) != (value in completion) for value in values.values())
    assert get_template(template.as_dict()) == template and completion == values[template.columns[-1]]


def test_there_is_one_for_each_task():
    assert {"qa", "summarise", "translate", "classify", "alpaca"} <= set(TEMPLATES)


def test_the_last_placeholder_begins_the_completion():
    assert get_template("Q: {q} A: {a} end") == Template("Q: {q} A: ", "{a} end")
    assert get_template("{quote} ->: {tags}").render({"quote": "Be", "tags": ["x", "y"]}) == ("Be ->: ", "x, y")
    assert get_template("{q} {a}", answered=False) == Template("{q} {a}")
    assert get_template("all {q}") == Template("all {q}")
    assert get_template('{{"a"}}: {q} -> {a}').render({"q": "1", "a": "2"}) == ('{"a"}: 1 -> ', "2")


def test_values_are_pasted_and_never_parsed():
    row = {"q": "{a} {{ }} {0.__class__}", "a": 4.5}
    assert get_template("{q}={a}").render(row) == ("{a} {{ }} {0.__class__}=", "4.5")
    assert get_template("{a}").render({"a": True})[0] == "true"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{q.__class__}", "only a column's name"),
        ("{q[0]}", "only a column's name"),
        ("{q!r} {a}", "only a column's name"),
        ("{q:>9}", "only a column's name"),
        ("{} {a}", "only a column's name"),
        ("{q", "braces"),
        ("}", r"braces|no template is named"),
        ("quesion", "no template is named"),
        ("alpac", r"did you mean alpaca"),
        ({"prompt": "{q}", "answer": "{a}"}, "keys prompt and completion"),
        ({"prompt": 3}, "is text with"),
        ({"prompt": "no placeholder"}, "has no {column} placeholder"),
    ],
)
def test_a_template_that_is_none_is_refused(text, said):
    with pytest.raises(DataError, match=said):
        get_template(text)


def test_an_unknown_placeholder_and_a_value_that_is_no_text_are_errors():
    with pytest.raises(DataError, match=r"\{quesion\} is no column.*did you mean \{question\}"):
        get_template("{quesion} {answer}").render({"question": "q", "answer": "a"})
    for value in (None, {"a": 1}, float("nan"), [1, 2], b"x"):
        with pytest.raises(DataError, match="column 'a' is"):
            Template("{a}").render({"a": value})


def test_placeholders_in_their_order():
    assert placeholders("a {b} {{c}} {d d}") == ["b", "d d"]
