"""A frozen body run once: the same run as with the body at every step, whatever the family, resumed or not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import ENCODERS, save_tiny, tiny_causal, tiny_classifier

from tunesmith import api, cli
from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.engine.fit import StepReport
from tunesmith.errors import Interrupted, ModelError, RecipeError
from tunesmith.evaluate.features import head_inputs
from tunesmith.model.features import FeatureTable, text_key
from tunesmith.model.packing import Layout
from tunesmith.model.score import ScoreModel
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.recipe import load_recipe
from tunesmith.rundir import create_run
from tunesmith.stages import running

NONE = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.3},
    "llama": {},
}
"""No dropout in the body; bert's head keeps some."""


class Rows:
    """Samples by index."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.lengths = samples, np.asarray([len(sample) for sample in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def some_rows(num: int = 9) -> Rows:
    draw = np.random.default_rng(1)
    ids = [draw.integers(7, 300, n).astype(np.int32) for n in draw.integers(3, 20, num)]
    return Rows([Sample(row, np.zeros(len(row), np.float32), label=i % 2) for i, row in enumerate(ids)])


def with_table(model: ScoreModel, rows: Rows) -> FeatureTable:
    vectors = np.zeros((len(rows), 32), np.float32)
    for places, found in head_inputs(model, rows, range(len(rows)), collate=collate, max_tokens=40):
        vectors[places] = found
    table = FeatureTable()
    table.add([text_key(sample.ids) for sample in rows.samples], vectors)
    return table


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.PADDED])
@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_scores_and_gradients_of_kept_features_are_those_of_the_whole_model(family, layout):
    backbone = tiny_classifier(family)
    make_trainable(backbone, TrainableSpec("head"))
    model, rows = ScoreModel(backbone).eval(), some_rows()
    if layout is Layout.PADDED:
        model.layout = layout
        backbone.set_attn_implementation("sdpa")
    batch, answers = collate(rows.samples), []
    for features in (None, with_table(model, rows)):
        model.features = features
        model.zero_grad(set_to_none=True)
        scores = model(batch).scores
        scores.square().sum().backward()
        answers.append((scores.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    model.check_pooled()
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert answers[0][0].abs().max() > 0.01 and len(answers[0][1]) > 0


def test_the_table_is_what_is_scored_and_a_text_that_is_not_in_it_passes_through_the_body():
    model, rows = ScoreModel(tiny_classifier("bert")), some_rows()
    plain = model.eval()(collate(rows.samples)).scores
    model.features = with_table(model, Rows(rows.samples[:4]))
    model.features._parts[0] = model.features._parts[0] + 1
    assert (model(collate(rows.samples[:4])).scores - plain[:4]).abs().max() > 1e-3
    model.train()
    model.backbone.dropout.p = 0.0
    torch.testing.assert_close(model(collate(rows.samples)).scores, plain, rtol=1e-4, atol=1e-5)
    assert all(part.training for part in model.modules()), "modes are put back"


def test_a_head_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr("tunesmith.model.score.score_head", lambda backbone: None)
    model = ScoreModel(tiny_classifier("bert"))
    with pytest.raises(ModelError, match=r"cache_features.*BertForSequenceClassification.*not known"):
        model.check_pooled()


def test_a_head_that_is_read_wrongly_is_refused():
    model = ScoreModel(tiny_classifier("distilbert"))
    model.layout = Layout.ALONE
    model.check_pooled()
    model._head = type(model._head)("last", model._head.apply)
    with pytest.raises(ModelError, match="cache_features"):
        model.check_pooled()


def labelled(path: Path, count: int, start: int = 0, *, several: bool = False) -> None:
    words = ("good", "fine", "great", "bad", "dull", "poor")
    rows = [
        {"text": f"the film {i} of {i * 7 % 5} was {words[i % 6]}"}
        | ({"labels": ["low"] * (i % 6 > 2) + ["odd"] * (i % 2)} if several else {"label": ["yes", "no"][i % 6 > 2]})
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def made(family: str = "bert", *, several: bool = False, **tune: object) -> dict:
        labelled(tmp_path / "train.jsonl", 26, several=several)
        labelled(tmp_path / "eval.jsonl", 10, 100, several=several)
        if not (tmp_path / family).is_dir():
            model = tiny_classifier(family, **NONE[family]) if family == "bert" else tiny_causal(family)
            save_tiny(model, tmp_path / family)
        return {
            "stage": "classify", "base": family, "precision": "float32",
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "multi_label": several},
            "tune": {"method": "head", **tune},
            "train": {"epochs": 3, "batch_examples": 8, "micro_batch_tokens": 40, "learning_rate": 1e-2,
                      "clip_norm": 0.1},
            "evaluate": {"baselines": False, "sentences": ["the film was good", "what is this"]},
        }  # fmt: skip

    return made


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final(run: Path) -> bytes:
    return next((run / "final").rglob("*.safetensors")).read_bytes()


@pytest.mark.parametrize(("family", "several"), [("bert", False), ("llama", True)])
def test_cached_and_uncached_runs_are_the_same_at_every_step(recipe, family, several, tmp_path, monkeypatch):
    api.train(recipe(family, several=several), run="anew")
    passes = []
    whole = ScoreModel._packed_scores
    monkeypatch.setattr(ScoreModel, "_packed_scores", lambda model, batch: passes.append(1) or whole(model, batch))
    api.train(recipe(family, several=several, cache_features=True), run="kept")
    assert len(passes) == 1, "the proof at load alone"
    anew, kept = (metrics(tmp_path / "runs" / name) for name in ("anew", "kept"))
    assert len({line["loss"] for line in kept}) == 12
    for a, b in zip(anew, kept, strict=True):
        assert b == pytest.approx(a, rel=1e-4), a["step"]
    before, after = (json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in ("anew", "kept"))
    for part in ("before", "after"):
        assert after[part]["loss"]["value"] == pytest.approx(before[part]["loss"]["value"], rel=1e-4)
    assert after["tensors"] == before["tensors"] and after["tensors"]["frozen_changed"] == 0
    tables = [[json.loads(x)["after"] for x in (tmp_path / "runs" / n / "samples.jsonl").read_text().splitlines()]
              for n in ("anew", "kept")]  # fmt: skip
    assert tables[0] == tables[1] and len(tables[0]) == 2


def test_an_opened_run_predicts_without_the_cache(recipe, tmp_path, monkeypatch):
    result = api.train(recipe(cache_features=True), run="kept")
    monkeypatch.setattr("tunesmith.stages.feature_cache.kept", None)
    found = api.evaluate("kept", data="eval.jsonl")
    assert found["metrics"]["loss"]["value"] == pytest.approx(result["after"]["loss"]["value"], rel=1e-4)


def stopper(step: int):
    def show(report: StepReport) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return show


@pytest.mark.parametrize("cache", ["read back", "made again", "damaged"])
def test_resumed_is_undisturbed_bit_for_bit(recipe, tmp_path, cache):
    resolved = load_recipe(recipe(cache_features=True))
    said: list[str] = []
    for name, step in (("whole", 0), ("cut", 5)):
        run = create_run(name, stage="classify")
        run.lock()
        if step:
            with pytest.raises(Interrupted):
                running.start(run, resolved, say=said.append, show=stopper(step))
            for path in (tmp_path / "cache" / "features").glob("*/vectors"):
                if cache == "made again":
                    path.unlink()
                    path.with_name("meta.json").unlink()
                    path.parent.rmdir()
                elif cache == "damaged":
                    content = bytearray(path.read_bytes())
                    content[5] ^= 1
                    path.write_bytes(content)
            said.clear()
            running.go_on(run, say=said.append, show=lambda report: None)
        else:
            running.start(run, resolved, say=said.append, show=lambda report: None)
        run.unlock()
    runs = [tmp_path / "runs" / name for name in ("whole", "cut")]
    assert final(runs[0]) == final(runs[1])
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    assert (runs[0] / "evaluations.jsonl").read_bytes() == (runs[1] / "evaluations.jsonl").read_bytes()
    line = next(text for text in said if text.startswith("features:"))
    assert ("from the cache" in line) == (cache == "read back")
    assert any("damaged" in text for text in said) == (cache == "damaged")


def test_other_seeds_and_rates_share_the_features_and_another_body_does_not(recipe, tmp_path):
    def folders() -> set[str]:
        return {path.name for path in (tmp_path / "cache" / "features").glob("*") if path.is_dir()}

    api.train(recipe(cache_features=True), run="a")
    first = folders()
    api.train(recipe(cache_features=True) | {"seed": 7}, run="b")
    assert len(first) == 2 and folders() == first
    save_tiny(tiny_classifier("bert", seed=3), tmp_path / "bert")
    api.train(recipe(cache_features=True), run="c")
    assert len(folders()) == 4 and metrics(tmp_path / "runs" / "c")[0] != metrics(tmp_path / "runs" / "a")[0]


@pytest.mark.parametrize(
    ("stage", "tune", "said"),
    [
        ("classify", "{method: full, cache_features: true}", "does nothing with method full; it is for head"),
        ("classify", "{method: lora, rank: 4, cache_features: true}", "does nothing with method lora; it is for head"),
        ("reward", "{method: head, cache_features: true}", "does nothing in stage reward; it is for classify"),
        ("classify", "{method: head, cache_feature: true}", "did you mean `cache_features`"),
        ("classify", "{method: head, cache_features: often}", "`tune.cache_features` is 'often'"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused_with_its_line(tmp_path, stage, tune, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: {stage}\nbase: b\ndata: {{train: t.jsonl}}\ntune: {tune}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4: ") as found:
        load_recipe(path)
    assert said in str(found.value)


def test_the_plan_has_a_line_for_them_and_counts_one_pass(recipe, capfd):
    anew, kept = api.plan(recipe()), api.plan(recipe(cache_features=True))
    assert anew["memory"]["features"] == 0 and kept["memory"]["features"] == 4 * 32 * 36
    assert 1 < anew["flops"] / kept["flops"] < 3, "three epochs of training rows against one pass over all rows"
    Path("recipe.yaml").write_text(json.dumps(recipe(cache_features=True)))
    capfd.readouterr()
    assert cli.main(["plan", "recipe.yaml"]) == 0 and "features" in capfd.readouterr().out
    assert cli.main(["check", "recipe.yaml"]) == 0
    assert "kept after one pass of the frozen body" in capfd.readouterr().out


def test_compare_takes_it_as_a_way_to_tune(recipe):
    from tunesmith.stages.comparing import trials_of

    Path("recipe.yaml").write_text(json.dumps(recipe()))
    ways = ["head", "head:cache_features=true", "full"]
    anew, kept, full = trials_of("recipe.yaml", (), tune=ways, bases=(), grid=(), seeds=1)
    on = [load_recipe(trial.recipe, trial.overrides).recipe.tune.cache_features for trial in (anew, kept, full)]
    assert on == [None, True, None]
