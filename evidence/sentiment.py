"""What ppo and grpo share: beginnings of film reviews, a reward model that knows which are positive, their table."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from common import RECIPES, Place, interval, rows_of, table

import tunesmith

SEEDS = (0, 1, 2)
PRICES = (0.0, 0.02, 2.0)
"""Of a nat of KL, in units of reward."""
REVIEWS = {"train": 3000, "eval": 500}
PROMPTS = {"train": 96, "eval": 64}


def train(run: Path, recipe: Path, *overrides: str) -> dict[str, Any]:
    """The run's result, in this process: many short runs, of which none is measured for memory."""
    if not (run / "result.json").is_file():
        print(f"{run}: {' '.join(overrides)}", file=sys.stderr, flush=True)
        if (run / "recipe.yaml").is_file():
            tunesmith.resume(run, say=_tell)
        else:
            tunesmith.train(recipe, overrides, run=str(run), say=_tell)
    return json.loads((run / "result.json").read_text())


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prompts(where: Place, folder: Path) -> dict[str, Path]:
    """The first six words of unlabelled reviews, drawn from a seed; no two alike."""
    with gzip.open(where.asset("data/imdb/imdb_unsup.jsonl.gz"), "rt", encoding="utf-8") as stream:
        found = {" ".join(json.loads(line)["text"].split()[:6]) for line in itertools.islice(stream, 2000)}
    texts = sorted(text for text in found if text.isascii() and "<" not in text)
    random.Random(0).shuffle(texts)
    folder.mkdir(parents=True, exist_ok=True)
    files, start = {}, 0
    for side, num in PROMPTS.items():
        files[side] = folder / f"prompts-{side}.jsonl"
        rows = [json.dumps({"prompt": text}) + "\n" for text in texts[start : start + num]]
        files[side].write_text("".join(rows))
        start += num
    return files


def reward_model(where: Place) -> Path:
    """The run of a sentiment classifier from the same base, trained once and shared by both parts."""
    folder = where.runs.parent / "sentiment"
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    with gzip.open(where.asset("data/imdb/imdb_train.jsonl.gz"), "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    random.Random(0).shuffle(rows)
    start = 0
    for side, num in REVIEWS.items():
        kept = [{"text": row["text"], "label": str(row["label"])} for row in rows[start : start + num]]
        (data / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        start += num
    overrides = [f"data.{side}={data / side}.jsonl" for side in REVIEWS]
    train(folder / "run", RECIPES / "sentiment.yaml", *overrides)
    return folder / "run"


def policies(where: Place, stage: str) -> list[tuple[float, int, Path]]:
    """(price of the KL, seed, run): every price with the first seed, and the paper's price with every seed."""
    reward, files = reward_model(where), prompts(where, where.runs / "data")
    made = []
    for price, seed in [(0.02, 0), (0.0, 0), (2.0, 0), *((0.02, seed) for seed in SEEDS[1:])]:
        run = where.runs / f"kl{price:g}-seed{seed}"
        train(
            run, RECIPES / f"{stage}.yaml", f"reward.run={reward}", f"data.train={files['train']}",
            f"data.eval={files['eval']}", f"seed={seed}", f"{stage}.kl_coef={price}",
        )  # fmt: skip
        made.append((price, seed, run))
    return made


def fluency(where: Place, run: Path, which: str) -> dict[str, Any]:
    """Bits per byte of the first or the last round's texts under another model, with their interval."""
    rows = rows_of(run / "rollouts.jsonl")
    wanted = rows[0]["round"] if which == "first" else rows[-1]["round"]
    texts = [row["prompt"] + row["completion"] for row in rows if row["round"] == wanted]
    path = run / f"texts-{which}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = tunesmith.evaluate(str(where.asset("models/stories260K")), str(path), stage="pretrain")
    return found["metrics"]["bits_per_byte"]


def summary(where: Place, runs: list[tuple[float, int, Path]]) -> str:
    """The table of all runs, and what follows from it."""
    rows, gains, kls = [], [], {}
    for price, seed, run in sorted(runs):
        result = json.loads((run / "result.json").read_text())
        before, after, change = result["before"], result["after"], result["difference"]["reward"]
        texts = {which: fluency(where, run, which)["value"] for which in ("first", "last")}
        probe = result["probe"]["difference"]["loss"]
        rows.append(
            (f"{price:g}", seed, interval(before["reward"], 2), interval(after["reward"], 2), interval(change, 2),
             interval(after["kl"], 2), f"{texts['first']:.2f} -> {texts['last']:.2f}", f"{probe['value']:+.3f}")
        )  # fmt: skip
        if price == 0.02:
            gains.append(change["value"])
        if seed == 0:
            kls[price] = after["kl"]["value"]
    head = ("KL price", "seed", "reward before", "after", "difference", "KL to the start (nats)",
            "bits per byte of texts under stories260K", "loss on the probe")  # fmt: skip
    said = []
    if len(gains) > 1:
        said.append(
            f"Over {len(gains)} seeds at price 0.02 the held-out reward rises by {statistics.mean(gains):+.2f} "
            f"(standard deviation {statistics.stdev(gains):.2f})."
        )
    known = [price for price in PRICES if price in kls]
    if len(known) > 1:
        falls = all(kls[a] > kls[b] for a, b in itertools.pairwise(known))
        order = ", ".join(f"{kls[price]:.2f} at {price:g}" for price in known)
        said.append(f"The final KL {'falls' if falls else 'does not fall'} as its price rises: {order}.")
    return "\n\n".join([table(head, rows), *said])


def checks(runs: list[tuple[float, int, Path]]) -> str:
    """What every run of a stage with rollouts proves about itself."""
    first, sampler, start = 0.0, 0.0, 0.0
    for _, _, run in runs:
        steps, seen = rows_of(run / "metrics.jsonl"), set[int]()
        for row in rows_of(run / "rollouts.jsonl"):
            seen.add(row["step"])
        first = max([first, *(abs(s["ratio"] - 1) for s in steps if s["step"] in seen)])
        sampler = max([sampler, *(s["sampler_error"] for s in steps)])
        start = max(start, abs(steps[0].get("kl", 0.0)))
    return (
        f"In all {len(runs)} runs the largest |ratio - 1| at a round's first minibatch is {first:g}, the KL at the "
        f"first step is {start:g}, and the sampler's log-prob of a token differs from the trainer's by {sampler:.1e} "
        "nats at most."
    )


def side_by_side(run: Path, limit: int = 6) -> str:
    """Completions of the same held-out prompts before and after."""
    rows = [(row["prompt"], row["before"], row["after"]) for row in rows_of(run / "samples.jsonl")[:limit]]
    clean = [tuple(" ".join(text.split()).replace("|", "\\|") for text in row) for row in rows]
    return table(("prompt", "before", "after"), clean)


def reward_note(run: Path) -> str:
    """What the policy starts from, and how good the reward model is."""
    result = json.loads((run / "result.json").read_text())
    base, accuracy = result["base"], interval(result["after"]["accuracy"])
    return (
        f"The base is {base['name']} (weights {base['hash'][:12]}); it goes on with the first six words of reviews. "
        "The reward is the log-odds of a positive review, clipped at 4, of a classifier made from the same base with "
        f"{REVIEWS['train']:,} IMDB reviews (their last 40 tokens); its accuracy on {REVIEWS['eval']:,} others is "
        f"{accuracy}. It judges prompt and completion together, as text."
    )


if __name__ == "__main__":
    sys.exit("run evidence/ppo.py or evidence/grpo.py")
