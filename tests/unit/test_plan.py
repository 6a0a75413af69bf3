"""The plan counts what a real step holds, from shapes alone."""

from __future__ import annotations

import json

import pytest
import torch
from tests.tiny import save_tiny, tiny_causal, tiny_classifier

from tunesmith import api, cli
from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.model.load import load_backbone
from tunesmith.model.packing import flat_hidden
from tunesmith.model.trainable import TrainableSpec, make_trainable
from tunesmith.plan import shapes
from tunesmith.plan.devices import find_device
from tunesmith.plan.memory import MemoryPlan, mixed_precision_states, plan_memory

LENGTHS = (5, 17, 9)
SPECS = {"full": TrainableSpec("full"), "lora": TrainableSpec("lora", rank=4), "last": TrainableSpec("last_layers")}


def really_kept(base, kind, spec, *, bf16):
    """Bytes that a real forward keeps for its backward, each storage once."""
    from tunesmith.model import attention

    model = load_backbone(base, kind)
    model.set_attn_implementation(attention.NAME)
    make_trainable(model, spec)
    model.train()
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    batch = collate([Sample(torch.arange(7, 7 + n).numpy().astype("int32"), torch.zeros(n).numpy()) for n in LENGTHS])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        flat_hidden(model, batch, causal=kind == "causal", offset=shapes.position_offset(model))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_kept_bytes_are_those_of_a_real_forward(tmp_path, family, method):
    kind = "classifier" if family == "bert" else "causal"
    base = save_tiny(tiny_classifier("bert") if family == "bert" else tiny_causal(family), tmp_path / "base")
    for bf16 in (False, True):
        found = shapes.step_shape(str(base), kind, SPECS[method], LENGTHS, 20, bf16=bf16)
        real = really_kept(base, kind, SPECS[method], bf16=bf16)
        assert found.kept_bytes == pytest.approx(real, rel=0.02), (family, method, bf16)


def test_counts_are_those_of_the_trained_model(tmp_path):
    base = save_tiny(tiny_causal("llama"), tmp_path / "base")
    trained = make_trainable(load_backbone(base, "causal"), SPECS["lora"])
    found = shapes.step_shape(str(base), "causal", SPECS["lora"], LENGTHS, 20, bf16=False)
    assert (found.trainable, found.parameters) == (trained.trainable, trained.total)


def test_ten_billion_parameters_in_mixed_precision_take_160_gb():
    assert mixed_precision_states(10_000_000_000) == (20_000_000_000, 20_000_000_000, 120_000_000_000)


def some_plan(**changes):
    shape = shapes.StepShape(1000, 100, 5000, 10, 20, (50, 8, False), 16, 4000)
    given = {"num_tokens": 10, "num_targets": 4, "file_bytes": 2000, "runtime": 0, "optimizer": "adamw", "bf16": False}
    return plan_memory(shape, **(given | changes))


def test_the_lines_add_up_and_the_optimizer_is_one_of_them():
    found = some_plan()
    assert (found.weights, found.gradients, found.optimizer, found.activations) == (4000, 400, 800, 5000)
    assert found.peak == 4000 + 400 + 800 + 5000 + max(found.head, found.working)
    assert some_plan(optimizer="sgd").peak == found.peak - 800


def test_reading_the_weights_can_be_the_peak():
    assert MemoryPlan(10, 0, 0, 0, 0, 0, 0, 5, 30).peak == 35


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
