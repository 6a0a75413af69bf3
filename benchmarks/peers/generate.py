"""transformers' `generate` on the benchmark's prompts: `python generate.py SPEC.json` prints one JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from timing import Times, answer, read_spec, seconds_now
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    spec, times = read_spec(), Times()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    dtype = torch.bfloat16 if spec["precision"] == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).eval().to(spec["device"])
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: spec["batch"]]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(spec["device"])
    tokens = []
    for _ in range(spec["steps"]):
        started = seconds_now()
        with torch.no_grad():
            out = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=spec["max_tokens"],
                min_new_tokens=spec["max_tokens"],
            )  # fmt: skip
        times.seconds.append(seconds_now() - started)
        tokens.append(out.shape[0] * spec["max_tokens"])
    answer(times, tokens)


if __name__ == "__main__":
    main()
