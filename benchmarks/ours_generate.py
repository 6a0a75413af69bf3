"""tunesmith's sampler on the benchmark's prompts: `python ours_generate.py SPEC.json` prints one JSON line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from tunesmith.model.language import LanguageModel
from tunesmith.model.load import load_backbone, load_tokenizer
from tunesmith.plan.hardware import peak_memory_bytes
from tunesmith.rollout.sampler import Sampler


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    tokenizer = load_tokenizer(spec["model"])
    dtype = torch.bfloat16 if spec["precision"] == "bfloat16" else torch.float32
    model = LanguageModel(load_backbone(spec["model"], "causal"), compute=dtype).eval().to(spec["device"])
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["prompt"] for line in lines[: spec["batch"]]]
    prompts = [tokenizer(row)["input_ids"] for row in rows]
    sampler = Sampler(model, tokenizer)
    seconds, tokens = [], []
    for number in range(spec["steps"]):
        started = time.perf_counter()
        rollouts = sampler.sample(prompts, max_tokens=spec["max_tokens"], seed=number)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(rollout.ids) for rollout in rollouts))
    peak = peak_memory_bytes(spec["device"])
    print(json.dumps({"seconds": seconds, "tokens": tokens, "losses": [], "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
