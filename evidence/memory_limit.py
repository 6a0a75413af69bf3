"""The worked example under a limit of memory: the smallest one it completes under, and what is said below it.

The limit is RLIMIT_DATA, set on the process before it starts: what it allocates for itself (heap and anonymous
mappings), which files mapped for reading do not count towards. That is the closest of a process's limits to memory
really used, and needs no rights, unlike a control group.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, Place, interval, needs_encoder, place, rows_of, table, write

RECIPE = ROOT / "examples" / "imdb_lora" / "recipe.yaml"
QUERY = "{method: lora, rank: 4, alpha: 32, dropout: 0.01, targets: [query]}"
LIMITS = {2048: (), 1024: (), 768: (), 640: (), 512: ()}
LOWERED = {768: ("train.micro_batch_tokens=1024",), 640: ("train.micro_batch_tokens=512",)}
"""MiB -> overrides: as the recipe stands, and where that is too much, as the message advises."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps of 4 reviews")
    parser.add_argument("--rows", type=int, default=40, help="held-out reviews")
    where, options = place("memory_limit", parser)
    where.runs.mkdir(parents=True, exist_ok=True)
    held = where.runs / f"held-{options.rows}.jsonl"
    rows = rows_of(where.asset("data/imdb/imdb_truncated_validation.jsonl"))[: options.rows]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [*LIMITS.items(), *LOWERED.items()]
    found = [_under(where, held, limit, overrides, options.steps) for limit, overrides in asked]
    write("memory_limit", "The worked example under a limit of memory", _section(found, options))


def _under(where: Place, held: Path, limit: int, overrides: tuple[str, ...], steps: int) -> dict[str, Any]:
    """The run under `limit` MiB; what was found is kept, and measured again only when its file is removed."""
    kept = where.runs / f"{'-'.join((str(limit), *overrides))}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    run = where.runs / f"run-{limit}-{time.time_ns()}"
    data = where.asset("data/imdb/imdb_truncated_train.jsonl")
    command = [
        sys.executable, "-m", "tunesmith", "train", str(RECIPE), f"base={needs_encoder(where)}", f"data.train={data}",
        f"data.eval={held}", "data.max_length=512", f"tune={QUERY}", "train.epochs=null", f"train.steps={steps}",
        "evaluate.baselines=false", *overrides, "--run", str(run),
    ]  # fmt: skip
    print(f"{limit} MiB: {' '.join(command[2:])}", file=sys.stderr, flush=True)

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))

    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lower)
    found = {"limit": limit, "set": list(overrides), "code": done.returncode, "seconds": time.perf_counter() - began,
             "said": done.stderr.strip().splitlines()[-1:], "traceback": "Traceback" in done.stderr}  # fmt: skip
    if done.returncode == 0:
        result = json.loads((run / "result.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
        found |= {"peak": result["peak_memory_bytes"], "device": environment["device"], "wall": result["seconds"],
                  "accuracy": result["after"]["accuracy"]}  # fmt: skip
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def _section(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    rows = []
    for entry in found:
        if entry["code"] == 0:
            cells = (entry["device"], f"{entry['peak'] / 2**20:,.0f}", f"{entry['wall']:.0f}",
                     interval(entry["accuracy"]), "")  # fmt: skip
        else:
            message = " ".join(entry["said"]).replace(str(ROOT.parent), "").replace("|", "\\|")
            cells = ("–", "–", f"{entry['seconds']:.0f}", "–", message + (" (a traceback)" * entry["traceback"]))
        rows.append((f"{entry['limit']:,}", " ".join(entry["set"]) or "–", entry["code"], *cells))
    least = min((entry["limit"] for entry in found if entry["code"] == 0), default=None)
    below = (
        "Below about 400 MiB the libraries themselves do not load any more, and some of them end the process without a "
        "word that could be caught."
    )
    note = (
        f"examples/imdb_lora with all-MiniLM-L6-v2 (22.7M parameters, fp32), LoRA r 4 on the query projections, 512 "
        f"tokens, {options.steps} steps of 4 reviews, {options.rows} held-out reviews measured before and after. The "
        "limit is RLIMIT_DATA, set before the process starts. Device, peak and seconds are those of the run's own "
        "result, which its report shows; the peak is resident memory and holds mapped files too, which the limit does "
        "not count. Few steps: the accuracy says only that it trains. Others used the machine, so seconds are no speed."
    )
    said = "It completes under none of them." if least is None else f"It completes under {least:,} MiB and more."
    head = (
        "limit, MiB",
        "set beside the recipe",
        "exit code",
        "device",
        "peak resident, MiB",
        "seconds",
        "accuracy",
        "said at the end",
    )
    return f"{note}\n\n{table(head, rows)}\n\n{said} {below}"


if __name__ == "__main__":
    main()
