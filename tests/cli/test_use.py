"""What one does with a run: eval, chat, predict, export, runs, check, and the same from Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from io import StringIO

import pytest
from safetensors.numpy import load_file, save_file
from tests.cli.conftest import labelled, recipe_for, write_rows

import tunesmith
from tunesmith.recipe import load_recipe


@pytest.fixture
def labels_run(work):
    tunesmith.train(recipe_for("classify", evaluate={"sentences": ["the cat was good"]}), run="labels")
    return "labels"


@pytest.fixture
def answers_run(work):
    tunesmith.train(recipe_for("sft", data={"template": "Q: {prompt}\n\nA: {completion}"}), run="answers")
    return "answers"


def test_eval_of_a_run_gives_what_the_run_measured(labels_run, run, work):
    done = run("eval", labels_run, "--data", "labels-eval.jsonl", "--json")
    assert done.code == 0, done.err
    result = tunesmith.runs_show(labels_run)
    assert done.json["metrics"] == result["after"]
    assert {row["predicted"] for row in done.json["predictions"]} <= {"yes", "no"}
    assert "accuracy" in run("eval", labels_run, "--data", "labels-eval.jsonl").out


@pytest.mark.parametrize(("stage", "data"), [("classify", "labels"), ("sft", "pairs")])
def test_eval_of_a_run_in_bfloat16_gives_what_the_run_measured(stage, data, run, work):
    """Opened again, its norms, rotary embeddings and weights are in the types they were measured in."""
    tunesmith.train(recipe_for(stage, precision="bfloat16"), run="narrow")
    done = run("eval", "narrow", "--data", f"{data}-eval.jsonl", "--json")
    assert done.json["metrics"]["loss"] == tunesmith.runs_show("narrow")["after"]["loss"]


def test_eval_of_a_bare_model(run, work):
    """What it is measured as follows from what it was built as and from the data."""
    for base, data, stage in (
        ("./llama", "pairs", "sft"),
        ("./llama", "texts", "pretrain"),
        ("./bert", "texts", "mlm"),
    ):
        done = run("eval", base, "--data", f"{data}.jsonl", "--json")
        assert done.code == 0, done.err
        assert done.json["stage"] == stage and done.json["metrics"]["loss"]["n"] == 24


def test_a_bare_model_and_a_run_at_step_0_agree(run, work):
    trained = tunesmith.train(recipe_for("pretrain"), run="first")
    done = run("eval", "./llama", "--data", "texts-eval.jsonl", "--json")
    bare, before = done.json["metrics"]["loss"]["value"], trained["before"]["loss"]["value"]
    assert bare == pytest.approx(before, rel=2e-2)  # the run measured in float32, this in what the machine prefers


def test_predict_one_text_a_file_and_standard_input(labels_run, run, work, monkeypatch):
    rows = labelled(5, 50)
    write_rows(work / "ask.jsonl", rows)
    (work / "ask.txt").write_text("".join(row["text"] + "\n" for row in rows))
    one = run("predict", labels_run, rows[0]["text"], "--json").json
    assert set(one[0]) == {"text", "answer", "probabilities"} and one[0]["answer"] in ("yes", "no")
    assert sum(one[0]["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    by_file = run("predict", labels_run, "--file", "ask.jsonl", "--json").json
    assert [row["text"] for row in by_file] == [row["text"] for row in rows]
    assert run("predict", labels_run, "--file", "ask.txt", "--json").json == by_file
    monkeypatch.setattr(sys, "stdin", StringIO((work / "ask.txt").read_text()))
    assert run("predict", labels_run, "--json").json == by_file
    plain = run("predict", labels_run, "--file", "ask.txt")
    assert plain.out.splitlines() == [row["answer"] for row in by_file]


def test_predict_says_what_it_needs(labels_run, run, work, monkeypatch):
    write_rows(work / "odd.jsonl", [{"a": "x", "b": "y"}])
    done = run("predict", labels_run, "--file", "odd.jsonl")
    assert done.code == 2 and "odd.jsonl:1" in done.err and "a, b" in done.err and "--column" in done.err
    assert run("predict", labels_run, "--file", "odd.jsonl", "--column", "b").code == 0
    assert run("predict", labels_run, "text", "--file", "odd.jsonl").code == 2
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    assert "empty" in run("predict", labels_run).err


def test_chat_takes_a_prompt_or_a_pipe(answers_run, run, monkeypatch):
    said = run("chat", answers_run, "--prompt", "what is 3 plus 1?", "--max-tokens", "5", "--json")
    assert said.code == 0, said.err
    assert said.json["prompt"] == "what is 3 plus 1?" and isinstance(said.json["completion"], str)
    monkeypatch.setattr(sys, "stdin", StringIO("what is 3 plus 1?\n"))
    piped = run("chat", answers_run, "--max-tokens", "5", "--json")
    assert piped.json == said.json
    warm = [run("chat", answers_run, "--prompt", "x", "--temperature", "1", "--seed", s).out for s in "0010"]
    assert warm[0] == warm[1] == warm[3] != warm[2]


def test_chat_and_training_see_the_same_prompt(answers_run, work):
    """The template of the run, without its answer; the ids are those of the encoded row."""
    from tunesmith.data.records import read_records
    from tunesmith.rundir import open_run
    from tunesmith.stages.finals import open_tuned
    from tunesmith.stages.prepare import make_encoder
    from tunesmith.stages.using import encode_prompt

    tuned = open_tuned(open_run(answers_run))
    record = next(iter(read_records("pairs.jsonl", stage="sft", template=tuned.template)))
    sample = make_encoder(tuned.recipe, tuned.tokenizer, (), 256)(record)[0]
    first = int((sample.weights > 0).argmax())
    assert encode_prompt(tuned, "what is 0 plus 1?") == sample.ids[:first].tolist()
    assert "Q: what is 0 plus 1?" in tuned.tokenizer.decode(sample.ids[:first])


FRESH = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
kind, folder, base = sys.argv[1:4]
if kind == "merged":
    model = AutoModelForSequenceClassification.from_pretrained(folder)
else:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
model.eval()
answers = []
for line in open("ask.txt"):
    with torch.no_grad():
        logits = model(**tokenizer(line.rstrip("\\n"), return_tensors="pt")).logits[0]
    answers.append(logits.softmax(-1).tolist())
print(json.dumps(answers))
"""


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_an_export_answers_the_same_in_a_fresh_process_of_other_libraries(kind, labels_run, run, work):
    """Row for row what `predict` says, with only the exported folder and the base at hand."""
    done = run("export", labels_run, "--to", "out", "--format", kind, "--json")
    assert done.code == 0, done.err
    assert done.json["format"] == kind and done.json["bytes"] > 0
    lines = [row["text"] for row in labelled(20, 40)]
    (work / "ask.txt").write_text("".join(line + "\n" for line in lines))
    ours = run("predict", labels_run, "--file", "ask.txt", "--json").json
    fresh = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, kind, "out", "bert"], cwd=work, capture_output=True, text=True
    )
    assert fresh.returncode == 0, fresh.stderr
    theirs = json.loads(fresh.stdout.splitlines()[-1])
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine["probabilities"].values()) == pytest.approx(other, abs=2e-4)
    again = run("export", labels_run, "--to", "out", "--format", kind)
    assert again.code == 2 and "not empty" in again.err


def test_an_export_that_cannot_be(labels_run, run, work):
    assert "adapter or merged" in run("export", labels_run, "--to", "out", "--format", "gguf").err
    tunesmith.train(recipe_for("mlm") | {"tune": {"method": "bias"}}, run="b")
    done = run("export", "b", "--to", "out")
    assert done.code == 2 and "--format merged" in done.err and not (work / "out").exists()


def test_runs_are_listed_shown_and_compared(work, run):
    for name, rate in (("one", 1e-3), ("two", 2e-3)):
        tunesmith.train(recipe_for("pretrain", train={"learning_rate": rate}), run=name)
    listed = run("runs", "list", "--json").json
    assert [row["run"] for row in listed] == ["one", "two"] and all(row["finished"] for row in listed)
    assert run("runs", "--json").json == listed
    assert run("runs", "show", "one", "--json").json["run"] == "one"
    found = run("runs", "diff", "one", "two", "--json").json
    assert found["recipe"] == {"train.learning_rate": [1e-3, 2e-3]}
    assert "loss" in found["after"]
    assert "learning_rate" in run("runs", "diff", "one", "two").out


def test_check_of_a_recipe_shows_the_first_row_as_text_tokens_and_ids(work, run, write):
    done = run("check", write("sft"), "--json")
    assert done.code == 0, done.err
    found = done.json
    first = found["first_row"]
    assert "what is 0 plus 1?" in first["text"] and len(first["tokens"]) == len(first["ids"]) == len(first["trained"])
    assert first["origin"] == "pairs.jsonl:1" and any(first["trained"]) and not all(first["trained"])
    assert found["round_trip"] is True
    assert found["train"]["samples"] == 24 and found["eval"]["samples"] == 8
    assert found["trainable_parameters"] < found["total_parameters"]
    assert not (work / "runs").exists(), "nothing is written"


def test_check_of_a_data_file_says_what_it_is(work, run):
    found = run("check", "pairs.jsonl", "--json").json
    assert found["stages"]["sft"]["records"] == 24
    assert "prompt" in run("check", "pairs.jsonl").out


def test_finetune_in_five_lines(work):
    result = tunesmith.finetune(base="llama", data="pairs.jsonl", stage="sft", epochs=1, rank=2, run="five")
    assert set(result["before"]) == set(result["after"])
    recipe = load_recipe(work / "runs/five/recipe.yaml").recipe
    assert recipe.tune.rank == 2 and recipe.train.epochs == 1 and recipe.data.split.eval == 0.1
    sizes = json.loads((work / "runs/five/inputs.json").read_text())["data"]
    assert sizes["train"]["samples"] + sizes["eval"]["samples"] == 24


def test_finetune_takes_sections_and_refuses_what_does_not_exist(work):
    data = {"train": "pairs.jsonl", "eval": "pairs-eval.jsonl"}
    result = tunesmith.finetune("llama", data, "sft", "full", train={"steps": 1}, precision="float32", samples=0)
    assert result["method"] == "full" and "split" not in (result.get("data") or {})
    with pytest.raises(tunesmith.RecipeError, match="did you mean"):
        tunesmith.finetune("llama", data, "sft", lerning_rate=1e-4)


def test_sentences_are_answered_before_and_after(labels_run, work):
    rows = [json.loads(line) for line in (work / "runs/labels/samples.jsonl").read_text().splitlines()]
    assert rows[-1]["prompt"] == "the cat was good" and {rows[-1]["before"], rows[-1]["after"]} <= {"yes", "no"}


def test_the_card_leaves_no_field_unsaid(labels_run, work):
    card = (work / "runs/labels/model_card.md").read_text()
    assert not re.search(r"\|\s*(None|null|nan|)\s*\|\s*$", card, re.M | re.I)
    for part in ("bert", "labels.jsonl", "seed", "torch", "Intended use and limits", "not stated by the base"):
        assert part in card
    assert str(work) not in card and str(work) not in (work / "runs/labels/report.html").read_text()


def test_recall_of_each_label_is_in_the_report(labels_run, work):
    result = tunesmith.runs_show(labels_run)
    assert set(result["per_class"]) == {"no", "yes"}
    assert result["per_class"]["yes"]["before"]["n"] == 4
    assert "Label yes:" in (work / "runs/labels/report.html").read_text()


def test_a_run_whose_base_has_changed_is_refused(labels_run, run, work):
    """The same shapes with other numbers would load without a word."""
    target = (work / "bert").resolve()
    (work / "bert").unlink()
    shutil.copytree(target, work / "bert")
    assert run("predict", labels_run, "the cat").code == 0, "a copy is the same base"
    tensors = load_file(work / "bert/model.safetensors")
    name = next(key for key in tensors if key.endswith("word_embeddings.weight"))
    save_file(tensors | {name: tensors[name] * 1.01}, work / "bert/model.safetensors", metadata={"format": "pt"})
    done = run("predict", labels_run, "the cat")
    assert done.code == 2 and "bert" in done.err and "put them back" in done.err


def test_nothing_is_sent_to_the_hub_unless_named(labels_run, run, work, monkeypatch):
    sent = []

    class Hub:
        def create_repo(self, name, **options):
            sent.append((name, options["private"]))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            sent.append(sorted(path.name for path in folder_path.iterdir()))
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert run("export", labels_run, "--to", "quiet").code == 0 and sent == []
    done = run("export", labels_run, "--to", "loud", "--push-to", "me/mine")
    assert done.code == 0 and "hub/me/mine" in done.err
    assert sent[0] == ("me/mine", True) and "adapter_model.safetensors" in sent[1] and "README.md" in sent[1]
    readme = (work / "loud/README.md").read_text()
    assert readme.startswith('---\nlibrary_name: "peft"\nbase_model: "bert"\n---\n') and "Results" in readme


def test_a_hub_that_refuses_leaves_the_export(labels_run, run, work, monkeypatch):
    class Hub:
        def create_repo(self, name, **options):
            raise OSError("secret hf_CANARY")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    done = run("export", labels_run, "--to", "out", "--push-to", "me/mine")
    assert done.code == 2 and "me/mine" in done.err and "CANARY" not in done.err
    assert (work / "out/adapter_model.safetensors").is_file()
