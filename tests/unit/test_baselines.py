"""Baselines: the small systems equal their references, the base is asked as described, and a run says what tuning is
worth beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.tiny import save_tiny, tiny_causal, tiny_classifier, tiny_tokenizer

from tunesmith import api
from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.errors import RecipeError
from tunesmith.evaluate.baselines import Rival, nearest_answers, worth
from tunesmith.evaluate.features import mean_hidden
from tunesmith.evaluate.intervals import Estimate
from tunesmith.evaluate.linear import fit_logistic, linear_probe, nearest, tfidf
from tunesmith.evaluate.prompting import LabelPrompt, prompt_tokens, with_examples
from tunesmith.evaluate.report_baselines import baselines_text
from tunesmith.model.score import ScoreModel
from tunesmith.recipe import load_recipe
from tunesmith.rundir import RunDir

TEXTS = ["a good film", "a bad, bad film", "good food and good wine", "bad food", "Good!", "so bad it hurts"]
LABELS = np.asarray([1, 0, 1, 0, 1, 0])


def test_tfidf_and_logistic_regression_equal_scikit_learns():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    theirs = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    ours, held = tfidf(TEXTS, ["a good unseen word"])
    assert np.allclose(ours.toarray(), theirs.fit_transform(TEXTS).toarray(), atol=1e-12)
    assert np.allclose(held.toarray(), theirs.transform(["a good unseen word"]).toarray(), atol=1e-12)
    x = ours.toarray()
    for labels in (LABELS, np.asarray([0, 1, 2, 0, 1, 2])):
        reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(x, labels)
        theirs_likely = reference.predict_proba(x)
        likely, stronger = (shares(fit_logistic(ours, labels, len(set(labels)), c), ours) for c in (1.0, 2.0))
        assert np.allclose(likely, theirs_likely, atol=1e-4)
        assert not np.allclose(stronger, theirs_likely, atol=1e-2)


def shares(weights, x):
    scores = np.exp(x @ weights[:-1] + weights[-1])
    return scores / scores.sum(1, keepdims=True)


def test_a_linear_probe_finds_what_the_features_hold_and_nothing_in_shuffled_labels():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    features = draw.normal(size=(400, 20)) + 1.5 * labels[:, None] * (np.arange(20) == 3)
    right = (linear_probe(features[:200], labels[:200], features[200:], 2) == labels[200:]).mean()
    shuffled = draw.permutation(labels[:200])
    control = (linear_probe(features[:200], shuffled, features[200:], 2) == labels[200:]).mean()
    assert right > 0.7 and control < 0.62


def test_the_nearest_is_the_one_of_least_angle_whatever_its_length():
    known = np.asarray([[10.0, 0.0], [1.0, 1.0]])
    assert nearest(known, np.asarray([[0.1, 0.01], [3.0, 2.9]])).tolist() == [0, 1]
    assert nearest_answers(["how to boil rice", "who is he"], ["water", "a king"], ["boil some rice"]) == ["water"]


def test_features_do_not_depend_on_the_neighbours():
    model = ScoreModel(tiny_classifier("bert"))
    samples = [Sample(np.arange(5, 5 + n, dtype=np.int32), np.zeros(n, np.float32), label=0) for n in (3, 7, 5)]
    together = mean_hidden(model, samples, collate=collate)
    alone = np.concatenate([mean_hidden(model, [sample], collate=collate) for sample in samples])
    assert together.shape == (3, 32) and np.allclose(together, alone, atol=1e-5)


def test_a_label_prompt_shows_examples_and_cuts_texts_to_fit():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("good film", "bad film")]
    prompt = LabelPrompt(tokenizer, "{text}\nLabel: {label}", ("no", "yes"), ((ids[0], 1),), 200)
    assert tokenizer.decode(prompt.prompt(ids[1])) == "good film\nLabel: yes\n\nbad film\nLabel:"
    assert [tokenizer.decode(answer) for answer in prompt.answers()] == [" no", " yes"]
    long = LabelPrompt(tokenizer, "{text}\nLabel: {label}", ("no", "yes"), ((ids[0] * 50, 1),), 120)
    assert len(long.prompt(ids[1] * 50)) <= 120
    assert long.prompts([None, ids[1] * 50]) == [long.prompt(None), long.prompt(ids[1] * 50)]
    assert [tokenizer.decode(found).count("N/A") for found in long.prompts([None, ids[1] * 50])] == [1, 0]


def test_examples_before_a_conversation_count_nothing_and_fit():
    tokenizer = tiny_tokenizer()
    sample = Sample(np.asarray([7, 8, 9, 2], np.int32), np.asarray([0, 0, 1, 1], np.float32))
    shown = with_examples([sample], [sample, sample, sample], tokenizer, 12)
    assert shown[0].ids.tolist() == [7, 8, 9, 2] * 3
    assert shown[0].weights.tolist() == [0.0] * 10 + [1.0, 1.0]
    assert prompt_tokens([sample]) == 2 and prompt_tokens(shown.samples) == 10


def rival(title, value, change, n=100):
    return Rival(title, value, Estimate(change, change - 0.02, change + 0.02, n))


def test_the_sentence_says_when_tuning_was_not_worth_it():
    close = worth("accuracy", 0.87, [rival("probe", 0.86, 0.01), rival("majority", 0.5, 0.37)])
    assert close.startswith("Tuning was not worth it") and "probe is as good" in close and "includes 0" in close
    assert "probe is better" in worth("accuracy", 0.8, [rival("probe", 0.9, -0.1), rival("other", 0.8, 0.0)])
    assert worth("accuracy", 0.87, [rival("majority", 0.5, 0.37)]).startswith("Tuning beat the baseline")
    assert worth("loss", 1.0, [rival("few-shot", 2.0, -1.0)]).startswith("Tuning beat")
    assert worth("accuracy", 0.8, [rival("probe", 0.9, -0.1, n=3)]).startswith("Too few")


@pytest.fixture
def classify(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{i} is {'good' if i % 2 else 'bad'}", "label": ["no", "yes"][i % 2]} for i in range(60)]
    for name, part in (("train", rows[:30]), ("eval", rows[30:50]), ("test", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    save_tiny(tiny_causal("llama"), tmp_path / "base")
    return {
        "stage": "classify", "base": str(tmp_path / "base"), "train": {"steps": 1},
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "test")},
    }  # fmt: skip


def test_a_classifier_stands_beside_every_baseline_in_report_and_card(classify, tmp_path):
    result = api.train(classify | {"evaluate": {"baselines": True}}, run=str(tmp_path / "run"))
    table = result["baselines"]
    assert len(table) == 6 and table["TF-IDF + logistic regression"]["metrics"]["accuracy"]["value"] == 1.0
    assert table["most frequent label"]["metrics"]["accuracy"] == pytest.approx(
        {"value": 0.5, "low": 0.2993, "high": 0.7007, "n": 20}, abs=1e-4
    )
    entry = table["few-shot prompt, base untuned (4 examples)"]
    zero = table["zero-shot prompt, base untuned"]
    assert entry["prompt_tokens"] > zero["prompt_tokens"] > entry["tuned_prompt_tokens"] > 0
    tuned = result["after"]["accuracy"]["value"]
    for shown in table.values():
        assert shown["difference"]["accuracy"]["value"] == pytest.approx(tuned - shown["metrics"]["accuracy"]["value"])
    assert "TF-IDF + logistic regression is better" in result["worth"]
    assert len(result["test"]["baselines"]) == 6
    for page in ("report.html", "model_card.md"):
        text = (tmp_path / "run" / page).read_text(encoding="utf-8")
        assert "frozen features" in text and "Tuning was not worth it" in text
    head, rows = baselines_text(result)
    assert head[0] == "system" and rows[0][0] == "tuned" and len(rows) == 8


def test_baselines_are_measured_once_and_a_run_without_them_has_none(classify, tmp_path, monkeypatch):
    from tunesmith.stages import baselining

    first = api.train(classify, run=str(tmp_path / "a"))
    assert len(first["baselines"]) == 4
    (tmp_path / "a/result.json").unlink()
    monkeypatch.setattr(baselining, "_classify", lambda *_: pytest.fail("measured twice"))
    again = api.resume(str(tmp_path / "a"))
    assert again["baselines"] == first["baselines"]
    none = api.train(classify | {"evaluate": {"baselines": False}}, run=str(tmp_path / "b"))
    assert "baselines" not in none and not RunDir(tmp_path / "b").file("baselines").exists()


def test_an_encoder_is_asked_by_the_words_of_its_labels_and_reads_no_examples(classify, tmp_path):
    save_tiny(tiny_classifier("bert"), tmp_path / "encoder")
    recipe = classify | {"base": str(tmp_path / "encoder")}
    result = api.train(recipe | {"evaluate": {"baselines": ["zero_shot"]}}, run=str(tmp_path / "run"))
    assert list(result["baselines"]) == ["zero-shot, cosine to the label's words, base untuned"]
    with pytest.raises(RecipeError, match="is an encoder"):
        api.train(recipe | {"evaluate": {"baselines": ["few_shot"]}}, run=str(tmp_path / "refused"))
    assert not (tmp_path / "refused/recipe.yaml").exists()


def test_answers_are_compared_with_prompting_and_the_nearest_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    for name, numbers in (("train", range(12)), ("eval", range(12, 20))):
        rows = [{"prompt": f"count {i}", "completion": f"{i} {i + 1}"} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_tiny(tiny_causal("llama"), tmp_path / "base")
    recipe = {
        "stage": "sft", "base": str(tmp_path / "base"), "train": {"steps": 1},
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")},
        "evaluate": {"baselines": True, "generate": {"max_tokens": 8, "examples": 6}, "prompting": {"shots": 2}},
    }  # fmt: skip
    result = api.train(recipe, run=str(tmp_path / "run"))
    table = result["baselines"]
    few = table["few-shot prompt, base untuned (2 examples where they fit)"]
    zero = table["zero-shot prompt, base untuned"]
    assert few["metrics"]["loss"]["n"] == 8 and few["metrics"]["rouge_l"]["n"] == 6
    assert zero["metrics"]["loss"] == result["before"]["loss"] and zero["prompt_tokens"] == few["tuned_prompt_tokens"]
    assert few["prompt_tokens"] > 2 * zero["prompt_tokens"]
    assert "loss" not in table["nearest training prompt's answer (TF-IDF)"]["metrics"]
    assert result["worth"]


def test_baselines_that_cannot_be_are_refused_with_the_recipe(classify):
    with pytest.raises(RecipeError, match="has no baseline `majority`"):
        load_recipe({"stage": "sft", "base": "x", "data": {"train": "t", "eval": "e"},
                     "evaluate": {"baselines": ["majority"]}})  # fmt: skip
    with pytest.raises(RecipeError, match=r"add `evaluate\.generate`"):
        load_recipe({"stage": "sft", "base": "x", "data": {"train": "t", "eval": "e"},
                     "evaluate": {"baselines": ["nearest_neighbour"]}})  # fmt: skip
    with pytest.raises(RecipeError, match="held-out rows"):
        load_recipe({"stage": "classify", "base": "x", "data": {"train": "t"}, "evaluate": {"baselines": True}})
    with pytest.raises(RecipeError, match=r"ends with `\{label\}`"):
        load_recipe(classify | {"evaluate": {"prompting": {"template": "{label} is {text}"}}})
