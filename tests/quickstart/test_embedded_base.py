"""The base that comes with the program: small, bf16, with a tokenizer that keeps every text; and how it was begun."""

from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunesmith.embedded import BASE, base_folder
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import base_record, load_backbone, load_tokenizer, stored_dtype
from tunesmith.rollout.sampler import Sampler

MAKING = Path(__file__).parents[2] / "examples/embedded_base/make_start.py"
TEXTS = ("Ein schöner Film — 10/10!\n\n\tNaïve café, 日本 🎬", "plain", " two  spaces ", "<br />", "\x00\x7f")


def test_the_base_is_what_its_card_says() -> None:
    folder = base_folder(BASE)
    assert folder is not None
    record = base_record(BASE)
    assert record["parameters"] == 1_377_408
    assert record["context_tokens"] == 512
    assert stored_dtype(folder) is torch.bfloat16
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10 * 2**20
    assert record["licence"] == "apache-2.0"


def test_its_tokenizer_keeps_every_text_and_has_a_chat_template() -> None:
    tokenizer = load_tokenizer(BASE)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turn = [{"role": "user", "content": "Hello"}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>\nHello<|end|>\n<|assistant|>\n"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_it_prefers_the_english_of_reviews_to_the_same_words_shuffled() -> None:
    tokenizer, model = load_tokenizer(BASE), LanguageModel(load_backbone(BASE, "causal"))
    good, shuffled = "This is one of the best films I have seen.", "films the one seen is of I best have This."
    with torch.inference_mode():
        costs = [
            float(model.backbone(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
            for ids in (tokenizer(good)["input_ids"], tokenizer(shuffled)["input_ids"])
        ]
    assert costs[0] < costs[1] - 1
    ids = tokenizer("I went to see this film because")["input_ids"]
    rollout = Sampler(model, tokenizer).sample([ids], max_tokens=12, temperature=0.0, seed=0)[0]
    assert len(tokenizer.decode(rollout.ids).split()) >= 5


def test_the_script_that_begins_it_makes_the_same_shape(tmp_path: Path) -> None:
    for name in ("imdb_unsup", "imdb_test"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as out:
            rows = ({"text": f"{name} {i}<br /><br />good {'and ' * (i % 7)}long"} for i in range(300))
            out.writelines(json.dumps(row) + "\n" for row in rows)
    subprocess.run([sys.executable, str(MAKING), str(tmp_path), str(tmp_path)], check=True)
    own, shipped = load_tokenizer(tmp_path / "start"), load_tokenizer(BASE)
    assert own.chat_template == shipped.chat_template
    assert own.special_tokens_map == shipped.special_tokens_map
    assert sum(p.numel() for p in load_backbone(tmp_path / "start", "causal").parameters()) == 1_377_408
    rows = [json.loads(line)["text"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 200
    assert "<br" not in "".join(rows)


@pytest.mark.parametrize(("text", "cleaned"), [(" a<br /><br />b ", "a\nb"), ("a<br />b", "a\nb"), ("a < b", "a < b")])
def test_line_breaks_become_line_breaks(text: str, cleaned: str) -> None:
    assert runpy.run_path(str(MAKING))["clean"](text) == cleaned
