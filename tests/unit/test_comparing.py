"""compare: trials are checked before any runs, judged on held-out rows, stopped by the budget, gone on with."""

from __future__ import annotations

import json

import pytest
from tests.tiny import save_tiny, tiny_classifier

from tunesmith import api, cli
from tunesmith.errors import RecipeError, RunError
from tunesmith.recipe import load_recipe
from tunesmith.stages import comparing
from tunesmith.stages.comparing import Trial, compare, recommend, seconds_of, trials_of


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{i} is {'good' if i % 2 else 'bad'}", "label": ["no", "yes"][i % 2]} for i in range(60)]
    for name, part in (("train", rows[:30]), ("eval", rows[30:50]), ("test", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    save_tiny(tiny_classifier("bert"), tmp_path / "base")
    data = {"train": "train.jsonl", "eval": "eval.jsonl", "test": "test.jsonl"}
    tune = {"method": "lora", "rank": 4, "targets": ["query"]}
    train = {"steps": 2, "learning_rate": 1e-2}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"stage": "classify", "base": "base", "data": data, "tune": tune, "train": train}))
    return path


def resolved(trial):
    return load_recipe(trial.recipe, trial.overrides).recipe


def test_the_recipes_own_method_keeps_its_settings_and_others_get_their_own_rate(recipe):
    lora, full = trials_of(str(recipe), (), tune=["lora:rank=2", "full"], bases=(), grid=(), seeds=1)
    assert resolved(lora).tune.targets == ["query"] and resolved(lora).tune.rank == 2
    assert resolved(lora).train.learning_rate == 1e-2
    assert resolved(full).tune.rank is None and resolved(full).train.learning_rate == 2e-5
    assert resolved(full).data.test is None


def test_every_combination_is_a_trial_and_first_seeds_come_first(recipe):
    found = trials_of(str(recipe), (), tune=["full", "head"], bases=(), grid=["train.learning_rate=1e-3,1e-4"], seeds=2)
    assert len(found) == 8 and [t.seed for t in found] == [42] * 4 + [43] * 4
    assert len({t.folder for t in found}) == 8


def test_a_wrong_trial_stops_all_before_any_runs(recipe):
    with pytest.raises(RecipeError, match="no method `lroa`"):
        trials_of(str(recipe), (), tune=["full", "lroa:rank=4"], bases=(), grid=(), seeds=1)
    with pytest.raises(RecipeError, match="rnk"):
        trials_of(str(recipe), (), tune=["full", "lora:rnk=4"], bases=(), grid=(), seeds=1)
    with pytest.raises(RecipeError, match="held-out"):
        trials_of(str(recipe), ("data.eval=null",), tune=["full"], bases=(), grid=(), seeds=1)


def result(accuracy, seconds=10.0, trained=100):
    entry = {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 100}
    sizes = {"trainable_parameters": trained, "total_parameters": 1000, "peak_memory_bytes": 1, "export_bytes": 1}
    return {"after": {"accuracy": entry}, "before": {"accuracy": entry | {"value": 0.5}}, "seconds": seconds} | sizes


def fake(results, ran):
    def run(trial, folder):
        ran.append(trial.name)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(results[trial.name]), encoding="utf-8")

    return run


def test_the_budget_bounds_the_time_and_the_same_call_goes_on(tmp_path):
    trials = [Trial(name, 0, "", ()) for name in ("a", "b", "c")]
    results, ran = {"a": result(0.6), "b": result(0.9), "c": result(0.7)}, []
    run = fake(results, ran)
    first = compare(trials, tmp_path, budget_seconds=15, say=print, run_trial=run)
    assert ran == ["a", "b"] and first["left_out"] == ["c seed 0"] and first["best"] == "b"
    second = compare(trials, tmp_path, budget_seconds=None, say=print, run_trial=run)
    assert (
        ran == ["a", "b", "c"] and second["left_out"] == [] and [r["name"] for r in second["rows"]] == ["b", "c", "a"]
    )
    with pytest.raises(RunError, match="budget"):
        compare([Trial("d", 0, "", ())], tmp_path, budget_seconds=0, say=print, run_trial=run)


def rows_of(*accuracies):
    made = [comparing._row(name, [result(value, trained=size)]) for name, value, size in accuracies]
    return sorted(made, key=lambda row: -row["value"])


def test_a_clear_winner_is_recommended_and_a_close_race_is_said():
    assert "better than all others" in recommend(rows_of(("big", 0.9, 100), ("small", 0.6, 10)), "accuracy")
    close = recommend(rows_of(("big", 0.90, 100), ("small", 0.89, 10)), "accuracy")
    assert "not told apart from small" in close and "small trains 10 parameters" in close


def test_seeds_that_disagree_widen_the_interval():
    steady = comparing._row("a", [result(0.8), result(0.8)])
    shaky = comparing._row("a", [result(0.7), result(0.9)])
    assert steady["value"] == pytest.approx(shaky["value"]) and shaky["error"] > 1.5 * steady["error"]


def test_budgets_are_read_with_their_units():
    assert [seconds_of(text) for text in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    with pytest.raises(RecipeError, match="10m"):
        seconds_of("soon")


def test_real_runs_side_by_side_and_the_test_rows_once(recipe, monkeypatch, capsys):
    def in_process(trial, folder):
        api.train(trial.recipe, trial.overrides, run=str(folder))

    monkeypatch.setattr(comparing, "run_as_command", in_process)
    assert cli.main(["compare", str(recipe), "--tune", "lora,head", "--to", "both", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["rows"]} == {"lora", "head"} and found["metric"] == "accuracy"
    assert found["test"]["accuracy"]["n"] == 10
    assert json.loads((recipe.parent / "runs/both/comparison.json").read_text())["best"] == found["best"]
    trial = json.loads((recipe.parent / "runs/both/head-seed42/result.json").read_text())
    assert "test" not in trial
