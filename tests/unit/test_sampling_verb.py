"""`sample` writes the same completions whatever interrupted it, and never over anything else."""

from __future__ import annotations

import json

import pytest
import torch
from tests.chains import make_files, words, write_rows

from tunesmith import api
from tunesmith.data.encode import prompt_ids
from tunesmith.errors import DataError, ModelError, RunError
from tunesmith.stages import sampling


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_files(tmp_path_factory.mktemp("sample"))
    write_rows(folder / "many.jsonl", [{"prompt": words(i, 3 + i % 4)} for i in range(20)])
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setenv("TUNESMITH_CACHE", str(made / "cache"))
    return tmp_path


def sample(to, **more):
    return api.sample("tiny", "many.jsonl", **{"num": 2, "max_tokens": 4, **more}, to=to)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_gets_its_completions(work):
    found = sample(work / "s.jsonl")
    assert found["sampled"] == 20 and 0 <= found["share_ended"] <= 1
    lines = rows(work / "s.jsonl")
    assert [line["prompt"] for line in lines] == [words(i, 3 + i % 4) for i in range(20)]
    assert all(len(line["completions"]) == len(line["ended"]) == 2 for line in lines)
    assert any(line["completions"][0] != line["completions"][1] for line in lines)


@pytest.mark.parametrize("whole", [0, 1, 15, 16, 17, 19])
def test_an_interrupted_file_goes_on_to_the_same_bytes(work, whole):
    sample(work / "whole.jsonl")
    expected = (work / "whole.jsonl").read_bytes()
    lines = expected.splitlines(keepends=True)
    (work / "cut.jsonl").write_bytes(b"".join(lines[:whole]) + (lines[whole][:10] if whole else b""))
    assert sample(work / "cut.jsonl")["sampled"] == 20 - whole
    assert (work / "cut.jsonl").read_bytes() == expected


def test_the_seed_decides(work):
    first, again, other = (sample(None, seed=seed)["rows"] for seed in (1, 1, 2))
    texts = [[row["completions"] for row in found] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_a_file_sampled_otherwise_is_never_written_to(work):
    sample(work / "s.jsonl", limit=3)
    before = (work / "s.jsonl").read_bytes()
    for more in ({"seed": 1}, {"num": 3}, {"temperature": 0.5}, {"limit": 2}):
        with pytest.raises(RunError, match="left as it is"):
            sample(work / "s.jsonl", **{"limit": 3, **more})
        assert (work / "s.jsonl").read_bytes() == before
    assert sample(work / "s.jsonl", limit=5)["sampled"] == 2, "more prompts of the same file are added"


def test_prompts_go_through_the_template_of_the_run(work, made):
    recipe = {
        "stage": "sft", "base": "tiny", "precision": "float32", "tune": {"rank": 2}, "train": {"steps": 1},
        "data": {"train": "pairs.jsonl", "template": "Q: {prompt} A: {completion}"},
    }  # fmt: skip
    api.train(recipe, run=str(made / "runs/templated"))
    speaker = sampling.open_speaker("templated")
    (asked,) = sampling.read_prompts("many.jsonl", limit=1)
    expected = prompt_ids(f"Q: {asked.text} A: ", speaker.tokenizer, raw=True)
    assert sampling.encode(speaker, asked) == expected
    bare = sampling.open_speaker("tiny")
    assert sampling.encode(bare, asked) == prompt_ids(asked.text, bare.tokenizer) != expected


def test_greedy_completions_are_the_likeliest_tokens(work):
    (row,) = sample(None, limit=1, num=1, temperature=0.0)["rows"]
    speaker = sampling.open_speaker("tiny")
    (asked,) = sampling.read_prompts("many.jsonl", limit=1)
    ids = sampling.encode(speaker, asked)
    for _ in range(4):
        with torch.no_grad():
            logits = speaker.model.backbone(input_ids=torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == speaker.tokenizer.eos_token_id:
            break
    new = ids[len(sampling.encode(speaker, asked)) :]
    assert row["completions"] == [speaker.tokenizer.decode(new, skip_special_tokens=True)]


def test_prompts_and_models_that_cannot_be(work, made):
    long = write_rows(made / "long.jsonl", [{"prompt": "short"}, {"prompt": "cat " * 300}])
    with pytest.raises(DataError, match=r"256 tokens in all.*\n.*long\.jsonl:2: \d+ tokens"):
        api.sample("tiny", long)
    with pytest.raises(ModelError):
        api.sample("no-such-model-here", "many.jsonl")
    recipe = {
        "stage": "classify", "base": "tiny", "precision": "float32", "tune": {"rank": 2}, "train": {"steps": 1},
        "data": {"train": "labels.jsonl"},
    }  # fmt: skip
    api.train(recipe, run=str(made / "runs/labels"))
    with pytest.raises(ModelError, match="does not write text"):
        api.sample("labels", "many.jsonl")
