"""Ways to get a recipe, a base or a data file wrong, each with what the message must say."""

from __future__ import annotations

import json
import shutil

import yaml
from tests.cli.conftest import answered, labelled, recipe_for, write_rows
from tests.tiny import save_tiny, tiny_causal


def put(work, stage, **sections):
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(stage, **sections), sort_keys=False))


def text(work, old, new):
    path = work / "recipe.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def mistyped_key(work):
    put(work, "sft")
    text(work, "learning_rate", "lerning_rate")


def mistyped_section(work):
    put(work, "sft")
    text(work, "tune:", "tuen:")


def missing_base(work):
    put(work, "sft")
    text(work, "base: llama\n", "")


def missing_data(work):
    recipe = recipe_for("sft")
    del recipe["data"]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def wrong_type(work):
    put(work, "sft", train={"epochs": "three"})


def negative(work):
    put(work, "sft", train={"learning_rate": -0.1})


def yaml_broken(work):
    put(work, "sft")
    text(work, "stage: sft", "stage: [sft")


def unknown_stage(work):
    put(work, "sft")
    text(work, "stage: sft", "stage: stf")


def idle_key(work):
    put(work, "sft", tune={"layers": 2})


def encoder_for_sft(work):
    put(work, "sft")
    text(work, "base: llama", "base: bert")


def decoder_for_mlm(work):
    put(work, "mlm")
    text(work, "base: bert", "base: llama")


def no_such_target(work):
    put(work, "sft", tune={"targets": ["q_porj"]})


def no_such_method(work):
    put(work, "sft", tune={"method": "lorra"})


def no_such_base(work):
    put(work, "sft")
    text(work, "base: llama", "base: ./lama")


def hub_base_without_network(work):
    put(work, "sft")
    text(work, "base: llama", "base: some-owner/some-model")


def hub_data_without_network(work):
    put(work, "sft", data={"train": "some-owner/some-data:train"})


def no_such_device(work):
    put(work, "sft", device="cuda:7")


def no_data_file(work):
    put(work, "sft", data={"train": "pears.jsonl"})


def with_train(work, stage, content):
    (work / "train.jsonl").write_bytes(content)
    put(work, stage, data={"train": "train.jsonl"})


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def empty_file(work):
    with_train(work, "sft", b"")


def only_newlines(work):
    with_train(work, "sft", b"\n\n\n")


def broken_line_17(work):
    rows = lines(answered(24)).splitlines(keepends=True)
    rows[16] = rows[16][:20] + b"\n"
    with_train(work, "sft", b"".join(rows))


def latin_1(work):
    rows = lines(answered(24)).splitlines(keepends=True)
    rows[4] = b'{"prompt": "caf\xe9?", "completion": "yes"}\n'
    with_train(work, "sft", b"".join(rows))


def nul_bytes(work):
    rows = lines(answered(24)).splitlines(keepends=True)
    rows[4] = b'{"prompt": "a\x00b?", "completion": "yes"}\n'
    with_train(work, "sft", b"".join(rows))


def empty_answer(work):
    rows = answered(24)
    rows[6]["completion"] = "  "
    with_train(work, "sft", lines(rows))


def missing_answer(work):
    rows = answered(24)
    del rows[6]["completion"]
    with_train(work, "sft", lines(rows))


def wide_encoding(work):
    with_train(work, "sft", lines(answered(24)).decode().encode("utf-16"))


def pickle_given(work):
    (work / "rows.pkl").write_bytes(b"\x80\x04abc.")
    put(work, "sft", data={"train": "rows.pkl"})


def one_label(work):
    with_train(work, "classify", lines([{**row, "label": "yes"} for row in labelled(24)]))


def unseen_label(work):
    write_rows(work / "labels-eval.jsonl", [*labelled(8, 100), {"text": "a new one", "label": "perhaps"}])
    put(work, "classify")


def rows_too_long(work):
    rows = answered(24)
    rows[3]["completion"] = "word " * 400
    with_train(work, "sft", lines(rows))


def max_length_beyond_the_model(work):
    put(work, "sft", data={"max_length": 4096})


def eval_rows_in_train(work):
    write_rows(work / "pairs-eval.jsonl", answered(8, 3))
    put(work, "sft")


def template_without_its_column(work):
    put(work, "sft", data={"template": "Q: {question}\n\nA: {answer}"})


def adapter_of_another_base(work):
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(tiny_causal("llama", width=64), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(work / "adapter")
    put(work, "sft")
    text(work, "  method: lora\n  rank: 2", "  method: lora\n  adapter: adapter")


def pickled_base(work):
    (work / "pickled").mkdir()
    shutil.copy(work / "llama" / "config.json", work / "pickled")
    shutil.copy(work / "llama" / "tokenizer.json", work / "pickled")
    (work / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    put(work, "sft")
    text(work, "base: llama", "base: ./pickled")


def base_without_tokenizer(work):
    folder = save_tiny(tiny_causal("llama"), work / "mute")
    for path in folder.glob("*token*"):
        path.unlink()
    put(work, "sft")
    text(work, "base: llama", "base: ./mute")


def too_much_held_out(work):
    recipe = recipe_for("sft")
    recipe["data"] = {"train": "pairs.jsonl", "split": {"eval": 0.6, "test": 0.5}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def selecting_without_eval(work):
    recipe = recipe_for("sft", train={"select_by": "loss"})
    del recipe["data"]["eval"]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


CASES = {
    mistyped_key: ["recipe.yaml:", "lerning_rate", "did you mean `learning_rate`"],
    mistyped_section: ["tuen", "did you mean `tune`"],
    missing_base: ["`base` is missing", "folder or a hub id"],
    missing_data: ["`data` is missing"],
    wrong_type: ["recipe.yaml:", "train.epochs", "three"],
    negative: ["train.learning_rate", "-0.1", "greater than 0"],
    yaml_broken: ["recipe.yaml"],
    unknown_stage: ["stf", "did you mean `sft`"],
    idle_key: ["tune.layers", "last_layers"],
    encoder_for_sft: ["bert", "encoder", "mlm or classify"],
    decoder_for_mlm: ["llama", "pretrain, sft"],
    no_such_target: ["q_porj", "did you mean q_proj"],
    no_such_method: ["tune.method", "lorra"],
    no_such_base: ["lama", "llama"],
    hub_base_without_network: ["some-owner/some-model", "hf download"],
    hub_data_without_network: ["some-owner/some-data", "hf download"],
    no_such_device: ["cuda:7", "cpu"],
    no_data_file: ["pears.jsonl", "pairs.jsonl"],
    empty_file: ["train.jsonl", "empty"],
    only_newlines: ["train.jsonl"],
    broken_line_17: ["train.jsonl:17"],
    latin_1: ["train.jsonl:5", "UTF-8"],
    nul_bytes: ["train.jsonl:5"],
    empty_answer: ["train.jsonl:7", "empty"],
    missing_answer: ["train.jsonl:7", "completion"],
    wide_encoding: ["train.jsonl", "UTF-16"],
    pickle_given: ["rows.pkl", "pickle"],
    one_label: ["'yes'", "at least two"],
    unseen_label: ["perhaps", "no, yes"],
    rows_too_long: ["1 of 24", "256", "max_length", "truncate"],
    max_length_beyond_the_model: ["4096", "256"],
    eval_rows_in_train: ["pairs-eval.jsonl", "on_overlap"],
    template_without_its_column: ["question", "prompt"],
    adapter_of_another_base: ["adapter"],
    pickled_base: ["pytorch_model.bin", "safetensors"],
    base_without_tokenizer: ["tokenizer"],
    too_much_held_out: ["data.split"],
    selecting_without_eval: ["held-out rows"],
}
