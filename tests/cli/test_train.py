"""`tunesmith train` as a user sees it: every stage, every way of training, result on stdout, talk on stderr."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file
from tests.cli.conftest import recipe_for, write_rows
from tests.tiny import save_tiny
from transformers import AutoConfig, AutoModel

RESULT = {
    "run", "stage", "before", "after", "trainable_parameters", "total_parameters", "seconds", "peak_memory_bytes",
    "tokens_per_second",
}  # fmt: skip


@pytest.mark.parametrize("stage", ["classify", "sft", "pretrain", "mlm"])
def test_each_stage_trains_and_reports(stage, run, write, work):
    done = run("train", write(stage), "--run", "first", "--json")
    assert done.code == 0, done.err
    result = done.json
    assert set(result) >= RESULT and result["stage"] == stage and result["run"] == "first"
    assert done.out.count("\n") == 1
    assert result["before"].keys() == result["after"].keys() and "loss" in result["before"]
    for entry in result["after"].values():
        assert set(entry) == {"value", "low", "high", "n"}
    assert result["before"]["loss"]["value"] != result["after"]["loss"]["value"]
    folder = work / "runs" / "first"
    assert json.loads((folder / "result.json").read_text()) == result
    for name in ("report.html", "model_card.md", "metrics.jsonl", "recipe.yaml", "origins.json", "before.json"):
        assert (folder / name).stat().st_size > 0, name
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


METHODS = {
    "full": {"method": "full"},
    "last_layers": {"method": "last_layers", "layers": 1},
    "lora": {"method": "lora", "rank": 2},
    "targets": {"method": "lora", "rank": 2, "targets": ["query"]},
    "rslora": {"method": "lora", "rank": 2, "rank_stabilized": True},
    "dora": {"method": "lora", "rank": 2, "dora": True},
    "pissa": {"method": "lora", "rank": 2, "init": "pissa"},
    "train_also": {"method": "lora", "rank": 2, "train_also": ["word_embeddings"]},
    "bias": {"method": "bias"},
    "peft": {"method": "peft", "peft": {"peft_type": "IA3", "target_modules": ["key", "value", "dense"],
                                        "feedforward_modules": ["dense"]}},
    "head": {"method": "head"},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_each_way_of_training_trains_and_is_opened_again(name, run, write, work):
    recipe = write("classify", tune={"rank": None} | METHODS[name])
    (work / recipe).write_text((work / recipe).read_text().replace("  rank: null\n", ""))
    done = run("train", recipe, "--run", name, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert 0 < result["trainable_parameters"] <= result["total_parameters"]
    assert (result["trainable_parameters"] == result["total_parameters"]) == (name == "full")
    tensors = result["tensors"]
    assert tensors["trainable"] == tensors["changed"] > 0 == tensors["frozen_changed"]
    again = run("eval", name, "--data", "labels-eval.jsonl", "--json")
    assert again.code == 0, again.err
    for metric, entry in result["after"].items():
        assert again.json["metrics"][metric]["value"] == pytest.approx(entry["value"], abs=1e-9), metric


def test_a_run_that_changes_no_weight_says_so(run, write, work):
    done = run("train", write("classify"), "train.learning_rate=1e-60", "--run", "idle", "--json")
    assert done.code == 0 and "no weight differs from the start" in done.err
    assert done.json["tensors"]["changed"] == 0 < done.json["tensors"]["trainable"]
    assert "0 of" in (work / "runs/idle/report.html").read_text()


def test_lora_plus_gives_b_its_own_rate(run, write, work):
    """With a ratio of 1e-30 the B matrices stay where they began, at zero; with 1 they move."""
    for name, ratio in (("still", 1e-30), ("moves", 1.0)):
        recipe = write("classify", name=f"{name}.yaml", train={"adapter_b_rate_ratio": ratio, "weight_decay": 0.0})
        assert run("train", recipe, "--run", name).code == 0
    largest = {}
    for name in ("still", "moves"):
        tensors = load_file(next((work / "runs" / name / "final").glob("step_*/tensors.safetensors")))
        largest[name] = max(abs(t).max() for key, t in tensors.items() if "lora_B" in key)
    assert largest["still"] < 1e-20 < 1e-6 < largest["moves"]


def test_several_labels_a_row(run, write, work):
    rows = [{"text": f"row number {i}", "labels": ["a"] * (i % 2) + ["b"] * (i % 3 == 0)} for i in range(24)]
    write_rows(work / "many.jsonl", rows)
    write_rows(work / "many-eval.jsonl", [{**row, "text": row["text"] + " more"} for row in rows[:12]])
    data = {"train": "many.jsonl", "eval": "many-eval.jsonl", "multi_label": True}
    done = run("train", write("classify", data=data), "--run", "many", "--json")
    assert done.code == 0, done.err
    assert {"accuracy", "f1", "loss"} <= set(done.json["after"]) and "mcc" not in done.json["after"]
    assert set(done.json["per_class"]) == {"a", "b"}
    answers = run("predict", "many", "row number 3", "--json").json
    assert set(answers[0]["probabilities"]) == {"a", "b"}


def test_overrides_win_and_are_recorded(run, write, work):
    done = run("train", write("classify"), "train.learning_rate=1e-4", "seed=7", "--run", "over", "--json")
    assert done.code == 0, done.err
    origins = json.loads((work / "runs/over/origins.json").read_text())
    assert origins["train.learning_rate"] == "override" and origins["seed"] == "override"
    assert origins["train.epochs"] == "user" and origins["train.schedule"] == "default"
    assert "learning_rate: 0.0001" in (work / "runs/over/recipe.yaml").read_text()


def test_stderr_holds_our_own_words_only(run, write):
    """No progress bars or notes of the libraries below."""
    done = run("train", write("sft", evaluate={"samples": 2}), "--run", "quiet", "--json")
    assert done.code == 0
    for noise in ("it/s", "Loading weights", "Writing model", "Warning", "huggingface", "[transformers]"):
        assert noise not in done.err, done.err


def test_metrics_on_generated_text_when_asked(run, write):
    recipe = write("sft", evaluate={"generate": {"max_tokens": 4, "examples": 4}, "samples": 2})
    done = run("train", recipe, "--run", "said", "--json")
    assert done.code == 0, done.err
    assert {"exact_match", "rouge_l", "bleu", "share_ended"} <= set(done.json["after"])


def test_a_test_set_is_reported_apart(run, write, work):
    write_rows(work / "extra.jsonl", [{"text": f"the extra {i} was good", "label": "yes"} for i in range(6)])
    done = run("train", write("classify", data={"test": "extra.jsonl"}), "--run", "apart", "--json")
    assert done.code == 0, done.err
    assert done.json["test"]["after"]["loss"]["n"] == 6 and done.json["after"]["loss"]["n"] == 8
    assert "Test set, used once" in (work / "runs/apart/report.html").read_text()


def test_each_task_of_a_mix_has_its_own_metrics(run, write, work):
    (work / "held").mkdir()
    for name in ("texts-eval.jsonl", "more-eval.jsonl"):
        write_rows(work / "held" / name, [{"text": f"{name} holds row {i} of another kind"} for i in range(4)])
    mix = [{"path": "texts.jsonl", "weight": 2.0}, {"path": "pairs-as-text.jsonl", "weight": 1.0}]
    write_rows(work / "pairs-as-text.jsonl", [{"text": f"question {i} and its answer"} for i in range(12)])
    recipe = recipe_for("pretrain") | {"data": {"mix": mix, "eval": "held"}}
    (work / "mix.json.yaml").write_text(json.dumps(recipe))
    done = run("train", "mix.json.yaml", "--run", "mixed", "--json")
    assert done.code == 0, done.err
    found = done.json["by_source"]
    assert set(found) == {"texts-eval.jsonl", "more-eval.jsonl"}
    whole = done.json["after"]["loss"]
    assert sum(part["after"]["loss"]["n"] for part in found.values()) == whole["n"]
    values = [part["after"]["loss"]["value"] for part in found.values()]
    assert min(values) < whole["value"] < max(values)


@pytest.mark.parametrize("stage", ["sft", "classify"])
def test_what_is_written_names_rows_without_the_folders_of_this_machine(stage, run, write, work):
    data = {"classify": "labels", "sft": "pairs"}[stage]
    with (work / f"{data}.jsonl").open("a") as file:
        file.write((work / f"{data}.jsonl").read_text().splitlines()[0] + "\nnot json\n")
    recipe = write(stage, data={"on_bad_row": "skip"}, evaluate={"samples": 2})
    done = run("train", recipe, "--run", "first")
    assert done.code == 0, done.err
    folder = work / "runs" / "first"
    written = {
        path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".jsonl", ".html", ".md")
    }
    assert json.loads(written["inputs.json"])["recipe_folder"] == str(work)
    for name in written.keys() - {"inputs.json"}:
        assert str(work) not in written[name], name
    assert not any(str(work) in note for note in json.loads(written["inputs.json"])["notes"])
    assert f"{data}.jsonl:1 = {data}.jsonl:25" in written["result.json"]
    assert f'"{data}.jsonl:26"' in written["bad_rows.jsonl"] and f"{data}-eval.jsonl:1" in written["before.json"]


def test_a_masked_base_without_its_head_trains_a_new_one_aloud_or_not_at_all(run, write, work):
    config = AutoConfig.from_pretrained(work / "bert")
    save_tiny(AutoModel.from_config(config, add_pooling_layer=False), work / "body")
    whole = run("train", write("mlm"), "base=bert", "--run", "whole")
    assert whole.code == 0 and "random head" not in whole.err
    done = run("train", write("mlm"), "base=body", "tune={method: full}", "--run", "new")
    assert done.code == 0 and "stored without the head" in done.err
    report = (work / "runs" / "new" / "report.html").read_text()
    assert "the loss of a random head" in report
    frozen = run("train", write("mlm"), "base=body", "tune={method: lora, rank: 2}", "--run", "frozen")
    assert frozen.code == 2 and "would not be trained" in frozen.err and not (work / "runs" / "frozen").exists()
    also = run("train", write("mlm"), "base=body", "tune={method: lora, rank: 2, train_also: [head]}", "--run", "also")
    assert also.code == 0, also.err
    assert run("eval", "also", "--data", "texts-eval.jsonl", "--json").code == 0
    bare = run("eval", "body", "--data", "texts-eval.jsonl", "--stage", "mlm")
    assert bare.code == 2 and "stored without the head" in bare.err
