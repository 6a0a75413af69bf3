"""What `tunesmith/reviews-1m` begins as: its corpus, its tokenizer and its random weights.

    python make_start.py IMDB_FOLDER [FOLDER]
    tunesmith train pretrain.yaml --run reviews-1m
    tunesmith export runs/reviews-1m --to exported --format merged
    python finish.py exported reviews-1m

IMDB_FOLDER holds `imdb_unsup.jsonl.gz` (50,000 reviews without labels) and `imdb_test.jsonl.gz`, each line an object
with `text`: the Large Movie Review Dataset (Maas et al. 2011). FOLDER (beside this file when not named) gets
`start/`, `reviews.jsonl.gz` and `held_out.jsonl` (200 test reviews, which choose the checkpoint).
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.model.folder import quiet

VOCABULARY, CONTEXT = 4096, 512
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SHUFFLE_SEED, HELD_OUT = 1, 200


def clean(text: str) -> str:
    """A review with its line breaks as line breaks."""
    return text.replace("<br /><br />", "\n").replace("<br />", "\n").strip()


def reviews(path: Path) -> Iterator[str]:
    """The cleaned texts of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield clean(json.loads(line)["text"])


def shuffled_test(folder: Path) -> list[str]:
    """All test reviews in a fixed order: the first 200 choose the checkpoint, the evidence measures on later ones."""
    texts = list(reviews(folder / "imdb_test.jsonl.gz"))
    random.Random(SHUFFLE_SEED).shuffle(texts)
    return texts


def make_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template; any text encodes and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=SPECIAL[2:],
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """Random weights: 4 layers of width 128, 1,377,408 parameters, embedding and head tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, rms_norm_eps=1e-5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def main(imdb: Path, folder: Path) -> None:
    """Write corpus, held-out reviews, tokenizer and weights."""
    texts = list(reviews(imdb / "imdb_unsup.jsonl.gz"))
    with gzip.open(folder / "reviews.jsonl.gz", "wt", encoding="utf-8", compresslevel=3) as out:
        out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    held_out = shuffled_test(imdb)[:HELD_OUT]
    (folder / "held_out.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held_out), encoding="utf-8"
    )
    with quiet():
        make_tokenizer(texts[::3]).save_pretrained(folder / "start")
        make_model().save_pretrained(folder / "start")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
