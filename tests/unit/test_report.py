"""The report and the card are made of files alone, escape everything, and say the verdict first."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RunError
from tunesmith.evaluate.card import write_card
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.run_files import data_facts, evaluations_of, read_run

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
TOKEN = "hf_" + "a" * 30


def entry(value: float, low: float, high: float, n: int = 100) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def result(low: float, high: float) -> dict[str, Any]:
    return {
        "run": "demo",
        "stage": "classify",
        "before": {"accuracy": entry(0.5, 0.4, 0.6)},
        "after": {"accuracy": entry(0.8, 0.7, 0.9)},
        "difference": {"accuracy": entry(0.3, low, high)},
        "probe": {
            "before": {"loss": entry(2.0, 1.9, 2.1)},
            "after": {"loss": entry(2.5, 2.4, 2.6)},
            "difference": {"loss": entry(0.5, 0.4, 0.6)},
        },
        "base": {"name": "some/base", "licence": None, "hash": "sha256:abc"},
        "data": {"train": {"name": "reviews.jsonl", "fingerprint": "sha256:def", "records": 1000, "dropped": None}},
        "trainable_parameters": 628_994,
        "total_parameters": 67_584_004,
        "seconds": 75.0,
        "peak_memory_bytes": 1_500_000_000,
        "tokens_per_second": 321.0,
    }


def write_run(folder: Path, low: float = 0.2, high: float = 0.4) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = f"stage: classify\nbase: some/base\nseed: 7\ndata: {{train: reviews.jsonl, eval: null}}\nnote: {TOKEN}\n"
    (folder / "recipe.yaml").write_text(recipe + "tune: {method: lora}\n")
    (folder / "result.json").write_text(json.dumps(result(low, high)))
    lines = {
        "metrics.jsonl": [{"step": s, "epoch": s / 10, "loss": 1 / s} for s in range(1, 21)],
        "evaluations.jsonl": [
            {"step": s, "epoch": s // 10, "metrics": {"loss": v, "accuracy": entry(a, a - 0.1, a + 0.1)}}
            for s, v, a in ((0, 0.7, 0.5), (10, 0.3, 0.8), (20, 0.6, 0.8))
        ],
        "samples.jsonl": [{"prompt": EVIL, "before": EVIL, "after": "\ud800 \u202e", "reference": "good"}],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "origins.json").write_text(json.dumps({"seed": "user", "stage": "user"}))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "transformers": "5.24.0"}))
    (folder / "trainable.json").write_text(json.dumps({"groups": [["q_lin lora", 36_864], [EVIL, 1]]}))
    return folder


class Tags(HTMLParser):
    """Every tag and attribute of a page; open and close must match."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_self_contained_and_escaped(tmp_path: Path):
    page = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    tags = parsed(page)
    assert "script" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    sources = [value or "" for name, value in tags.attributes if name in ("src", "href")]
    assert sources and all(value.startswith("data:image/svg+xml;base64,") for value in sources)
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert "&lt;script&gt;alert(1)" in page and TOKEN not in page and "\u202e" not in page
    assert "script" in parsed(f"<p>{EVIL}</p>").names  # control: unescaped, it is seen


def test_verdict_comes_first_and_everything_is_there(tmp_path: Path):
    page = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    text = re.sub(r"<style>.*?</style>", "", page)
    places = [
        text.index(part)
        for part in (
            "<strong>Better</strong>",
            "accuracy 0.5000 before, 0.8000 after",
            "Before and after",
            "Curve",
            "The same prompts",
            "Forgetting probe",
            "What trained",
            "Cost",
            "Settings",
        )
    ]
    assert places == sorted(places)
    for part in ("628,994", "0.9307 %", "1 min 15 s", "1.5 GB", "36,864", "reviews.jsonl", "2.13.0", "sha256:def"):
        assert part in text, part
    assert "Forgetting: on text outside the task loss 2.000 before, 2.500 after" in text
    assert "lowest at step 10" in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.1, 0.4, "NO MEASURABLE CHANGE"), (-0.4, -0.1, "Worse"), (0.1, 0.4, "Better")],
)
def test_the_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, verdict: str):
    page = write_report(write_run(tmp_path / "run", low, high)).read_text(encoding="utf-8")
    assert f"<strong>{verdict}</strong>" in page


def test_the_same_files_give_the_same_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_an_unfinished_run_still_has_a_page(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("stage: sft\nbase: b\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parsed(page)
    assert "No verdict" in page and "has not finished" in page


def test_damaged_lines_are_passed_over_and_named(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo\n[1]\n')
    (run / "trainable.json").write_text("{")
    page = write_report(run).read_text(encoding="utf-8")
    assert "metrics.jsonl:21" in page and "metrics.jsonl:22" in page and "trainable.json is damaged" in page


@pytest.mark.parametrize(
    "broken",
    [
        {"before": [], "after": 3, "difference": "x", "probe": [], "base": 7, "data": "d", "per_class": [1]},
        {"before": {"loss": None}, "after": {"loss": {"value": "Infinity", "low": None, "high": None, "n": 1}}},
        {"before": {"loss": 1}, "after": {"loss": 2}, "difference": {"loss": {"value": "NaN"}}, "seconds": "long"},
        {"trainable_parameters": 0, "total_parameters": 0, "baselines": {"zero-shot": {"accuracy": 0.5}}},
    ],
)
def test_odd_results_never_break_the_page_or_the_card(tmp_path: Path, broken: dict[str, Any]):
    run = write_run(tmp_path / "run")
    (run / "result.json").write_text(json.dumps(broken))
    parsed(write_report(run).read_text(encoding="utf-8"))
    assert "None" not in write_card(run).read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    for write in (write_report, write_card):
        with pytest.raises(RunError, match="name the folder of a run"):
            write(tmp_path)


def test_the_card_has_every_field_and_none_says_none(tmp_path: Path):
    card = write_card(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    for part in (
        "some/base",
        "sha256:abc",
        "reviews.jsonl",
        "sha256:def",
        "not stated by the base",
        "| seed | 7 |",
        "| torch | 2.13.0 |",
        "| 1 | 10 | 0.3000 | 0.8000 |",
        "Intended use and limits",
        "0.7000 to 0.9000 | 100 |",
        "Better: accuracy",
        "loss 2.000 before, 2.500 after",
    ):
        assert part in card, part
    assert not re.search(r"\b(None|null|nan)\b", card) and TOKEN not in card


def test_text_in_a_card_is_not_markup(tmp_path: Path):
    run = write_run(tmp_path / "run")
    data = result(0.2, 0.4) | {"run": "a | b <img src=x> [x](http://y)\n# no heading"}
    (run / "result.json").write_text(json.dumps(data))
    first = write_card(run).read_text(encoding="utf-8").splitlines()[0]
    assert first == r"# a \| b \<img src=x\> \[x\](http://y) \# no heading"


def test_the_data_is_named_and_hashed_and_no_folder_of_this_machine_is(tmp_path: Path):
    run = write_run(tmp_path / "run")
    data = {key: value for key, value in result(0.2, 0.4).items() if key != "data"}
    (run / "result.json").write_text(json.dumps(data))
    inputs = {"data": {"train": {"samples": 9, "hash": "sha256:123"}}, "labels": ["no", "yes"]}
    (run / "inputs.json").write_text(json.dumps(inputs | {"recipe_folder": "/home/somebody/private"}))
    for path in (write_report(run), write_card(run)):
        text = path.read_text(encoding="utf-8")
        for part in ("reviews.jsonl", "sha256:123", "no, yes"):
            assert part in text, (path.name, part)
        assert "somebody" not in text


def with_losses(folder: Path, trained: float, held: float) -> str:
    write_run(folder)
    rows = [{"step": s, "epoch": s / 10, "loss": trained} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = {"step": 20, "epoch": 2, "metrics": {"loss": held}}
    (folder / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    return write_report(folder).read_text()


def test_a_gap_between_training_and_held_out_loss_is_flagged(tmp_path):
    """The worked example's own run: 0.0095 on training rows, 1.03 held out."""
    assert "knows its training rows better" in with_losses(tmp_path / "a", 0.0095, 1.03)
    assert "Gap: none to speak of" in with_losses(tmp_path / "b", 0.40, 0.42)


def test_held_out_files_are_shown_one_by_one(tmp_path):
    folder = write_run(tmp_path / "run")
    pair = {"before": {"loss": entry(2.0, 1.9, 2.1)}, "after": {"loss": entry(1.25, 1.2, 1.3)}}
    whole = json.loads((folder / "result.json").read_text()) | {"by_source": {"medical<b>.jsonl": pair}}
    (folder / "result.json").write_text(json.dumps(whole))
    page = write_report(folder).read_text()
    assert "By data set" in page and "medical&lt;b&gt;.jsonl" in page and "1.25" in page


def test_the_untrained_model_is_the_first_row_of_the_evaluations(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluations.jsonl").write_text("".join(lines[1:]))
    steps = [line["step"] for line in evaluations_of(read_run(folder))]
    assert steps == [0, 10, 20]
    before = result(0.2, 0.4)["before"]
    assert evaluations_of(read_run(folder))[0]["metrics"] == before
    assert "| 0 | 0 |" in write_card(folder).read_text(encoding="utf-8")
    (folder / "evaluations.jsonl").write_text("".join(lines))
    assert [line["step"] for line in evaluations_of(read_run(folder))] == [0, 10, 20]


def test_every_part_of_a_mix_is_named_among_the_data(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text("stage: sft\ndata: {mix: [{path: a.jsonl, weight: 3.0}, {path: b.jsonl}]}\n")
    facts = data_facts(read_run(folder))
    assert facts["mix[0].path"] == "a.jsonl" and facts["mix[0].weight"] == 3.0 and facts["mix[1].path"] == "b.jsonl"


def test_the_page_names_the_base_with_its_licence_and_hash(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    facts = {"name": "some/base", "hash": "0123abcd", "licence": "apache-2.0"}
    (folder / "result.json").write_text(json.dumps({**result(0.2, 0.4), "base": facts}))
    page = write_report(folder).read_text(encoding="utf-8")
    assert all(value in page for value in facts.values())
    (folder / "result.json").write_text(json.dumps({**result(0.2, 0.4), "base": {**facts, "licence": None}}))
    assert "not stated by the base" in write_report(folder).read_text(encoding="utf-8")
