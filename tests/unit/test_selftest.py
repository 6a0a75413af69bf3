"""selftest passes on sound models of every kind, and each of its checks sees the fault that it is there for."""

from __future__ import annotations

import json

import pytest
from tests.tiny import save_tiny, tiny_causal, tiny_classifier

from tunesmith import api, cli
from tunesmith.engine.state import TrainState
from tunesmith.model import attention, lora
from tunesmith.rollout import sampler


def rows(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


@pytest.fixture
def sft(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    made = [{"prompt": f"say {i} and {i + 1}", "completion": f"{i} then {'more ' * (i % 4)}{i + 1}"} for i in range(24)]
    base = save_tiny(tiny_causal("llama"), tmp_path / "base")
    data = {"train": rows(tmp_path / "rows.jsonl", made)}
    return {"stage": "sft", "base": str(base), "data": data, "tune": {"method": "lora", "rank": 4}}


@pytest.fixture
def classify(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    made = [{"text": f"row {i} is {'good ' * (1 + i % 3)}", "label": ["no", "yes"][i % 2]} for i in range(24)]
    base = save_tiny(tiny_classifier("bert"), tmp_path / "base")
    return {"stage": "classify", "base": str(base), "data": {"train": rows(tmp_path / "rows.jsonl", made)}}


def failed(result):
    return [check["name"] for check in result["checks"] if not check["passed"]]


def tried(result):
    return [check["name"] for check in result["checks"] if check["error"] is not None]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_law_holds_on_a_sound_language_model(sft, method):
    result = api.selftest(sft | {"tune": {"method": method}})
    assert result["passed"] and failed(result) == []
    assert len(tried(result)) >= (6 if method == "lora" else 5), result


def test_every_law_holds_on_a_sound_classifier(classify):
    result = api.selftest(classify)
    assert result["passed"] and "a score is the same beside others" in tried(result)


def test_control_a_leak_between_segments_is_seen(sft, monkeypatch):
    """The leak begins after the model has been verified at load, as a wrong kernel on some machine would."""
    real, calls = attention.packed_attention, []

    def leaking(query, key, value, lengths, **options):
        calls.append(len(lengths))
        whole = (sum(lengths),) if len(lengths) >= 8 else lengths  # eight rows, perhaps one that rounds
        return real(query, key, value, whole, **options)

    monkeypatch.setattr(attention, "packed_attention", leaking)
    assert "packed is one by one" in failed(api.selftest(sft)) and max(calls) >= 8


def test_control_a_wrong_merge_is_seen(sft, monkeypatch):
    real = lora.LoraLinear.merged_matrix
    monkeypatch.setattr(lora.LoraLinear, "merged_matrix", lambda layer: real(layer) * 1.01)
    assert failed(api.selftest(sft)) == ["merged is unmerged"]


def test_control_a_sampler_at_another_temperature_is_seen(sft, monkeypatch):
    real = sampler.next_tokens
    monkeypatch.setattr(sampler, "next_tokens", lambda logits, *rest, **more: real(logits / 2, *rest, **more))
    assert failed(api.selftest(sft)) == ["the sampler's log-probs are the trainer's"]


def test_control_a_lost_optimizer_is_seen(sft, monkeypatch):
    real = TrainState.restore

    def forgetful(state, tensors, meta):
        real(state, tensors, meta)
        state.optimizer.state.clear()

    monkeypatch.setattr(TrainState, "restore", forgetful)
    assert failed(api.selftest(sft)) == ["a resumed run is an undisturbed one"]


def test_the_command_prints_a_table_and_its_exit_code_says_it(sft, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(sft), encoding="utf-8")
    assert cli.main(["selftest", str(recipe)]) == 0
    assert "every law holds" in capsys.readouterr().out
    monkeypatch.setattr(lora.LoraLinear, "merged_matrix", lambda layer: lora.weight_matrix(layer.base).float())
    assert cli.main(["selftest", str(recipe), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert not (tmp_path / "runs").exists()
