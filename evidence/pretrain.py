"""pretrain: 5,000 unlabelled reviews on a story model; held-out bits per byte before and after, and of another author.

The vocabulary of models/tinystories-656K has no bytes: some characters become <unk>. Their bits are paid for but their
bytes not counted, and beside that stands the cost of a code that spells each of them out in 8 bits a byte.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

from common import RECIPES, Place, interval, place, rows_of, table, train, write

from tunesmith.evaluate.likelihood import bytes_of_tokens
from tunesmith.model.load import load_tokenizer

TRAIN, HELD_OUT = 5000, 500


def main() -> None:
    where, _ = place("pretrain")
    where.runs.mkdir(parents=True, exist_ok=True)
    base = where.asset("models/tinystories-656K")
    files = _files(where)
    run = where.runs / "reviews"
    result = train(
        run, RECIPES / "pretrain.yaml", f"base={base}", f"data.train={files['train']}", f"data.eval={files['eval']}",
        f"evaluate.probe={files['other']}",
    )  # fmt: skip
    title = "pretrain: 5,000 unlabelled reviews on a story model"
    write("pretrain", title, _summary(result), _spelled(result, files, base))


def _files(where: Place) -> dict[str, Path]:
    """The first 5,500 unlabelled reviews in two files, and school maths as the text of another author."""
    files = {name: where.runs / f"{name}.jsonl" for name in ("train", "eval", "other")}
    with gzip.open(where.asset("data/imdb/imdb_unsup.jsonl.gz"), "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line)["text"] for line in itertools.islice(lines, TRAIN + HELD_OUT)]
    maths = [row["question"] for row in rows_of(where.asset("data/gsm8k/test.jsonl"))[:HELD_OUT]]
    for name, texts in (("train", reviews[:TRAIN]), ("eval", reviews[TRAIN:]), ("other", maths)):
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return files


def _summary(result: dict[str, Any]) -> str:
    rows = []
    for what, part in (("held-out reviews", result), ("school maths, never trained on", result["probe"])):
        for metric in ("bits_per_byte", "loss", "perplexity"):
            digits = 1 if metric == "perplexity" else 4
            cells = [interval(part[when][metric], digits) for when in ("before", "after", "difference")]
            rows.append((what, metric, *cells))
    note = (
        f"All {result['trainable_parameters']:,} parameters of models/tinystories-656K, {TRAIN:,} reviews once "
        f"({result['tokens']:,} tokens, {result['train_seconds']:.0f} s of steps); {HELD_OUT} other reviews held out. "
        "95 % intervals; the difference is paired over rows."
    )
    return f"## Before and after\n\n{note}\n\n{table(('text', 'metric', 'before', 'after', 'difference'), rows)}"


def _spelled(result: dict[str, Any], files: dict[str, Path], base: Path) -> str:
    """Bits per byte of all bytes, where what the vocabulary lacks is spelled out."""
    tokenizer = load_tokenizer(base)
    table_of_bytes = bytes_of_tokens(tokenizer)
    texts = [row["text"] for row in rows_of(files["eval"])]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
    every = sum(len(text.encode()) for text in texts)
    counted = int(sum(table_of_bytes[row].sum() for row in ids))
    lost = every - counted
    rows = []
    for when in ("before", "after"):
        bits = result[when]["bits_per_byte"]["value"] * counted
        rows.append((when, f"{bits / counted:.4f}", f"{(bits + 8 * lost) / every:.4f}", f"{bits / every:.4f}"))
    head = ("", "counted bytes (reported)", "all bytes, unknown ones spelled at 8 bits", "all bytes, unknown ones free")
    note = (
        f"{unknown:,} of {sum(map(len, ids)):,} held-out tokens ({unknown / sum(map(len, ids)):.2%}) are `<unk>`; "
        f"{counted:,} of {every:,} bytes are counted, {lost:,} are not. The last column is what a careless count says: "
        "it is not the length of any code, since `<unk>` does not tell which character it was."
    )
    return f"## What `<unk>` costs\n\n{note}\n\n{table(head, rows)}"


if __name__ == "__main__":
    main()
