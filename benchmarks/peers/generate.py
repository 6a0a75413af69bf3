"""transformers' `generate` on the benchmark's prompts: `python generate.py SPEC.json` prints one JSON line."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    dtype = torch.bfloat16 if spec["precision"] == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).eval()
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: spec["batch"]]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    seconds, tokens = [], []
    for _ in range(spec["steps"]):
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=spec["max_tokens"],
                min_new_tokens=spec["max_tokens"],
            )  # fmt: skip
        seconds.append(time.perf_counter() - started)
        tokens.append(out.shape[0] * spec["max_tokens"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "tokens": tokens, "losses": [], "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
