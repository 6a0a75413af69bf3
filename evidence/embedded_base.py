"""The embedded base on 2,000 IMDB test reviews: bits per byte beside two story models, gzip and 5-gram models.

Every byte of the text is paid for. What a model does not predict - the first token of a window where it has no start
token, characters that its vocabulary lacks - is spelled out at 8 bits a byte, on top of what predicting `<unk>` costs.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import ROOT, Place, place, table, write
from ngram import train_ngram

from tunesmith.data.batches import collate
from tunesmith.data.encode import Encoder
from tunesmith.data.records import read_records
from tunesmith.data.store import build_store
from tunesmith.data.tokens import encode_text
from tunesmith.embedded import BASE
from tunesmith.evaluate.intervals import Statistic, bootstrap, ratio
from tunesmith.evaluate.likelihood import bytes_of_tokens, evaluate_likelihood
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import base_record, load_backbone, load_tokenizer

NUM_REVIEWS, WINDOW = 2000, 512


def main() -> None:
    where, _ = place("embedded_base")
    where.runs.mkdir(parents=True, exist_ok=True)
    making = _making()
    imdb = where.asset("data/imdb")
    shuffled = making.shuffled_test(imdb)
    texts = shuffled[making.HELD_OUT : making.HELD_OUT + NUM_REVIEWS]
    models = {
        BASE: "this project's",
        str(where.asset("models/tinystories-656K")): "stories, no bytes in its vocabulary",
        str(where.asset("models/stories260K")): "stories",
    }
    rows = [
        _kept(where, base_record(base)["hash"], partial(_model, base, what, texts, where))
        for base, what in models.items()
    ]
    for what, alphabet in (("bytes", (257, _bytes)), (f"tokens of {BASE}", (4097, _tokens()))):
        corpus = making.reviews(imdb / "imdb_unsup.jsonl.gz")
        rows.append(_kept(where, f"5-gram, {what}", partial(_ngram, what, alphabet, corpus, texts)))
    rows.append(_gzip(texts))
    shared = len(set(texts) & set(making.reviews(imdb / "imdb_unsup.jsonl.gz")))
    title = "The embedded base: bits per byte on IMDB test reviews"
    write("embedded_base", title, _explained(texts, shared), table(HEAD, rows))


HEAD = ("system", "what it is", "parameters", "bits per byte [95 %]", "bytes spelled at 8 bits")


def _making() -> ModuleType:
    """The script that makes what the base begins as."""
    spec = importlib.util.spec_from_file_location("make_start", ROOT / "examples/embedded_base/make_start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _explained(texts: list[str], shared: int) -> str:
    size = sum(len(text.encode()) for text in texts)
    return (
        f"{len(texts):,} reviews of the test set ({size:,} bytes), `<br />` made line breaks; none of them chose the "
        f"base's checkpoint. {shared:,} of them stand, letter for letter, among the 50,000 that were trained on too: "
        f"the data set has it so, and they are counted. Models read windows of {WINDOW} tokens, each on its own. Every "
        "byte is paid for: what a model does not predict (the first token of a window where there is no start token, "
        "characters that the vocabulary lacks) is spelled at 8 bits a byte, beside the cost of its `<unk>`. The 5-gram "
        "models (Witten-Bell) are counted over the 50,000 reviews that the base was trained on. gzip -9 packs all "
        "reviews as one file. Intervals are over reviews."
    )


def _model(base: str, what: str, texts: list[str], where: Place) -> tuple[Any, ...]:
    tokenizer = load_tokenizer(base)
    file = where.runs / "reviews.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    records = read_records(str(file), stage="pretrain")
    store = build_store(records, Encoder(tokenizer, "pretrain", WINDOW, "split"), where.runs / "cache")
    model = LanguageModel(load_backbone(base, "causal"))
    found = evaluate_likelihood(model, store, collate=collate, token_bytes=bytes_of_tokens(tokenizer))
    bits, counted = np.zeros(len(texts)), np.zeros(len(texts))
    for origin, nats, size in zip(found.origins, found.nats, found.bytes, strict=True):
        row = int(origin.rpartition(":")[2]) - 1
        bits[row] += nats / math.log(2)
        counted[row] += size
    size = np.asarray([len(text.encode()) for text in texts], np.float64)
    spelled = np.maximum(size - (counted - _put_before(tokenizer)), 0)
    name = base if base == BASE else f"models/{Path(base).name}"
    return (name, what, f"{base_record(base)['parameters']:,}", _bits_per_byte(bits + 8 * spelled, size),
            f"{spelled.sum() / size.sum():.2%}")  # fmt: skip


def _put_before(tokenizer: Any) -> int:
    """Bytes that the tokenizer puts before a text: one where it begins with a space that is not there."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return int(first.startswith("▁"))


def _bits_per_byte(bits: np.ndarray, size: np.ndarray) -> str:
    found = bootstrap(Statistic("bits_per_byte", np.stack([bits, size], 1), ratio))
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _ngram(
    what: str, alphabet: tuple[int, Callable[[str], np.ndarray]], corpus: Iterable[str], texts: list[str]
) -> tuple[Any, ...]:
    symbols, encode = alphabet
    size = np.asarray([len(text.encode()) for text in texts], np.float64)
    model = train_ngram([encode(text) for text in corpus], symbols)
    bits = np.asarray([model.bits(encode(text)).sum() for text in texts])
    grams = sum(len(order.grams) for order in model.orders)
    return (f"5-gram, {what}", "counts and Witten-Bell", f"{grams:,} counts", _bits_per_byte(bits, size), "0.00%")


def _kept(where: Place, name: str, measure: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What was measured before is only read again; a model is known by the hash of its weights."""
    file = where.runs / f"{sha256(name.encode()).hexdigest()[:16]}.json"
    if not file.is_file():
        file.write_text(json.dumps(measure()), encoding="utf-8")
    return tuple(json.loads(file.read_text(encoding="utf-8")))


def _bytes(text: str) -> np.ndarray:
    """UTF-8 bytes and an end symbol."""
    return np.append(np.frombuffer(text.encode(), np.uint8).astype(np.int64), 256)


def _tokens() -> Any:
    tokenizer = load_tokenizer(BASE)

    def encode(text: str) -> np.ndarray:
        return np.asarray([*encode_text(tokenizer, text), 4096], np.int64)

    return encode


def _gzip(texts: list[str]) -> tuple[Any, ...]:
    whole = "\n".join(texts).encode()
    return ("gzip -9", "all reviews as one file", "-", f"{8 * len(gzip.compress(whole, 9)) / len(whole):.3f}", "0.00%")


if __name__ == "__main__":
    main()
