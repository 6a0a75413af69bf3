"""Stage reward: what it learns, that a score sees nothing but its own text, calibration, exact resume."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.preferences import left, make_folder, pairs, recipe, start_and_cut, with_margins, write
from tests.tiny import save_tiny, tiny_causal, tiny_classifier

from tunesmith import api
from tunesmith.batch import Batch, Sample
from tunesmith.data.batches import collate
from tunesmith.data.kinds import Message
from tunesmith.errors import RecipeError
from tunesmith.evaluate.preference import PreferenceResult
from tunesmith.evaluate.report_preference import preference_section
from tunesmith.model.load import load_backbone
from tunesmith.model.packing import Layout
from tunesmith.model.score import ScoreModel
from tunesmith.rollout.rewards import Completed
from tunesmith.rundir import RunDir
from tunesmith.stages.finals import open_tuned
from tunesmith.stages.rewarding import run_score

Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """(folder, result) of one reward run on pairs."""
    folder = make_folder(tmp_path_factory.mktemp("reward"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        yield folder, api.train(recipe("reward"), run="rm")


def answer(row: dict[str, str], which: str) -> Completed:
    """A row's answer as rewards are given it."""
    return Completed(row["prompt"], row[which], messages=(Message("user", row["prompt"]),))


def test_it_learns_what_was_preferred_and_says_how_surely(made: Made) -> None:
    result = made[1]
    assert result["before"]["accuracy"]["value"] < 0.8 < result["after"]["accuracy"]["value"]
    low, high = (result["after"]["accuracy"][end] for end in ("low", "high"))
    assert low < result["after"]["accuracy"]["value"] <= high and result["after"]["accuracy"]["n"] == 16
    assert sum(entry["n"] for entry in result["reliability"]["bins"]) == 16
    assert 0 <= result["reliability"]["error"] <= 0.5
    page = (made[0] / "runs/rm/report.html").read_text(encoding="utf-8")
    assert "Can its preferences be trusted?" in page and "24 demonstrations average" in page


def test_demonstrations_average_zero_and_the_order_stays(made: Made) -> None:
    folder, result = made
    tuned = open_tuned(RunDir(folder / "runs/rm"))
    assert isinstance(tuned.model, ScoreModel)
    score = run_score(RunDir(folder / "runs/rm"), label=None)
    better = [answer(row, "chosen") for row in pairs(24)]
    shifted = np.asarray(score(better))
    assert abs(shifted.mean()) < 1e-4 and shifted.std() > 1e-3
    assert result["calibration"]["demonstrations"] == 24 and abs(result["calibration"]["shift"]) > 1e-3
    batch = one_by_one(rows(3))[0]
    with torch.no_grad():
        whole = tuned.model(batch).scores
        tuned.model.set_shift(0.0)
        raw = tuned.model(batch).scores
    torch.testing.assert_close(raw - whole, torch.full_like(raw, result["calibration"]["shift"]))


def test_calibration_can_be_left_out_or_done_on_given_demonstrations(made: Made) -> None:
    folder = made[0]
    plain = api.train(recipe("reward", train={"epochs": 1}, reward_model={"calibrate": False}), run="plain")
    assert "calibration" not in plain
    shown = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs(5)]
    write(folder / "shown.jsonl", shown)
    found = api.train(
        recipe("reward", train={"epochs": 1}, reward_model={"demonstrations": "shown.jsonl"}), run="shown"
    )
    assert found["calibration"]["demonstrations"] == 5
    score = run_score(RunDir(folder / "runs/shown"), label=None)
    assert abs(np.mean(score([answer(row, "completion") for row in shown]))) < 1e-4


def test_an_evaluation_gives_a_score_for_every_answer(made: Made) -> None:
    found = api.evaluate("rm", "more.jsonl")
    assert found["metrics"]["accuracy"] == made[1]["after"]["accuracy"]
    assert len(found["predictions"]) == 32 and {row["rank"] for row in found["predictions"]} == {1, 2}
    first = found["predictions"][0]
    score = run_score(RunDir(made[0] / "runs/rm"), label=None)
    row = pairs(1, 100)[0]
    assert first["score"] == pytest.approx(score([answer(row, "chosen")])[0], abs=1e-5)


def test_a_reward_model_has_no_answer_of_its_own(made: Made) -> None:
    with pytest.raises(RecipeError, match="is a reward model"):
        api.predict("rm", ["hello"])


def test_rankings_are_learned_with_their_ties_left_out(made: Made) -> None:
    data = {"train": "rankings.jsonl", "eval": None, "split": {"eval": 0.25}}
    result = api.train(recipe("reward", data=data, train={"epochs": 6}), run="ranked")
    assert result["after"]["loss"]["n"] == 2
    assert result["after"]["loss"]["value"] < result["before"]["loss"]["value"]
    assert sum(entry["n"] for entry in result["reliability"]["bins"]) == 10, "five untied pairs of each prompt"


def test_a_run_cut_in_two_is_the_run_that_was_not(made: Made) -> None:
    folder = made[0]
    how = recipe("reward", train={"epochs": 2, "save_every": 1})
    api.train(how, run="whole")
    start_and_cut(how, "cut", 5)
    api.resume("cut")
    assert left(folder / "runs/whole") == left(folder / "runs/cut")
    other = api.train({**how, "seed": 7}, run="other")
    assert other["after"] and left(folder / "runs/other") != left(folder / "runs/cut"), "control: another seed"


def test_a_pair_of_one_text_is_dropped_and_counted(made: Made) -> None:
    same = {"prompt": "which?", "chosen": "this one", "rejected": "this one"}
    write(made[0] / "same.jsonl", [*pairs(6), same])
    lines: list[str] = []
    api.train(recipe("reward", data={"train": "same.jsonl"}, train={"epochs": 1}), run="same", say=lines.append)
    assert any("dropped nothing to compare: 1" in line for line in lines)


def test_a_rows_margin_is_read_and_asked_for(made: Made) -> None:
    """Before training all gaps are near 0, so a margin of 2 for half the pairs costs what it costs there."""
    write(made[0] / "margins.jsonl", with_margins(pairs(16, 100), 2.0))
    lines: list[str] = []
    data = {"eval": "margins.jsonl"}
    result = api.train(recipe("reward", data=data, train={"steps": 1, "epochs": None}), run="far", say=lines.append)
    plain = made[1]["before"]["loss"]["value"]
    assert result["before"]["loss"]["value"] == pytest.approx((plain + np.log1p(np.exp(2.0))) / 2, abs=0.2)
    assert result["before"]["loss"]["value"] > plain + 0.4


def rows(num: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    lengths = (5, 17, 2, 9, 30)[:num]
    return [Sample(draw.integers(7, 300, n).astype(np.int32), np.zeros(n, np.float32)) for n in lengths]


def one_by_one(samples: list[Sample]) -> list[Batch]:
    return [collate([sample]) for sample in samples]


def scores(model: ScoreModel, batches: list[Batch]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).scores[:, 0] for batch in batches])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("layout", list(Layout))
def test_a_score_is_read_at_the_last_real_token_whatever_stands_beside_it(family: str, layout: Layout) -> None:
    model = ScoreModel(tiny_classifier(family, labels=1))
    samples = rows(5)
    alone = scores(model, one_by_one(samples))
    model.layout = layout
    if layout is not Layout.PACKED:
        model.backbone.set_attn_implementation("sdpa")
    together = scores(model, [collate(samples)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    mixed = list(range(5))
    random.Random(1).shuffle(mixed)
    shuffled = scores(model, [collate([samples[i] for i in mixed])])
    torch.testing.assert_close(shuffled, alone[mixed], atol=2e-5, rtol=1e-4)
    longer = [Sample(np.append(s.ids, np.int32(9)), np.zeros(len(s) + 1, np.float32)) for s in samples]
    assert (scores(model, [collate(longer)]) - alone).abs().min() > 1e-4, "control: one more real token is seen"


def test_padding_on_either_side_gives_the_packed_score() -> None:
    """What transformers itself says of padded rows; the pad token stands left or right."""
    backbone = tiny_classifier("llama", labels=1)
    samples = rows(5)
    packed = scores(ScoreModel(backbone), [collate(samples)])
    backbone.set_attn_implementation("sdpa")
    longest = max(len(sample) for sample in samples)
    for side in ("left", "right"):
        ids, mask = torch.zeros(5, longest, dtype=torch.long), torch.zeros(5, longest, dtype=torch.long)
        for i, sample in enumerate(samples):
            part = slice(longest - len(sample), None) if side == "left" else slice(len(sample))
            ids[i, part], mask[i, part] = torch.from_numpy(sample.ids.astype(np.int64)), 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            padded = backbone(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
        torch.testing.assert_close(padded, packed, atol=2e-5, rtol=1e-4)


def test_a_shift_goes_with_the_model_that_is_saved(tmp_path: Path) -> None:
    model = ScoreModel(tiny_classifier("llama", labels=1))
    model.set_shift(2.5)
    again = ScoreModel(load_backbone(save_tiny(model.backbone, tmp_path / "rm"), "classifier"))
    batch = collate(rows(3))
    torch.testing.assert_close(scores(again, [batch]), scores(model, [batch]))
    assert json.loads((tmp_path / "rm/config.json").read_text())["reward_shift"] == 2.5


def test_a_base_stored_with_a_tied_head_alone_gives_a_reward_model_its_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    causal = tiny_causal("llama", tie_word_embeddings=True)
    folder = save_tiny(causal, tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = load_backbone(folder, "classifier", label_names=("reward",))
    assert torch.equal(backbone.get_input_embeddings().weight, causal.get_input_embeddings().weight)


def test_reliability_finds_a_model_that_is_too_sure() -> None:
    draw = np.random.default_rng(0)
    true = np.abs(draw.normal(size=4000)) * 2
    gaps = np.where(draw.random(4000) < 1 / (1 + np.exp(-true)), true, -true)

    def error(sureness: float) -> float:
        n = np.arange(4000)
        found = PreferenceResult(np.zeros(0), n[:0], (), gaps * sureness, gaps, n, np.ones(4000))
        return float(found.reliability()["error"])

    assert error(1.0) < 0.03 < 0.08 < error(4.0)


@pytest.mark.parametrize("broken", [None, 3, {"bins": 3}, {"bins": [None, {"n": "many"}]}])
def test_a_damaged_reliability_table_is_left_out_of_the_page(broken: object) -> None:
    assert not preference_section({"reliability": broken, "calibration": {"shift": "far"}})
    row = {"n": 5, "predicted": 0.7, "observed": 0.8, "low": 0.4, "high": 0.9}
    shown = preference_section({"reliability": {"bins": [row], "error": "<script>"}})
    assert "0.7000" in shown and "<script>" not in shown
