"""`tunesmith init`: for every stage and for files of every shape, a recipe that loads, says why, and can be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny import save_tiny, tiny_causal, tiny_masked

from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.recipe_chain import load_chain
from tunesmith.start.written import STAGES

LINES = [f"Row {i} was {'fine' if i % 2 else 'poor'}, said the {i}th of them." for i in range(40)]


def jsonl(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def written(**asked: Any) -> Recipe:
    """The recipe that `init` wrote, loaded and checked down to its samples."""
    done = api.init(**asked)
    recipe = load_recipe(done["recipe"]).recipe
    api.check(done["recipe"])
    return recipe


@pytest.mark.parametrize("stage", STAGES)
def test_without_data_every_stage_gets_a_recipe_that_runs_as_it_stands(stage: str, desk: Path) -> None:
    done = api.init(stage)
    assert done["recipe"] == f"{stage}.yaml"
    assert "embedded:" in Path(done["recipe"]).read_text(encoding="utf-8")
    if stage == "chain":
        assert len(load_chain(done["recipe"]).stages) == 3
    else:
        assert api.check(done["recipe"])["stage"] == stage


def test_a_csv_with_odd_columns_semicolons_quotes_and_umlauts(desk: Path) -> None:
    head = 'Lfd. Nr.;"Äußerung: des ""Kunden""";Filiale;Überzeugt? #;Datum\r\n'
    rows = "".join(
        f'{i};"Der Kauf war ""{"schön" if i % 3 else "öde"}""; nie\nwieder {i}";{("Köln", "Fürth", "Ulm")[i % 3]}'
        f";{'ja' if i % 3 else 'nein'};2024-01-{i % 28 + 1:02d}\r\n"
        for i in range(60)
    )
    (desk / "Rückmeldungen 2024.csv").write_bytes(("\ufeff" + head + rows).encode())
    recipe = written(data="Rückmeldungen 2024.csv")
    assert recipe.stage == "classify"
    assert recipe.data.train == "Rückmeldungen 2024.csv"
    assert recipe.data.columns == {"text": 'Äußerung: des "Kunden"', "label": "Überzeugt? #"}
    assert recipe.data.split is not None
    text = Path("classify.yaml").read_text(encoding="utf-8")
    assert "2 labels: ja (40), nein (20)" in text
    assert "Filiale" in text


FILES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "alpaca": ("sft", [{"instruction": f"Add {i}.", "input": "", "output": f"It is {i}."} for i in range(30)]),
    "chat": ("sft", [
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"good day {i}"}]}
        for i in range(30)
    ]),
    "questions": ("sft", [{"Frage": f"Was ist {i} plus 1?", "Antwort": f"{i + 1}", "id": i} for i in range(30)]),
    "two texts": ("sft", [{"links": f"left {i} {'a' * i}", "rechts": f"right {i} b"} for i in range(30)]),
    "labels": ("classify", [{"text": text, "label": "good" if i % 2 else "bad"} for i, text in enumerate(LINES)]),
    "stars": ("classify", [{"review": text, "stars": i % 5 + 1} for i, text in enumerate(LINES)]),
    "many labels": ("classify", [{"text": text, "labels": ["a", "b"][: i % 3]} for i, text in enumerate(LINES)]),
    "pairs": ("dpo", [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]),
    "texts": ("pretrain", [{"text": text} for text in LINES]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_looked_at_and_its_stage_proposed(name: str, desk: Path) -> None:
    stage, rows = FILES[name]
    recipe = written(data=jsonl(f"{name}.jsonl", rows))
    assert recipe.stage == stage
    assert recipe.data.multi_label == (name == "many labels")
    assert recipe.data.max_length is not None and recipe.data.max_length <= 512


def test_plain_text_is_read_and_cut(desk: Path) -> None:
    (desk / "diary.txt").write_text("\n\n".join([*LINES, "So it went on and on. " * 400]), encoding="utf-8")
    recipe = written(data="diary.txt")
    assert recipe.stage == "pretrain"
    assert recipe.data.on_too_long == "split"
    assert recipe.data.max_length == 512


@pytest.mark.parametrize(("stage", "exact"), [("grpo", True), ("ppo", None)])
def test_prompts_with_answers_are_rewarded_for_them(stage: str, exact: bool | None, desk: Path) -> None:
    rows = [{"question": f"what is {i} + 1?", **({"answer": str(i + 1)} if exact else {})} for i in range(30)]
    recipe = written(stage=stage, data=jsonl("sums.jsonl", rows))
    assert recipe.stage == stage
    assert recipe.reward is not None and recipe.reward.exact is exact


def test_a_stage_that_is_named_is_taken(desk: Path) -> None:
    data = jsonl("rows.jsonl", FILES["labels"][1])
    assert written(stage="pretrain", data=data).stage == "pretrain"
    assert written(stage="reward", data=jsonl("p.jsonl", FILES["pairs"][1])).stage == "reward"


def test_a_masked_base_fills_holes(desk: Path) -> None:
    save_tiny(tiny_masked("bert"), desk / "bert")
    data = jsonl("rows.jsonl", FILES["texts"][1])
    assert written(data=data, base="bert").stage == "mlm"
    with pytest.raises(RecipeError, match="masked base"):
        api.init("mlm", data=data, to="other.yaml")


def test_another_base_gets_the_usual_learning_rate(desk: Path) -> None:
    save_tiny(tiny_causal("llama"), desk / "llama")
    assert written(stage="sft", base="llama").train.learning_rate == 2e-4
    recipe = written(data=jsonl("rows.jsonl", FILES["labels"][1]), base="llama")
    assert (recipe.base, recipe.train.learning_rate) == ("llama", 2e-4)


def test_a_file_that_is_there_is_never_overwritten(desk: Path) -> None:
    (desk / "mine.yaml").write_text("stage: sft # mine\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="left as it is"):
        api.init("sft", to="mine.yaml")
    assert (desk / "mine.yaml").read_text(encoding="utf-8") == "stage: sft # mine\n"


def test_a_recipe_in_another_folder_finds_its_data(desk: Path) -> None:
    (desk / "here").mkdir()
    recipe = written(data=jsonl("rows.jsonl", FILES["labels"][1]), to="here/first.yaml")
    assert recipe.data.train == "../rows.jsonl"


def test_broken_rows_and_other_faults_are_said_and_counted(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(jsonl("rows.jsonl", FILES["labels"][1]))
    data.write_text(data.read_text(encoding="utf-8") + '{"text": "cut of\n', encoding="utf-8")
    assert main(["init", "--data", str(data)]) == 0
    shown = capsys.readouterr()
    assert "rows.jsonl:41" in shown.out + shown.err
    assert load_recipe("classify.yaml").recipe.data.on_bad_row == "skip"
    assert "1 broken" in Path("classify.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["a\nb: c", "x # y", "'", "- z", "{w}", "\u202ex"])
def test_column_names_cannot_write_the_recipe(name: str, desk: Path) -> None:
    rows = [{name: text, "Urteil": "gut" if i % 2 else "schlecht"} for i, text in enumerate(LINES)]
    recipe = written(data=jsonl("rows.jsonl", rows))
    assert recipe.data.columns == {"text": name, "label": "Urteil"}
    assert set(yaml.safe_load(Path("classify.yaml").read_text(encoding="utf-8"))) == {
        "stage", "base", "data", "tune", "train"
    }  # fmt: skip


def test_data_that_fits_nothing_is_refused_with_its_columns(desk: Path) -> None:
    data = jsonl("rows.jsonl", [{"a": i, "b": i * 2.5} for i in range(20)])
    with pytest.raises(DataError, match="a \\(number\\)"):
        api.init(data=data)
    with pytest.raises(DataError, match="no such file"):
        api.init(data="nothing.csv")
    assert not list(desk.glob("*.yaml"))
