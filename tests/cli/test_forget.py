"""A limit on forgetting in whole runs: probes of every kind, replay, the report, resuming; what has no meaning."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import answered, labelled, texts, write_rows
from tests.cli.test_exit import comparable, same_run
from tests.cli.test_resume import start_and_cut
from tests.tiny import save_tiny, tiny_classifier

from tunesmith import api
from tunesmith.data.batches import collate
from tunesmith.data.encode import Encoder
from tunesmith.data.records import Text
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.evaluate.likelihood import evaluate_likelihood
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import load_backbone, load_tokenizer
from tunesmith.recipe import load_recipe

BASE = "tunesmith/reviews-1m"
"""A base that knows something it can forget."""
GENERAL = (
    "This film is a waste of time, and the acting is awful.",
    "I loved every minute of it and would watch it again.",
    "One of the best movies I have seen this year.",
)


class Samples(list):
    """A store in memory."""

    @property
    def lengths(self):
        return [len(sample) for sample in self]


@pytest.fixture
def general(work):
    write_rows(work / "general.jsonl", [{"text": text} for text in GENERAL])
    return "general.jsonl"


def evaluations(work, run):
    return [json.loads(line)["metrics"] for line in (work / f"runs/{run}/evaluations.jsonl").read_text().splitlines()]


def test_a_run_that_forgets_keeps_the_base_when_nothing_is_within_the_limit(write, work, run, general):
    forget = {"probe": general, "at_most": "0%", "on_exceed": "go_on"}
    recipe = write("sft", base=BASE, forget=forget, train={"learning_rate": 0.3, "epochs": 2})
    done = run("train", recipe, "--run", "lost", "--json")
    assert done.code == 0 and "NO CHECKPOINT KEEPS FORGETTING WITHIN 0 %" in done.err
    found = done.json["forget"]
    assert found["base_kept"] and found["exceeded"] == 2 and found["forgetting"] == pytest.approx(0, abs=1e-6)
    assert done.json["before"]["loss"]["value"] == pytest.approx(done.json["after"]["loss"]["value"])
    assert all(line["forgetting"] > 0 for line in evaluations(work, "lost"))
    page = (work / "runs/lost/report.html").read_text()
    assert "Forgetting as a limit" in page and "NO CHECKPOINT KEEPS" in page


def test_a_limit_in_force_is_kept_by_the_weights_the_run_ends_with(write, work, general):
    forget = {"probe": general, "at_most": "3%", "on_exceed": "go_back"}
    train = {"learning_rate": 0.1, "epochs": 4, "eval_every": 1}
    kept = api.train(write("sft", base=BASE, forget=forget, train=train), run="kept")
    assert not kept["forget"]["base_kept"] and kept["forget"]["forgetting"] <= 0.03
    assert kept["forget"]["went_back"] > 0 and kept["forget"]["rate"] < 1
    api.train(
        write("sft", base=BASE, forget={**forget, "on_exceed": "go_on", "at_most": "1000%"}, train=train), run="free"
    )
    assert max(line["forgetting"] for line in evaluations(work, "free")) > 0.03, "the control forgets"


def test_resumed_equals_undisturbed_with_probes_replay_and_row_losses(write, work, general):
    write_rows(work / "earlier.jsonl", answered(6, 500))
    recipe = write(
        "sft",
        base=BASE,
        forget={"probe": {"text": general, "earlier": "earlier.jsonl"}, "at_most": "3%", "on_exceed": "go_back",
                "replay": {"data": general, "ratio": 0.2, "most": 0.6}},
        train={"learning_rate": 0.1, "epochs": 3, "eval_every": 1, "keep": 1},
        tune={"dropout": 0.1},
    )  # fmt: skip
    whole = api.train(recipe, run="whole")
    assert set(whole["forget"]["probes"]) == {"text", "earlier"} and whole["forget"]["exceeded"] > 0
    for step in (3, 7):
        name = f"cut-{step}"
        start_and_cut(recipe, name, step)
        assert comparable(api.resume(name)) == comparable(whole)
        same_run(work / "runs/whole", work / f"runs/{name}")
        for file in ("train_rows.jsonl", "eval_rows.jsonl", "forget.json"):
            assert (work / f"runs/whole/{file}").read_bytes() == (work / f"runs/{name}/{file}").read_bytes(), file


@pytest.mark.parametrize(("base", "kind"), [("llama", "causal"), ("bert", "masked")])
def test_text_is_a_probe_of_a_classifier_through_the_head_of_its_base(base, kind, write, work, general):
    result = api.train(write("classify", base=base, forget={"probe": general, "at_most": "50%"}), run="c")
    measured = result["forget"]["probes"]["probe"]["before"]["loss"]["value"]
    if kind == "causal":
        tokenizer = load_tokenizer(base)
        encoder = Encoder(tokenizer, "pretrain", 256, "split")
        lines = [json.loads(line)["text"] for line in (work / general).read_text().splitlines()]
        samples = [encoder(Text(text, f"{general}:{i}"))[0] for i, text in enumerate(lines, 1)]

        store = Samples(samples)
        plain = evaluate_likelihood(LanguageModel(load_backbone(base, "causal")), store, collate=collate)
        assert measured == pytest.approx(plain.metrics()["loss"].value, rel=1e-5)
    assert result["forget"]["probes"]["probe"]["after"]["loss"]["value"] != measured, "the tuned transformer answers"


def test_labelled_rows_of_an_earlier_task_are_a_probe_by_their_loss(write, work):
    write_rows(work / "earlier.jsonl", labelled(8, 300))
    result = api.train(write("classify", forget={"probe": "earlier.jsonl", "at_most": "90%"}), run="c")
    assert set(result["forget"]["probes"]["probe"]["before"]) >= {"loss", "accuracy"}


def test_a_base_without_a_head_for_text_refuses_text_as_a_probe(write, work, general):
    save_tiny(tiny_classifier("bert"), work / "headless")
    with pytest.raises(ModelError, match=r"has no head for text.*labelled rows"):
        api.train(write("classify", base="headless", forget={"probe": general, "at_most": "2%"}), run="c")


def test_what_cannot_be_measured_is_refused_by_name(write, work):
    with pytest.raises(DataError, match=r"forget\.probe probe"):
        api.train(write("sft", forget={"probe": "absent.jsonl", "at_most": "2%"}), run="c")
    write_rows(work / "other.jsonl", [{"text": "the cat", "label": "perhaps"}] * 2)
    with pytest.raises(DataError, match="perhaps"):
        api.train(write("classify", forget={"probe": "other.jsonl", "at_most": "2%"}), run="c")


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ({"at_most": 2}, "write 2% or 0.02"),
        ({"at_most": "much"}, "write 2% or 0.02"),
        ({}, "`forget.at_most` is missing"),
        ({"at_most": "2%", "on_exceed": "panic"}, "go_back"),
        ({"at_most": "2%", "replay": {"data": "x", "ratio": 0.6}}, "below the ratio it begins with"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(forget, message, write):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write("sft", forget=forget))


@pytest.mark.parametrize(("written", "limit"), [("2%", 0.02), ("2.5 %", 0.025), (0.02, 0.02), ("150%", 1.5), (0, 0.0)])
def test_a_limit_is_a_share(written, limit, write):
    resolved = load_recipe(write("sft", forget={"at_most": written}))
    assert resolved.recipe.forget is not None and resolved.recipe.forget.limit == pytest.approx(limit)
    assert resolved.recipe.forget.on_exceed == "go_back"


def test_without_a_probe_the_text_that_comes_with_the_program_is_taken(write, work):
    write_rows(work / "texts.jsonl", texts(24))
    result = api.train(write("pretrain", forget={"at_most": "50%"}), run="p")
    assert list(result["forget"]["probes"]) == ["probe"]
