"""Bases that open, and twenty ways in which a folder is refused with one clear message."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import CAUSAL, ENCODERS, save_tiny, tiny_causal, tiny_classifier, tiny_masked, tiny_tokenizer

from tunesmith.errors import ModelError
from tunesmith.model.load import (
    base_record,
    fit_tokenizer,
    load_backbone,
    load_config,
    load_empty,
    load_tokenizer,
    stored_dtype,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tiny_causal("llama"), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def mine(folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_every_family_opens_with_the_same_logits(family, tmp_path):
    original = tiny_causal(family) if family in CAUSAL else tiny_masked(family)
    save_tiny(original, tmp_path / "m")
    opened = load_backbone(tmp_path / "m", "causal" if family in CAUSAL else "masked")
    ids = torch.arange(7, 19)[None]
    assert type(opened) is type(original) and not opened.training and opened.tunesmith_new == ()
    assert torch.equal(opened(input_ids=ids).logits, original(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "bert", "distilbert", "modernbert"])
def test_a_new_head_comes_from_the_seed_alone(family, tmp_path):
    save_tiny(tiny_causal(family) if family in CAUSAL else tiny_masked(family), tmp_path / "m")
    state = torch.random.get_rng_state()
    heads = [load_backbone(tmp_path / "m", "classifier", label_names=["a", "b", "c"], seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two, other = (dict(m.named_parameters()) for m in heads)
    assert heads[0].tunesmith_new and all(torch.equal(one[n], two[n]) for n in one)
    matrices = [n for n in heads[0].tunesmith_new if one[n].dim() > 1]
    assert not any(torch.equal(one[n], other[n]) for n in matrices)
    assert heads[0].config.id2label == {0: "a", 1: "b", 2: "c"} and heads[0].config.num_labels == 3


def test_a_trained_head_stays_for_the_same_labels_and_is_new_for_others(tmp_path):
    model = tiny_classifier("distilbert")
    model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    save_tiny(model, tmp_path / "m")
    for labels, same in ((["neg", "pos"], True), (None, True), (["no", "yes"], False), (["a", "b", "c"], False)):
        opened = load_backbone(tmp_path / "m", "classifier", label_names=labels)
        weight = opened.classifier.weight
        assert (weight.shape == model.classifier.weight.shape and torch.equal(weight, model.classifier.weight)) == same
    multi = load_backbone(tmp_path / "m", "classifier", label_names=["a", "b"], problem="multi_label_classification")
    assert multi.config.problem_type == "multi_label_classification"


def test_dtype_is_what_was_asked_or_what_is_stored(tmp_path):
    save_tiny(tiny_causal("llama").to(torch.bfloat16), tmp_path / "m")
    assert load_backbone(tmp_path / "m", "causal").dtype == torch.float32
    assert load_backbone(tmp_path / "m", "causal", dtype=None).dtype == torch.bfloat16
    assert stored_dtype(tmp_path / "m") == torch.bfloat16


def test_record_says_what_the_base_is(folder, mine):
    record = base_record(folder)
    assert record["parameters"] == sum(p.numel() for p in tiny_causal("llama").parameters())
    assert (record["context_tokens"], record["dtype"], record["licence"]) == (256, "F32", None)
    assert base_record(mine)["hash"] == record["hash"]
    tensors = load_file(mine / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, mine / "model.safetensors")
    (mine / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# hi\n")
    assert base_record(mine)["hash"] != record["hash"] and base_record(mine)["licence"] == "apache-2.0"


def test_silence(folder, capfd):
    load_backbone(folder, "classifier", label_names=["a", "b"])
    assert capfd.readouterr() == ("", "")


def test_pad_token_without_growing(tmp_path):
    tokenizer = tiny_tokenizer(pad=False)
    save_tiny(tiny_causal("llama", pad_token_id=None), tmp_path / "m", tokenizer=tokenizer)
    opened = load_tokenizer(tmp_path / "m")
    assert opened.pad_token == "<pad>" and len(opened) == len(tokenizer)
    assert load_backbone(tmp_path / "m", "causal").config.pad_token_id == opened.pad_token_id


def test_new_tokens_grow_the_embedding_only_when_asked(folder):
    model, tokenizer = load_backbone(folder, "causal"), load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<new{i}>" for i in range(5)]})
    with pytest.raises(ModelError, match=r"324 tokens .* 320 rows"):
        fit_tokenizer(model, tokenizer)
    mean = model.get_input_embeddings().weight.mean(0).detach()
    assert fit_tokenizer(model, tokenizer, grow=True) == 4
    assert model.get_input_embeddings().weight.shape[0] == 324 == model.config.vocab_size
    torch.testing.assert_close(model.get_input_embeddings().weight[-1], mean)


def test_a_base_whose_tokenizer_was_given_new_tokens_is_opened_with_rows_for_them(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<new{i}>" for i in range(5)]})
    for name, model in (("own", tiny_causal("llama")), ("tied", tiny_causal("llama", tie_word_embeddings=True))):
        base = save_tiny(model, tmp_path / name, tokenizer=tokenizer)
        state = torch.get_rng_state()
        opened, again = load_backbone(base, "causal"), load_backbone(base, "causal")
        assert torch.equal(state, torch.get_rng_state()), "nothing random is drawn"
        assert opened.tunesmith_grown == 4 and opened.config.vocab_size == 324
        table, head = opened.get_input_embeddings().weight, opened.get_output_embeddings().weight
        assert (head is table) == (name == "tied")
        torch.testing.assert_close(table[320:], table[:320].mean(0).expand(4, -1))
        torch.testing.assert_close(head[320:], head[:320].mean(0).expand(4, -1))
        assert torch.equal(table, again.get_input_embeddings().weight)
        planned = load_empty(base, "causal")
        assert [p.shape for p in planned.parameters()] == [p.shape for p in opened.parameters()]
        assert all(p.is_meta for p in planned.parameters())


def _only_pickle(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _cut(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _index(path, name):
    (path / "model.safetensors").unlink()
    text = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}})
    (path / "model.safetensors.index.json").write_text(text)


def _fifo(path):
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def _config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def _without(path, name):
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "pickled": (_only_pickle, "pickle can run any code.*save_pretrained"),
    "cut weights": (_cut, "cannot load the weights"),
    "shard above": (lambda p: _index(p, "../model.safetensors"), "points outside the folder"),
    "shard absolute": (lambda p: _index(p, "/etc/passwd.safetensors"), "points outside the folder"),
    "shard pickled": (lambda p: _index(p, "model.bin"), "not a safetensors file"),
    "shard missing": (lambda p: _index(p, "model-1.safetensors"), "model-1.safetensors is missing"),
    "named pipe": (_fifo, "not a plain file"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "gguf": (
        lambda p: (p / "model.safetensors").rename(p / "model.gguf"),
        "of another program",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), r"has no config\.json"),
    "broken config": (lambda p: (p / "config.json").write_text("{"), r"config\.json is damaged"),
    "list config": (lambda p: (p / "config.json").write_text("[]"), "not an object"),
    "deep config": (lambda p: (p / "config.json").write_text("[" * 50_000), r"config\.json is damaged"),
    "unknown type": (lambda p: _config(p, model_type="nothing"), "'nothing' in config.json is not known"),
    "remote code": (
        lambda p: _config(p, model_type="own", auto_map={"AutoConfig": "evil.Config"}),
        "nothing of it ran.*trust_remote_code:",
    ),
    "lost tensor": (lambda p: _without(p, "model.layers.1.mlp.up_proj.weight"), r"lack model\.layers\.1\.mlp"),
    "lost head": (lambda p: _without(p, "lm_head.weight"), r"lack lm_head\.weight"),
    "wrong width": (lambda p: _config(p, hidden_size=48), "cannot load the weights"),
    "broken tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
    "vocabulary too small": (lambda p: _shrink(p), "do not belong together"),
}


def _shrink(path):
    save_tiny(tiny_causal("llama", vocab_size=200), path)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_message(name, mine):
    damage, message = BROKEN[name]
    (mine / "evil.py").write_text("raise SystemExit('code of the repository ran')")
    damage(mine)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_backbone(mine, "causal")


def test_code_runs_only_when_this_base_is_named(mine, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    _config(mine, model_type="own", auto_map={"AutoConfig": "code.OwnConfig"})
    (mine / "code.py").write_text("raise ImportError('ran')")
    for trust in (None, "other/base", "true"):
        with pytest.raises(ModelError, match="nothing of it ran"):
            load_config(mine, trust=trust)
    for named in (str(mine), f"{mine}/../{mine.name}"):
        with pytest.raises(ModelError, match="configuration: ran"):
            load_config(mine, trust=named)


def test_native_types_ignore_code_beside_them(mine):
    _config(mine, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (mine / "evil.py").write_text("raise SystemExit('code of the repository ran')")
    assert type(load_backbone(mine, "causal")).__name__ == "LlamaForCausalLM"


def test_a_stage_that_does_not_fit_says_which_would(folder, tmp_path):
    with pytest.raises(ModelError, match="use stage pretrain, sft or classify"):
        load_backbone(folder, "masked")
    encoder = save_tiny(tiny_masked("bert"), tmp_path / "bert")
    with pytest.raises(ModelError, match="use stage mlm or classify"):
        load_backbone(encoder, "causal")


def test_missing_folders_and_files(tmp_path, folder):
    with pytest.raises(ModelError, match=r"does not exist\. Did you mean .*llama\?"):
        load_config(folder.parent / "lama")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        load_config(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="does not exist"):
        load_config("./nope")
    with pytest.raises(ModelError, match="must name a revision"):
        load_config("someone/model", trust="someone/model")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(empty)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("LocalEntryNotFoundError", "hub cannot be reached.*--local-dir"),
        ("RepositoryNotFoundError", "neither a folder here nor a model on the hub"),
        ("GatedRepoError", "accept its licence"),
    ],
)
def test_the_hub_out_of_reach(error, message, monkeypatch):
    kind = type(error, (OSError,), {})

    def fail(*args, **kwargs):
        raise kind("secret token hf_abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=f"(?s){message}") as problem:
        load_backbone("nobody/nothing", "causal")
    assert "hf_abc" not in str(problem.value)


def test_a_hub_id_downloads_no_pickle_and_no_code(folder, monkeypatch):
    asked = {}

    def serve(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", serve)
    load_config("some/model@abc123")
    assert (asked["name"], asked["revision"]) == ("some/model", "abc123")
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in asked["allow_patterns"])
