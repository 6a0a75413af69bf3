"""`tunesmith quickstart`: everything is laid out, runs, is reported beside simple baselines, and leads on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import RecipeError, RunError
from tunesmith.recipe import load_recipe
from tunesmith.recipe_chain import load_chain
from tunesmith.rundir import RunDir
from tunesmith.start.quickstart import lay_out, next_commands
from tunesmith.start.written import STAGES

SHORT = ("train.epochs=0.06", "threads=1")


def test_a_newcomer_sees_before_after_and_baselines_and_can_go_on(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", *SHORT, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == "quickstart-classify"
    assert result["test"]["before"]["accuracy"]["n"] == 170
    assert 0.6 < result["test"]["baselines"]["TF-IDF + logistic regression"]["metrics"]["accuracy"]["value"] < 0.85
    assert {row["label"] for row in result["examples"]} == {"positive", "negative"}
    assert "TF-IDF" in (desk / "runs/quickstart-classify/report.html").read_text(encoding="utf-8")
    for command, _ in result["next"]:
        verb, *arguments = shlex.split(command)
        assert verb == "tunesmith"
        if arguments[0] in ("chat", "export"):
            assert main(arguments) == 0, command
    assert (desk / "quickstart-classify/model.safetensors").is_file()


def test_a_second_run_keeps_the_first_and_uses_the_edited_recipe(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = lay_out("classify", desk / "quickstart")
    short = recipe.read_text(encoding="utf-8").replace("epochs: 4", "epochs: 0.03").replace("  dropout: 0.1\n", "")
    recipe.write_text("# mine\n" + short, encoding="utf-8")
    (desk / "runs/quickstart-classify").mkdir(parents=True)
    assert main(["quickstart", "threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy on 170 rows" in shown
    assert "TF-IDF + logistic regression" in shown
    assert "tunesmith quickstart --stage sft" in shown
    assert recipe.read_text(encoding="utf-8").startswith("# mine")
    saved = load_recipe(desk / "runs/quickstart-classify-2/recipe.yaml").recipe
    assert saved.train.epochs == 0.03
    assert saved.tune.dropout == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_is_laid_out_with_its_data_and_passes_its_checks(stage: str, desk: Path) -> None:
    recipe = lay_out(stage, desk / "quickstart")
    text = recipe.read_text(encoding="utf-8")
    assert "embedded:" not in text
    assert text.startswith("# ")
    if stage == "chain":
        assert [link.name for link in load_chain(recipe).stages] == ["1-sft", "2-reward", "3-ppo"]
    else:
        found = api.check(recipe)
        assert found["stage"] == stage
        assert found["trainable_parameters"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_what_comes_next_is_a_command_that_exists(stage: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, why in next_commands(stage, Path(f"quickstart/{stage}.yaml"), RunDir(Path("runs/x"))):
        assert main([shlex.split(command)[1], "--help"]) == 0
        assert why
    capsys.readouterr()


def test_a_stage_without_a_quickstart_is_told_what_there_is(desk: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean classify"):
        api.quickstart("classfy")
    with pytest.raises(RecipeError, match="masked base"):
        api.quickstart("mlm")
    assert list(desk.iterdir()) == []


def test_a_file_in_the_way_is_named(desk: Path) -> None:
    (desk / "quickstart").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="quickstart"):
        api.quickstart()
    assert (desk / "quickstart").read_text(encoding="utf-8") == "mine"
