"""A metric of the user's own: from the recipe, the command line and Python, by hand, and refused where it is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.cli.conftest import recipe_for, write_rows

import tunesmith
from tunesmith.errors import MetricError, RecipeError, RunError
from tunesmith.evaluate.compare import judge
from tunesmith.evaluate.generate import SHARES
from tunesmith.evaluate.intervals import Estimate, wilson
from tunesmith.evaluate.own import Case, metric_of, own_estimate, own_statistic
from tunesmith.evaluate.tasks import CLASS_METRICS, TEXT_METRICS
from tunesmith.recipe_metrics import RESERVED, lower_is_better, name_problems
from tunesmith.recipe_rules import METRICS

FUNCTIONS = """
def right(predicted, label, probabilities, row):
    assert set(row) == {"text", "label"} and abs(sum(probabilities.values()) - 1) < 1e-6
    assert predicted == max(probabilities, key=probabilities.get)
    return predicted == label

def surprise_loss(label, probabilities):
    import math
    return -math.log(probabilities[label])

def doubt(label, probabilities):
    return 1 - probabilities[label]

def length(completion):
    return len(completion)

def number(prompt, completion, answer, row):
    assert prompt == row["prompt"] and answer == row["completion"]
    return float(row["prompt"].split()[2])

def place(prompt, completion, answer, row):
    assert prompt == row["prompt"] and answer in (row.get("chosen"), row.get("answer"))
    return float(prompt.split()[2])

def everything(**values):
    return len(values)

def raises(row):
    return 1 / (0 if "104" in row["text"] else 1)

def nan(predicted):
    return float("nan")

def text(predicted):
    return "0.5"

def nothing(predicted):
    return None

def asks(prompts, completions):
    return 0.0

def accuracy(predicted):
    return 1.0

LATER = 0
"""
SHORT = {"samples": 0, "generate": {"max_tokens": 4, "examples": 8}}


@pytest.fixture
def metrics(work):
    (work / "my_metrics.py").write_text(FUNCTIONS)
    return lambda *names: [f"my_metrics.py:{name}" for name in names]


def test_a_classifiers_metric_stands_beside_the_built_in_ones(metrics, work):
    """`right` is accuracy and `surprise_loss` is the loss, computed by a function of the user's."""
    recipe = recipe_for("classify", evaluate={"metrics": metrics("right", "surprise_loss")})
    found = tunesmith.train(recipe, run="labels")
    for when in ("before", "after"):
        assert found[when]["right"] == found[when]["accuracy"] and found[when]["right"]["n"] == 8
        assert found[when]["surprise_loss"]["value"] == pytest.approx(found[when]["loss"]["value"], abs=1e-9)
    assert found["difference"]["surprise_loss"]["n"] == 8
    assert found["difference"]["surprise_loss"]["verdict"] == found["difference"]["loss"]["verdict"]
    for page in ("report.html", "model_card.md"):
        assert "surprise" in (work / "runs" / "labels" / page).read_text()
    lines = (work / "runs" / "labels" / "evaluations.jsonl").read_text().splitlines()
    assert all({"right", "surprise_loss"} <= set(json.loads(line)["metrics"]) for line in lines)


def test_a_metric_of_completions_sees_prompt_answer_and_row(metrics, work):
    """The held-out prompts ask for 100 to 107 plus 1; their mean by hand is 103.5."""
    recipe = recipe_for("sft", evaluate={**SHORT, "metrics": metrics("number", "length", "everything")})
    recipe["data"]["test"] = "pairs-test.jsonl"
    rows = [{"prompt": f"what is {n} plus 1?", "completion": f"it is {n + 1}"} for n in (200, 202)]
    (work / "pairs-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tunesmith.train(recipe, run="answers")
    assert found["before"]["number"]["value"] == found["after"]["number"]["value"] == 103.5
    assert found["after"]["number"]["n"] == 8 and found["difference"]["number"]["value"] == 0
    assert found["test"]["after"]["number"]["value"] == 201
    assert found["after"]["everything"]["value"] == 4
    shown = [json.loads(line) for line in (work / "runs" / "answers" / "samples.jsonl").read_text().splitlines()]
    assert found["after"]["length"]["value"] == pytest.approx(sum(len(row["after"]) for row in shown) / 8)


def test_preferences_and_rollouts_are_judged_too(metrics, work):
    """dpo completes the held-out prompts; grpo judges those it measures by, whose row has no `completion`."""
    rows = [{"prompt": f"what is {n} plus 1?", "chosen": f"it is {n}", "rejected": "no"} for n in range(8)]
    for name, part in (("train", rows[:6]), ("held", rows[6:])):
        write_rows(work / f"{name}.jsonl", part)
    data = {"train": "train.jsonl", "eval": "held.jsonl"}
    evaluate = {**SHORT, "metrics": ["my_metrics.py:place"]}
    made = tunesmith.train(recipe_for("sft", data=data, evaluate=evaluate) | {"stage": "dpo"}, run="pairs")
    assert made["after"]["place"]["value"] == made["before"]["place"]["value"] == 6.5
    for name, part in (("train", rows[:6]), ("held", rows[6:])):
        write_rows(work / f"{name}.jsonl", [{"prompt": row["prompt"], "answer": "7"} for row in part])
    recipe = recipe_for(
        "sft", data=data, evaluate={"samples": 0, "metrics": ["my_metrics.py:place"]},
        train={"epochs": None, "steps": 1, "batch_examples": None, "select_by": "place"},
        reward={"contains": "a"}, sampling={"max_tokens": 4}, grpo={"prompts": 2, "group": 2},
    )  # fmt: skip
    found = tunesmith.train(recipe | {"stage": "grpo"}, run="rollouts")
    assert found["after"]["place"]["value"] == 6.5 and found["after"]["place"]["n"] == 2


def test_the_checkpoint_is_chosen_by_it(metrics, work):
    """Chosen by what rises with the loss, an early step stays; by what falls with it, a late one."""
    late = tunesmith.train(
        recipe_for(
            "classify", evaluate={"metrics": metrics("surprise_loss")},
            train={"select_by": "surprise_loss", "epochs": 3, "learning_rate": 1e-2},
        ),
        run="low",
    )  # fmt: skip
    lines = [json.loads(line) for line in (work / "runs" / "low" / "evaluations.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["metrics"]["surprise_loss"])
    assert late["best_step"] == best["step"] and "surprise loss" in late["verdict"]
    assert late["after"]["surprise_loss"]["value"] == pytest.approx(best["metrics"]["surprise_loss"])
    recipe = recipe_for(
        "classify", evaluate={"metrics": metrics("doubt")},
        train={"select_by": "doubt", "epochs": 3, "learning_rate": 1e-2},
    )  # fmt: skip
    early = tunesmith.train(recipe, run="high")
    lines = [json.loads(line) for line in (work / "runs" / "high" / "evaluations.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["metrics"]["doubt"])
    assert early["best_step"] == best["step"] < lines[-1]["step"]
    assert early["after"]["doubt"]["value"] == pytest.approx(best["metrics"]["doubt"])


def test_completions_are_made_at_evaluations_only_where_they_choose(metrics, work):
    for chosen in ("length", "loss"):
        evaluate = {**SHORT, "metrics": metrics("length")}
        tunesmith.train(recipe_for("sft", evaluate=evaluate, train={"select_by": chosen}), run=chosen)
        line = json.loads((work / "runs" / chosen / "evaluations.jsonl").read_text().splitlines()[0])
        assert ("length" in line["metrics"]) == (chosen == "length")


def test_eval_takes_metrics_from_the_command_line_and_from_python(metrics, run, work):
    tunesmith.train(recipe_for("classify", evaluate={"metrics": metrics("right")}), run="labels")
    both = ("--metric", "my_metrics.py:surprise_loss", "--metric", "my_metrics.py:right")
    done = run("eval", "labels", "--data", "labels-eval.jsonl", *both, "--json")
    assert done.code == 0 and "left out" not in done.err, done.err
    after = tunesmith.runs_show("labels")["after"]
    assert {name: done.json["metrics"][name] for name in after} == after
    assert done.json["metrics"]["surprise_loss"]["value"] == pytest.approx(after["loss"]["value"], abs=1e-9)
    shown = run("eval", "labels", "--data", "labels-eval.jsonl", "--metric", "my_metrics.py:surprise_loss").out
    assert next(line for line in shown.splitlines() if line.startswith("surprise_loss")).split()[-1] == "8"

    def half(predicted: str, row: dict) -> float:
        return 0.5

    found = tunesmith.evaluate("labels", "labels-eval.jsonl", metrics=[half, "my_metrics.py:right"])
    assert found["metrics"]["half"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 8}
    bare = tunesmith.evaluate("./llama", "pairs-eval.jsonl", metrics=["my_metrics.py:number"])
    assert bare["stage"] == "sft" and bare["metrics"]["number"]["value"] == 103.5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", ("ZeroDivisionError", "my_metrics.py:29", "labels-eval.jsonl:5")),
        ("nan", ("returned nan", "labels-eval.jsonl:1", "finite")),
        ("text", ("returned '0.5'", "labels-eval.jsonl:1")),
        ("nothing", ("returned None", "labels-eval.jsonl:1")),
    ],
)
def test_a_function_that_fails_names_the_row(name, said, metrics, run, write):
    done = run("train", write("classify", evaluate={"metrics": metrics(name)}), "--run", "broken")
    assert done.code == 2 and "Traceback" not in done.err
    assert all(part in done.err for part in (f"metric my_metrics.py:{name}", *said)), done.err


def test_values_by_hand_and_what_counts_as_a_number():
    """1, 0, True and numpy's numbers are numbers; the mean of 1, 0, 1 is 2/3 with Wilson's interval for shares."""
    given = ("completion", "row")
    cases = [Case({"completion": text, "row": {}}, f"f:{i}") for i, text in enumerate(("yes", "no", "yes"), 1)]

    def agrees(completion: str) -> object:
        return {"yes": np.bool_(True), "no": np.int64(0)}[completion]

    found = own_statistic(metric_of(agrees, given), cases)
    assert found.rows[:, 0].tolist() == [1, 0, 1] and own_estimate(found, seed=0) == wilson(2, 3)

    def broken(completion: str) -> float:
        raise ValueError("no" * len(completion))

    with pytest.raises(MetricError, match=r"broken raised ValueError: nonono .*on the row f:1 \(completion 'yes'\)"):
        own_statistic(metric_of(broken, given), cases)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("my_metrics.py:asks", "asks for prompts, completions; by the names of its parameters it can have predicted"),
        ("my_metrics.py:none", "has no function `none`"),
        ("my_metrics.py:LATER", "has no function `LATER`"),
        ("other.py:right", "there is no file"),
        ("my_metrics:right", "is not `file.py:name`"),
        ("my_metrics.py:accuracy", "`accuracy` is the name of a built-in metric"),
    ],
)
def test_what_cannot_be_a_metric_is_refused_before_anything_runs(given, said, metrics, run, write):
    for done in (
        run("train", write("classify", evaluate={"metrics": [given]})),
        run("check", write("classify"), f"evaluate.metrics={given}"),
        run("eval", "./bert", "--data", "labels-eval.jsonl", "--stage", "classify", "--metric", given),
    ):
        assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err
    assert not tunesmith.runs_list()


def test_what_a_recipe_may_not_say_of_metrics(metrics, work):
    two, one = metrics("right", "right"), metrics("right")
    for stage, sections, said in (
        ("classify", {"evaluate": {"metrics": two}}, "two metric functions are called `right`"),
        ("pretrain", {"evaluate": {"metrics": one}}, "does nothing in stage pretrain"),
        ("classify", {"evaluate": {"metrics": one}, "data": {"eval": None}}, "needs held-out rows"),
        ("sft", {"evaluate": {"metrics": one}, "data": {"train_on_prompt": True}}, "sets no prompt apart"),
        ("classify", {"train": {"select_by": "right"}}, "`right` is not measured"),
    ):
        with pytest.raises(RecipeError, match=said):
            tunesmith.load_recipe(recipe_for(stage, **sections))
    with pytest.raises(RecipeError, match="stage pretrain has neither labels nor completions"):
        tunesmith.evaluate("./llama", "texts.jsonl", metrics=one)
    with pytest.raises(RecipeError, match="has no name"):
        tunesmith.evaluate("./llama", "pairs.jsonl", metrics=[lambda completion: 1.0])


def test_a_changed_function_is_noticed_when_a_run_goes_on(metrics, work, run):
    """Before and after are by one function: no run goes on with another one, which is not even loaded."""
    for name, train in (("seen", {}), ("chooses", {"select_by": "right"})):
        recipe = recipe_for("classify", evaluate={"metrics": metrics("right")}, train={"epochs": 2, **train})
        tunesmith.train(recipe, run=name)
        (work / "runs" / name / "result.json").unlink()
    assert "right" in json.dumps(json.loads((work / "runs" / "seen" / "inputs.json").read_text())["metrics"])
    planted = "open('ran', 'w').close()\n" + FUNCTIONS
    (work / "my_metrics.py").write_text(planted)
    for name in ("seen", "chooses"):
        done = run("train", "--resume", name, "--json")
        assert done.code == 2 and "metric my_metrics.py:right has changed since the run began" in done.err
        with pytest.raises(RunError, match="was not run"):
            tunesmith.resume(name)
    (work / "my_metrics.py").unlink()
    assert run("train", "--resume", "seen").code == 2
    assert not (work / "ran").exists()
    (work / "my_metrics.py").write_text(FUNCTIONS)
    assert tunesmith.resume("seen")["after"]["right"] == tunesmith.resume("chooses")["after"]["right"]


def test_a_run_folder_alone_runs_no_code(metrics, work, run):
    """What a received folder's recipe names is told of and not run, be it a metric or a reward."""
    reward = "rewards.py:long"
    (work / "rewards.py").write_text(
        "def long(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    tunesmith.train(recipe_for("classify", evaluate={"metrics": metrics("right")}), run="labels")
    write_rows(work / "asked.jsonl", [{"prompt": f"what is {n} plus 1?", "answer": "7"} for n in range(6)])
    recipe = recipe_for(
        "sft", data={"train": "asked.jsonl", "eval": "asked.jsonl"}, evaluate={"samples": 0},
        train={"epochs": None, "steps": 1, "batch_examples": None, "select_by": None},
        reward={"function": reward}, sampling={"max_tokens": 4}, grpo={"prompts": 2, "group": 2},
    )  # fmt: skip
    tunesmith.train(recipe | {"stage": "grpo", "preflight": {"allow": ["overlap"]}}, run="answers")
    for file in ("my_metrics.py", "rewards.py"):
        (work / file).write_text("open('ran', 'w').close()\n" + (work / file).read_text())
    done = run("eval", "labels", "--data", "labels-eval.jsonl", "--json")
    assert done.code == 0 and "right" not in done.json["metrics"], done.err
    assert "metric my_metrics.py:right of the run's recipe is left out" in done.err and "--metric " in done.err
    paid = run("eval", "answers", "--data", "asked.jsonl")
    assert paid.code == 2 and f"add --reward {reward}" in paid.err, paid.err
    assert not (work / "ran").exists()
    paid = run("eval", "answers", "--data", "asked.jsonl", "--reward", reward, "--json")
    assert paid.code == 0 and "reward" in paid.json["metrics"], paid.err
    assert (work / "ran").exists(), "the control: what is named runs"
    wrong = run("eval", "answers", "--data", "asked.jsonl", "--reward", "rewards.py:short")
    assert wrong.code == 2 and "has no function of that name; it has long" in wrong.err


def test_which_way_a_metric_is_better():
    """By the last word of its name; where such a word stands elsewhere, the name must say it."""
    assert [name for name in ("politeness", "rudeness_error", "log_loss", "d2_deviance", "error", "reward.my_loss",
                              "lossy", "loss", "accuracy", "wer", "word_error_rate_lower", "loss_avoided_higher")
            if lower_is_better(name)] == [
        "rudeness_error", "log_loss", "d2_deviance", "error", "loss", "wer", "word_error_rate_lower"]  # fmt: skip
    assert name_problems(["word_error_rate_lower", "loss_avoided_higher", "politeness", "my_wer"]) == []
    assert "word_error_rate_lower" in name_problems(["word_error_rate"])[0]
    assert "brier_score_lower" in name_problems(["brier_score"])[0]
    fell = Estimate(-1.0, -1.5, -0.5, 10)
    assert (judge("rudeness_error", fell), judge("politeness", fell)) == ("better", "worse")


def test_every_built_in_name_is_taken():
    built_in = {name for names in METRICS.values() for name in names}
    assert built_in | set(CLASS_METRICS) | set(TEXT_METRICS) | set(SHARES) <= RESERVED
