"""Stage dpo: the reference is the start and is computed once; every relative learns; a cut run goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.preferences import left, make_folder, pairs, recipe, start_and_cut, write

from tunesmith import api
from tunesmith.errors import DataError
from tunesmith.model.language import LanguageModel
from tunesmith.rundir import RunDir
from tunesmith.stages import finals, preference

Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """(folder, result) of one DPO run by LoRA."""
    folder = make_folder(tmp_path_factory.mktemp("dpo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        yield folder, api.train(recipe("dpo", tune={"method": "lora", "rank": 4}), run="dpo")


def first_line(folder: Path, run: str) -> dict[str, float]:
    return json.loads((folder / "runs" / run / "metrics.jsonl").read_text().splitlines()[0])


def test_before_training_the_policy_is_its_reference(made: Made) -> None:
    before, line = made[1]["before"], first_line(made[0], "dpo")
    assert before["loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["accuracy"]["value"] == 0.5 and before["margin"]["value"] == pytest.approx(0, abs=1e-6)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5) and line["log_ratio"] == pytest.approx(0, abs=1e-6)
    wanted = {"accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob"}
    assert wanted <= set(line)


def test_it_learns_what_was_preferred(made: Made) -> None:
    after = made[1]["after"]
    assert after["accuracy"]["value"] > 0.8 and after["margin"]["value"] > 0 and after["loss"]["value"] < 0.69


@pytest.mark.parametrize(
    "dpo",
    [{"loss": "ipo"}, {"loss": "hinge"}, {"label_smoothing": 0.1}, {"length_normalized": True, "sft_coef": 0.1}],
)
def test_its_relatives_learn_it_too(made: Made, dpo: dict[str, Any]) -> None:
    name = "-".join(map(str, dpo.values()))
    result = api.train(recipe("dpo", dpo=dpo, train={"learning_rate": 1e-3}), run=f"kin-{name}")
    assert result["after"]["loss"]["value"] < result["before"]["loss"]["value"]
    assert result["after"]["accuracy"]["value"] > 0.7


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_without_a_reference_none_is_computed(made: Made, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no reference is needed")

    monkeypatch.setattr(preference, "reference_column", refuse)
    result = api.train(recipe("dpo", dpo={"loss": loss}), run=f"free-{loss}")
    assert result["after"]["loss"]["value"] < result["before"]["loss"]["value"]


def test_the_reference_is_computed_once_for_the_same_content(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = preference.reference_column

    def counted(model: LanguageModel, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return plain(model, *args, **options)

    monkeypatch.setattr(preference, "reference_column", counted)
    how = recipe("dpo", train={"epochs": 1})
    api.train(how, run="first", overrides=["train.learning_rate=1e-4"])
    before = len(calls)
    api.train(how, run="second", overrides=["train.learning_rate=1e-3", "dpo.beta=0.5"])
    assert len(calls) == before, "the same samples and the same start"
    api.train({**how, "tune": {"method": "lora", "rank": 2}}, run="third", overrides=["seed=5"])
    assert len(calls) > before, "control: another start is another key"


def test_an_evaluation_afterwards_still_knows_the_start(made: Made) -> None:
    found = api.evaluate("dpo", "more.jsonl")["metrics"]
    for name in ("accuracy", "loss", "margin"):
        assert found[name]["value"] == pytest.approx(made[1]["after"][name]["value"], abs=1e-6)
    start = finals.untrained(RunDir(made[0] / "runs/dpo"))
    tuned = finals.open_tuned(RunDir(made[0] / "runs/dpo"))
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(start.parameters(), tuned.backbone.parameters(), strict=True)
    ]
    assert max(moved) > 0, "control: training moved something"


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_cut_in_two_is_the_run_that_was_not(made: Made, step: int) -> None:
    folder = made[0]
    how = recipe("dpo", tune={"method": "lora", "rank": 4, "dropout": 0.1}, train={"epochs": 2, "save_every": 1})
    if not (folder / "runs/whole").exists():
        api.train(how, run="whole")
    start_and_cut(how, f"cut-{step}", step)
    api.resume(f"cut-{step}")
    assert left(folder / "runs/whole") == left(folder / f"runs/cut-{step}")


def test_what_the_cache_lost_or_broke_is_computed_again(made: Made) -> None:
    folder = made[0]
    how = recipe("dpo", train={"epochs": 1})
    api.train(how, run="kept")
    files = sorted((folder / "cache/reference").glob("*.npy"))
    assert files
    for i, path in enumerate(files):
        path.write_bytes(path.read_bytes()[:-3]) if i % 2 else path.unlink()
    api.train(how, run="again")
    assert left(folder / "runs/kept") == left(folder / "runs/again")


def test_pairs_that_are_all_the_same_text_are_refused(made: Made) -> None:
    write(made[0] / "same.jsonl", [{"prompt": f"which {i}?", "chosen": "this", "rejected": "this"} for i in range(4)])
    with pytest.raises(DataError, match="no training sample is left"):
        api.train(recipe("dpo", data={"train": "same.jsonl"}), run="same")


def test_the_prompt_is_cut_alike_before_both_answers(made: Made) -> None:
    from tests.tiny import tiny_tokenizer

    from tunesmith.data.encode import Encoder
    from tunesmith.data.kinds import Message, Pair

    pair = Pair((Message("user", "the cat sat on the mat " * 5),), "good", "bad bad bad bad", "rows.jsonl:1")
    whole = Encoder(tiny_tokenizer(), "dpo", 500)(pair)
    longest = max(len(sample) for sample in whole)
    cut = Encoder(tiny_tokenizer(), "dpo", longest - 7, "truncate_left")(pair)
    for before, after in zip(whole, cut, strict=True):
        assert np.array_equal(before.ids[7:], after.ids) and np.array_equal(before.weights[7:], after.weights)
    assert [sample.label for sample in cut] == [(1.0, 0.0), (2.0, 0.0)]
    assert Encoder(tiny_tokenizer(), "dpo", 9, "drop")(pair) == []


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_checkpoint_is_chosen_by_the_reward_of_completions(made: Made, stage: str) -> None:
    """InstructGPT chooses its supervised model so; here the reward is a rule."""
    data: dict[str, Any] = {}
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "completion": "good"} for row in pairs(24)]
        write(made[0] / "answers.jsonl", rows)
        write(made[0] / "held.jsonl", [{**row, "prompt": f"{row['prompt']}?"} for row in rows[:6]])
        data = {"train": "answers.jsonl", "eval": "held.jsonl"}
    how = recipe(
        stage, data=data, reward={"contains": "good"}, train={"select_by": "reward", "eval_every": 2},
        evaluate={"generate": {"max_tokens": 6, "examples": 6}}, preflight={"allow": ["one_class"]},
    )  # fmt: skip
    result = api.train(how, run=f"chosen-{stage}")
    lines = (made[0] / f"runs/chosen-{stage}/evaluations.jsonl").read_text().splitlines()
    seen = {line["step"]: line["metrics"]["reward"] for line in map(json.loads, lines)}
    assert result["best_step"] == max(seen, key=lambda step: (seen[step], -step))
    assert result["after"]["reward"]["value"] == max(seen.values()) and result["after"]["reward"]["n"] == 6
    if stage == "sft":
        assert result["before"]["reward"]["value"] == 0.0 < result["after"]["reward"]["value"]


def test_only_the_last_answer_of_a_talk_is_compared() -> None:
    from tests.tiny import tiny_tokenizer

    from tunesmith.data.encode import Encoder
    from tunesmith.data.kinds import Message, Pair

    talk = (Message("user", "hello"), Message("assistant", "well good"), Message("user", "and?"))
    tokenizer = tiny_tokenizer()
    better, worse = Encoder(tokenizer, "dpo", 200)(Pair(talk, "fine", "dull", "rows.jsonl:1"))
    for sample, text in ((better, "fine"), (worse, "dull")):
        assert tokenizer.decode(sample.ids[sample.weights > 0], skip_special_tokens=True) == text
