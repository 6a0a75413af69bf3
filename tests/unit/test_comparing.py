"""compare: trials are checked before any runs, judged on held-out rows, stopped by the budget, gone on with."""

from __future__ import annotations

import json

import pytest
from tests.tiny import save_tiny, tiny_causal, tiny_classifier

from tunesmith import api, cli
from tunesmith.errors import RecipeError, RunError
from tunesmith.evaluate.trials import claim, rank, recommend, trial_row
from tunesmith.recipe import load_recipe
from tunesmith.stages import comparing
from tunesmith.stages.comparing import Trial, compare, seconds_of, split_list, trials_of


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
    assert resolved(full).data.test and not resolved(full).evaluate.test
    assert resolved(full).evaluate.baselines is False


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


def ranked(*accuracies):
    return rank([trial_row(name, [result(value, trained=size)]) for name, value, size in accuracies], {})


def test_a_clear_winner_is_recommended_and_a_close_race_is_said():
    assert "better than all others" in recommend(ranked(("big", 0.9, 100), ("small", 0.6, 10)))
    close = recommend(ranked(("big", 0.90, 100), ("small", 0.89, 10)))
    assert "not told apart from small" in close and "small trains 10 parameters" in close
    assert "the only one" in recommend(ranked(("big", 0.9, 100)))


def test_seeds_that_disagree_widen_the_interval():
    steady = trial_row("a", [result(0.8), result(0.8)])
    shaky = trial_row("a", [result(0.7), result(0.9)])
    assert steady["value"] == pytest.approx(shaky["value"]) and shaky["error"] > 1.5 * steady["error"]


def rows(right, places=None):
    return {
        "held_out": {"rows": {"accuracy": [[float(r), 1.0] for r in right]}},
        "origins": {"held_out": places or [f"eval.jsonl:{i}" for i in range(len(right))]},
    }


def test_the_same_rows_tell_apart_what_two_intervals_would_not(tmp_path):
    best = [1] * 90 + [0] * 10
    other = [1] * 82 + [0] * 18  # every row that the other has right, the best has right too
    trials = [Trial(name, 0, "", ()) for name in ("a", "b")]
    for name, right, places in (("a", best, None), ("b", other, None), ("c", other, [f"x:{i}" for i in range(100)])):
        folder = tmp_path / f"{name}-seed0"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result(sum(right) / 100)), encoding="utf-8")
        (folder / "after.json").write_text(json.dumps(rows(right, places)), encoding="utf-8")
    paired = compare(trials, tmp_path, budget_seconds=None, say=print)["rows"][1]
    other_rows = compare([trials[0], Trial("c", 0, "", ())], tmp_path, budget_seconds=None, say=print)["rows"][1]
    assert paired["paired"] and paired["sure"] > 0.99 and paired["behind"]["low"] > 0
    assert not other_rows["paired"] and other_rows["sure"] < paired["sure"]


def untuned(value, low, high, parameters=5000):
    change = {"value": 0.8 - value, "low": low, "high": high, "n": 100}
    return {"name": "large, zero-shot", "parameters": parameters, "value": value, "difference": change}


def test_that_small_beats_large_is_said_only_where_the_interval_leaves_out_0():
    tuned = {"name": "small", "parameters": 1000, "value": 0.8}
    assert claim("accuracy", tuned, [untuned(0.6, 0.1, 0.3)]).startswith(
        "A small tuned model beats a larger untuned one"
    )
    assert "is not shown" in claim("accuracy", tuned, [untuned(0.79, -0.05, 0.07)])
    assert "is not shown" in claim("accuracy", tuned, [untuned(0.9, -0.2, -0.05)])
    assert claim("accuracy", tuned, [untuned(0.6, 0.1, 0.3, parameters=10)]) == ""
    assert "is not shown" in claim("loss", tuned, [untuned(0.6, 0.1, 0.3)])


def test_a_trial_that_fails_is_named_and_the_others_go_on(tmp_path):
    def run(trial, folder):
        if trial.name == "a":
            raise comparing.TrialFailed("no such layer")
        fake({"b": result(0.9)}, [])(trial, folder)

    trials = [Trial(name, 0, "", ()) for name in ("a", "b")]
    found = compare(trials, tmp_path, budget_seconds=None, say=print, run_trial=run)
    assert found["best"] == "b" and found["failed"] == [{"name": "a", "seed": 0, "why": "no such layer"}]
    with pytest.raises(RunError, match="every trial failed"):
        compare(trials[:1], tmp_path, budget_seconds=None, say=print, run_trial=run)


def test_lists_keep_what_stands_in_brackets_together():
    assert split_list("[q,v], all-linear") == ["[q,v]", "all-linear"]


def test_budgets_are_read_with_their_units():
    assert [seconds_of(text) for text in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    with pytest.raises(RecipeError, match="10m"):
        seconds_of("soon")


def in_process(trial, folder):
    api.train(trial.recipe, trial.overrides, run=str(folder))


def test_real_runs_side_by_side_and_the_test_rows_once(recipe, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "run_as_command", in_process)
    command = ["compare", str(recipe), "--tune", "lora,head", "--to", "both"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["rows"]} == {"lora", "head"} and found["metric"] == "accuracy"
    assert found["test"]["metrics"]["accuracy"]["n"] == 10 and found["test"]["looks"] == 1
    assert found["rows"][1]["paired"]
    folder = recipe.parent / "runs/both"
    assert json.loads((folder / "comparison.json").read_text())["best"] == found["best"]
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert found["recommendation"] in page and "measured once" in page and "<script" not in page
    trial = json.loads((folder / "head-seed42/result.json").read_text())
    assert "test" not in trial and "baselines" not in trial
    monkeypatch.setattr(comparing, "measure_test", lambda *_: pytest.fail("the test rows were measured again"))
    assert cli.main(command) == 0
    assert "test rows, measured once" in capsys.readouterr().out


def test_trials_of_other_settings_are_not_taken_for_these(recipe, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "run_as_command", in_process)
    assert cli.main(["compare", str(recipe), "--tune", "head", "--to", "one"]) == 0
    assert cli.main(["compare", str(recipe), "train.steps=1", "--tune", "head", "--to", "one"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_test_rows_of_a_split_stay_untouched_by_the_trials(recipe, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "run_as_command", in_process)
    split = ["data.eval=null", "data.test=null", 'data.split={"eval": 0.3, "test": 0.3}']
    assert cli.main(["compare", str(recipe), *split, "--tune", "lora,head", "--to", "split", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["metrics"]["accuracy"]["n"] == 9
    result = json.loads((recipe.parent / "runs/split/head-seed42/result.json").read_text())
    assert "test" not in result and result["after"]["accuracy"]["n"] == 9


def test_a_larger_model_that_is_only_asked_stands_beside_the_winner(recipe, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "run_as_command", in_process)
    save_tiny(tiny_causal("llama", width=64, layers=4), recipe.parent / "large")
    command = ["compare", str(recipe), "--tune", "head", "--untuned", "large", "--to", "claim"]
    assert cli.main([*command, "--json"]) == 0
    untuned = json.loads(capsys.readouterr().out)["untuned"]
    assert untuned["part"] == "test" and [row["n"] for row in untuned["rows"]] == [10, 10]
    assert "few-shot" in untuned["rows"][1]["name"] and untuned["rows"][1]["difference"]["n"] == 10
    assert untuned["rows"][0]["parameters"] > untuned["tuned"]["parameters"] and untuned["claim"]
    assert cli.main(command) == 0
    assert "tuned minus it" in capsys.readouterr().out
