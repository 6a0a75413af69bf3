"""The plan counts what a real step holds, from shapes alone."""

from __future__ import annotations

import json

import pytest
import torch
from tests.tiny import save_tiny, tiny_causal, tiny_classifier

from tunesmith import api, cli
from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.model.language import LanguageModel
from tunesmith.model.lean import make_lean
from tunesmith.model.load import load_backbone
from tunesmith.model.score import ScoreModel
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.plan import shapes
from tunesmith.plan.devices import find_device
from tunesmith.plan.live import LiveBytes
from tunesmith.plan.memory import MemoryPlan, mixed_precision_states, plan_memory

LENGTHS = (5, 17, 9)
SPECS = {"full": TrainableSpec("full"), "lora": TrainableSpec("lora", rank=4), "last": TrainableSpec("last_layers")}


def really_held(base, kind, spec, *, bf16):
    """(most bytes of tensors in a real step without an update, its targets)."""
    compute = torch.bfloat16 if bf16 else torch.float32
    backbone = load_backbone(base, kind)
    make_trainable(backbone, spec)
    make_lean(backbone, compute)
    model = (ScoreModel if kind == "classifier" else LanguageModel)(backbone, compute=compute).train()
    rows = [
        Sample(torch.arange(7, 7 + n).int().numpy(), torch.ones(n).index_fill_(0, torch.tensor(0), 0.0).numpy())
        for n in LENGTHS
    ]
    batch = collate(rows)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            out = model(batch)
            (out.scores if kind == "classifier" else out.logprobs).sum().backward()
            del out
    return live.peak, int((batch.weights > 0).sum())


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bytes_of_a_step_are_those_of_a_real_one(tmp_path, family, method, monkeypatch):
    monkeypatch.setattr(shapes, "_update", lambda model, memory: None)
    kind = "classifier" if family == "bert" else "causal"
    base = save_tiny(tiny_classifier("bert") if family == "bert" else tiny_causal(family), tmp_path / "base")
    for bf16 in (False, True):
        real, targets = really_held(base, kind, SPECS[method], bf16=bf16)
        found = shapes.step_shape(str(base), kind, SPECS[method], LENGTHS, targets, bf16=bf16, adam=False)
        assert found.step_bytes == pytest.approx(real, rel=0.06), (family, method, bf16)
        assert 0 < found.kept_bytes < found.step_bytes


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_bytes_and_operations_behind_a_soft_prompt(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(shapes, "_update", lambda model, memory: None)
    base = str(save_tiny(tiny_causal("llama"), tmp_path / "base"))
    spec = TrainableSpec("peft", peft={"peft_type": kind, "num_virtual_tokens": 4})
    real, targets = really_held(base, "causal", spec, bf16=False)
    found = shapes.step_shape(base, "causal", spec, LENGTHS, targets, bf16=False, adam=False)
    assert found.step_bytes == pytest.approx(real, rel=0.06)
    longer = shapes.step_shape(base, "causal", SPECS["lora"], [n + 4 for n in LENGTHS], targets, bf16=False)
    frozen = found.forward_flops / longer.forward_flops
    assert 0.8 < frozen <= 1.0, "virtual tokens are computed like others; a LoRA's own products come on top"


def test_weights_at_rest_are_those_that_training_holds(tmp_path):
    base = save_tiny(tiny_causal("llama"), tmp_path / "base")
    backbone = load_backbone(base, "causal")
    make_trainable(backbone, SPECS["lora"])
    make_lean(backbone, torch.bfloat16)
    own = [*backbone.parameters(), *backbone.buffers()]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    found = shapes.step_shape(str(base), "causal", SPECS["lora"], LENGTHS, 20, bf16=True)
    assert found.weight_bytes == sum(sizes.values())


def test_counts_are_those_of_the_trained_model(tmp_path):
    base = save_tiny(tiny_causal("llama"), tmp_path / "base")
    trained = make_trainable(load_backbone(base, "causal"), SPECS["lora"])
    found = shapes.step_shape(str(base), "causal", SPECS["lora"], LENGTHS, 20, bf16=False)
    assert (found.trainable, found.parameters) == (trained.trainable, trained.total)


def test_ten_billion_parameters_in_mixed_precision_take_160_gb():
    assert mixed_precision_states(10_000_000_000) == (20_000_000_000, 20_000_000_000, 120_000_000_000)


def some_plan(**changes):
    shape = shapes.StepShape(1000, 100, 5000, 300, 6000, 700, 10, 20, 4000)
    given = {"file_bytes": 2000, "runtime": 0, "optimizer": "adamw"}
    return plan_memory(shape, **(given | changes))


def test_the_lines_add_up_and_the_optimizer_is_one_of_them():
    found = some_plan()
    assert (found.weights, found.gradients, found.optimizer, found.activations) == (4000, 400, 800, 5000)
    assert found.peak == 4000 + 800 + 6000 + 700
    assert some_plan(on_cpu=False).peak == found.peak - 700
    assert some_plan(optimizer="sgd").peak == found.peak - 800


def test_reading_the_weights_can_be_the_peak():
    assert MemoryPlan(10, 0, 0, 0, 0, 0, 0, 0, 5, 30).peak == 35


def test_what_steps_make_a_process_hold_is_not_there_while_weights_are_read():
    assert some_plan(first_use=50).peak == some_plan().peak + 50
    assert some_plan(first_use=50, file_bytes=10**6).peak == some_plan(file_bytes=10**6).peak


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) + "\n" for i in range(30)))
    base = save_tiny(tiny_causal("llama"), tmp_path / "base")
    return {"stage": "sft", "base": str(base), "data": {"train": str(rows)}, "tune": {"method": "lora", "rank": 4}}


def test_a_plan_loads_no_weights_and_sets_methods_side_by_side(recipe, monkeypatch):
    monkeypatch.setattr("tunesmith.stages.prepare.load_backbone", None)
    found = api.plan(recipe, price=2.0)
    states = {row["method"]: row["states"] for row in found["methods"]}
    assert states["full"] > states["last_layers=1"] and states["full"] > states["lora rank=16"]
    assert found["fits"] and found["steps"] == 6 and found["memory"]["peak"] > found["memory"]["weights"] > 0
    assert found["price"] == pytest.approx(found["seconds"] / 3600 * 2, abs=1e-4)


def test_what_does_not_fit_is_said_with_what_to_change(recipe, monkeypatch):
    monkeypatch.setattr("tunesmith.stages.planning.available_memory", lambda device: 1000)
    found = api.plan(recipe)
    assert not found["fits"] and len(found["advice"]) == 2


def test_the_command_knows_devices_by_name(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    assert cli.main(["plan", str(path), "--on", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert "sft of" in shown and "RTX 4090" in shown and "fits" in shown
    assert cli.main(["plan", str(path), "--on", "abacus"]) == 2
    assert "H100" in capsys.readouterr().err
    assert find_device("a100-80") is not None
