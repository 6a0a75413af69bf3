"""Rankings typed by a person: shown in random order, checked, kept at once in the order of the completions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chains import write_rows

import tunesmith.errors
from tunesmith import api
from tunesmith.data.records import Ranking, pairs_of, read_records
from tunesmith.errors import DataError, RunError
from tunesmith.stages.ranking import parse_ranking, read_tasks

TEXTS = ["first", "second", "third", "fourth"]


def samples(path, count=3, texts=TEXTS):
    return write_rows(path, [{"prompt": f"prompt {i}", "completions": texts} for i in range(count)])


class Person:
    """Types the given lines; `best` ranks what is shown by a list from best to worst."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.shown = []

    def show(self, text):
        self.shown.append(text)

    def ask(self, question):
        line = self.lines.pop(0) if self.lines else None
        return self.typed(line) if isinstance(line, list) else line

    def typed(self, best):
        labels = {}
        for part in self.shown[-1].split("-- ")[1:]:
            label, _, rest = part.partition(" --\n")
            labels[rest.strip()] = label
        return " > ".join("=".join(labels[text] for text in group.split("=")) for group in best)


def rank(path, person, **more):
    return api.rank(path, ask=person.ask, show=person.show, **more)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("B > A = D > C", [2, 1, 3, 2]), ("b>a=d>c", [2, 1, 3, 2]), ("DCBA", [4, 3, 2, 1]), ("A=B=C=D", [1, 1, 1, 1]),
        ("c, a = b, d", [2, 2, 1, 3]), ("A B C D", [1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_rankings_are_read(typed, expected):
    assert parse_ranking(typed, 4) == (expected, "")


@pytest.mark.parametrize(
    "typed, said",
    [
        ("A > B > C", "D is missing"), ("A > B > C > D > E", "E is not shown"), ("A > A > B > C > D", "named twice"),
        ("A < B < C < D", "`<` stands"), ("> A B C D", "`>` stands"), ("A > = B C D", "`=` stands"),
        ("A B C D >", "nothing after"), ("1 2 3 4", "`1` stands"), ("", "A is missing"),
    ],
)  # fmt: skip
def test_what_is_no_ranking_is_said(typed, said):
    found, problem = parse_ranking(typed, 4)
    assert found is None and said in problem


def test_answers_come_back_in_the_order_of_the_completions(tmp_path):
    path = samples(tmp_path / "s.jsonl")
    best = [["third", "first=fourth", "second"]] * 3
    result = rank(path, Person(*best))
    assert result["ranked"] == 3 and result["left"] == 0 and result["pairs"] == 15
    assert all(
        row["ranks"] == [2, 3, 1, 2] and row["completions"] == TEXTS for row in rows(tmp_path / "s.ranked.jsonl")
    )


def test_the_order_shown_differs_from_prompt_to_prompt_and_not_from_time_to_time(tmp_path):
    path = samples(tmp_path / "s.jsonl", 20)
    orders = [task.order for task in read_tasks(path, seed=0)]
    assert len(set(orders)) > 8 and orders == [task.order for task in read_tasks(path, seed=0)]
    assert orders != [task.order for task in read_tasks(path, seed=1)]
    firsts = [order[0] for order in orders]
    assert len(set(firsts)) == 4, "every completion is shown first somewhere"


def test_stopping_keeps_every_answer_and_goes_on_with_the_rest(tmp_path):
    path = samples(tmp_path / "s.jsonl", 4)
    person = Person("ABCD", "what?", "?", "u", "s", "q")
    assert rank(path, person) == {"file": str(tmp_path / "s.ranked.jsonl"), "ranked": 1, "left": 3, "pairs": 6}
    assert "not understood" in "\n".join(person.shown) and "best to worst" in "\n".join(person.shown)
    with (tmp_path / "s.ranked.jsonl").open("a") as file:
        file.write('{"prompt": "half a li')
    again = Person("ABCD", "ABCD", "ABCD")
    assert rank(path, again)["left"] == 0 and len(again.shown) == 3
    assert rank(path, Person())["ranked"] == 4, "nothing is asked twice"


DIES = """
import os, signal, sys
from pathlib import Path
from tunesmith.stages.ranking import rank
lines = ["ABCD", "DCBA"]
ask = lambda question: lines.pop(0) if lines else os.kill(os.getpid(), signal.SIGKILL)
rank(Path(sys.argv[1]), Path(sys.argv[2]), seed=0, ask=ask, show=lambda text: None)
"""


def test_an_answer_is_on_the_disk_before_the_next_question(tmp_path):
    path, to = samples(tmp_path / "s.jsonl"), tmp_path / "r.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(tunesmith.errors.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", DIES, path, to], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(rows(to)) == 2


@pytest.mark.parametrize("num, pairs", [(4, 6), (9, 36)])
def test_rankings_of_k_give_all_their_pairs(tmp_path, num, pairs):
    texts = [f"text {i}" for i in range(num)]
    path = samples(tmp_path / "s.jsonl", 1, texts)
    result = rank(path, Person(texts), pairs=tmp_path / "p.jsonl")
    assert result["pairs"] == pairs and len(rows(tmp_path / "p.jsonl")) == pairs
    (record,) = read_records(tmp_path / "s.ranked.jsonl", stage="reward")
    assert isinstance(record, Ranking) and len(pairs_of(record)) == pairs
    both = list(read_records(tmp_path / "p.jsonl", stage="reward"))
    assert [(p.chosen, p.rejected) for p in both] == [(p.chosen, p.rejected) for p in pairs_of(record)]


def test_ties_are_dropped_as_pairs(tmp_path):
    result = rank(samples(tmp_path / "s.jsonl", 1), Person(["first=second=third=fourth"]), pairs=tmp_path / "p.jsonl")
    assert result["pairs"] == 0 and (tmp_path / "p.jsonl").read_text() == ""


def test_a_conversation_is_shown_and_kept_as_messages(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"},
             {"role": "user", "content": "bye"}]  # fmt: skip
    path = write_rows(tmp_path / "s.jsonl", [{"prompt": turns, "completions": ["a", "b", "b", " "]}])
    person = Person(["b", "a"])
    rank(path, person)
    assert "assistant: yes?" in person.shown[0] and person.shown[0].count("-- ") == 2
    (record,) = read_records(tmp_path / "s.ranked.jsonl", stage="reward")
    assert isinstance(record, Ranking) and record.ranks == (2, 1) and len(record.prompt) == 3


def test_files_that_cannot_be_ranked(tmp_path):
    with pytest.raises(DataError, match="tunesmith sample"):
        rank(tmp_path / "nothing.jsonl", Person())
    broken = write_rows(tmp_path / "b.jsonl", [{"prompt": "p"}, {"completions": ["a", "b"]}])
    with pytest.raises(DataError, match=r"b\.jsonl:1.*\n.*b\.jsonl:2"):
        rank(broken, Person())
    with pytest.raises(DataError, match="two different completions"):
        rank(samples(tmp_path / "one.jsonl", 1, ["same", "same", ""]), Person())
    with pytest.raises(DataError, match="at most 26"):
        rank(samples(tmp_path / "many.jsonl", 1, [str(i) for i in range(27)]), Person())


def test_a_file_of_something_else_is_never_written_to(tmp_path):
    path = samples(tmp_path / "s.jsonl")
    other = tmp_path / "other.jsonl"
    for text in ('{"a": 1}\n', "not JSON\n", "one line without end", "[1]\n"):
        other.write_text(text)
        with pytest.raises(RunError, match="left as it is"):
            rank(path, Person("ABCD"), to=other)
        assert other.read_text() == text
