"""Rules, functions and their sum; and every way in which a reward can go wrong, with the completion that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tunesmith.errors import DataError, RecipeError, RewardError
from tunesmith.rollout import rules
from tunesmith.rollout.function import load_function, scored_by
from tunesmith.rollout.rewards import Completed, Part, Reward, need_answers


def items(*texts: str, answer: str | None = None) -> list[Completed]:
    return [
        Completed("2+2?", t, answer, {"hint": "add"}, (), f"p.jsonl:{i + 1}", num_tokens=len(t))
        for i, t in enumerate(texts)
    ]


def function(tmp_path: Path, body: str, name: str = "reward", columns: tuple[str, ...] = ("hint",)) -> Reward:
    path = tmp_path / "mine.py"
    path.write_text(body)
    return Reward(
        (Part(name, scored_by(load_function(path, name), columns, "mine.py:reward"), source="mine.py:reward"),)
    )


def test_rules_give_what_was_worked_out_by_hand():
    three = items("a cat sat", "a dog", "CAT")
    assert rules.contains(["cat", "dog"])(three) == [1, 1, 0]
    assert rules.matches("^a .{3}$")(three) == [0, 1, 0]
    assert rules.length(9)(three) == [1.0, pytest.approx(5 / 9), pytest.approx(3 / 9)]
    assert rules.length(2)(items("", "ab", "abc", "abcd", "abcdef")) == [0, 1, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "same"),
    [
        (None, " Four ", "four", True),
        (None, "the answer is four", "four", False),
        ("number", "3 + 4 = 7, so it is 7.0", "She has 3 + 4 = 7.\n#### 7", True),
        ("number", "it costs $1,234.50", "1234.5", True),
        ("number", "-0.50", "-.5", True),
        ("number", "7", "-7", False),
        ("number", "no figure", "7", False),
        ("boxed", "so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}", True),
        ("boxed", "\\boxed{3} or rather \\boxed{4}", "4", True),
        ("boxed", "\\boxed{never closed", "never closed", False),
        (r"answer: (\w+)", "Answer: no. answer: yes", "yes", True),
        (r"answer: (\w+)", "yes", "yes", False),
    ],
)
def test_exact_answers(pattern: str | None, completion: str, answer: str, same: bool):
    assert rules.exact(pattern)(items(completion, answer=answer)) == [float(same)]


def test_parts_are_weighed_summed_clipped_and_kept():
    parts = (Part("a", lambda xs: [1.0, -1.0, 3.0]), Part("b", lambda xs: [0.5, 0.5, 0.5], -2.0))
    rewards = Reward(parts, clip=1.5)(items("x", "y", "z"))
    assert rewards.total.tolist() == [0.0, -1.5, 1.5]
    assert rewards.parts["a"].tolist() == [1.0, -1.0, 3.0] and rewards.parts["b"].tolist() == [0.5] * 3
    assert Reward(parts)(items("x", "y", "z")).total.tolist() == [0.0, -2.0, 2.0]


def test_a_function_gets_the_columns_it_asks_for(tmp_path: Path):
    body = (
        "def reward(prompts, completions, hint):\n    return [len(c) + (h == 'add') for c, h in zip(completions, hint)]"
    )
    assert function(tmp_path, body)(items("abc", "d")).total.tolist() == [4, 2]
    body = "def reward(prompts, completions, **columns):\n    return [float(sorted(columns) == ['answer', 'hint'])]"
    assert function(tmp_path, body)(items("abc", answer="4")).total.tolist() == [1]
    body = "import numpy as np\ndef reward(prompts, completions):\n    return np.array([len(p) for p in prompts])"
    assert function(tmp_path, body)(items("abc")).total.tolist() == [4]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / (len(c) - 1) for c in completions]", r"ZeroDivisionError.*mine\.py:2.*p\.jsonl:2 \('b'\)"),
        ("return [1.0, float('nan'), 2.0]", r"returned nan for completion 1 of prompt p\.jsonl:2 \('b'\)"),
        ("return [1.0, 2.0, float('inf')]", r"returned inf for completion 1 of prompt p\.jsonl:3"),
        ("return [1.0]", r"1 numbers for 3 completions.*p\.jsonl:1"),
        ("return [1.0, 'good', 2.0]", r"'good' for completion 1 of prompt p\.jsonl:2.*no number"),
        ("return [1.0, None, 2.0]", r"None for completion 1 of prompt p\.jsonl:2"),
        ("return 1.0", "returned a float, not a list"),
        ("return None", "returned a NoneType"),
        ("if len(completions) > 1: raise ValueError('batch')\n    return [0]", r"batch.*on none of them alone"),
    ],
)
def test_a_broken_function_is_told_which_completion(tmp_path: Path, body: str, message: str):
    reward = function(tmp_path, f"def reward(prompts, completions, **columns):\n    {body}")
    with pytest.raises(RewardError, match=message) as caught:
        reward(items("aaa", "b", "cc"))
    assert "Nothing is lost" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("def other(p, c): return []", "reward", "has no function `reward`; it has other"),
        ("def reward(:", "reward", "cannot be loaded: SyntaxError"),
        ("import nothing_of_this_name", "reward", "cannot be loaded: ModuleNotFoundError"),
        ("def reward(prompts): return []", "reward", r"must take \(prompts, completions"),
        ("def reward(prompts, completions, solution): return []", "reward", "asks for solution.*have hint, answer"),
    ],
)
def test_a_file_that_cannot_be_a_reward_is_refused_before_the_run(tmp_path: Path, body: str, name: str, message: str):
    with pytest.raises(RecipeError, match=message):
        function(tmp_path, body, name)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="there is no file"):
        load_function(tmp_path / "none.py", "reward")


def test_a_dataclass_in_the_file_works(tmp_path: Path):
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def reward(prompts, completions):\n    return [A(1).x for _ in prompts]"
    )
    assert function(tmp_path, body)(items("a")).total.tolist() == [1]


def test_rows_without_an_answer_are_named():
    with pytest.raises(DataError, match=r"missing in p\.jsonl:1, p\.jsonl:2"):
        need_answers(items("a", "b"), "reward.exact")
    need_answers(items("a", answer="b"), "reward.exact")


def test_totals_are_float64():
    assert Reward((Part("a", lambda xs: [0.1]),))(items("x")).total.dtype == np.float64
