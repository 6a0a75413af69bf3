"""What an answer costs: a base, its adapter beside it and merged into it; `serve` over HTTP; `predict` by rows."""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Place, needs_encoder, place, rows_of, table, train, write

import tunesmith
from tunesmith.model import lora
from tunesmith.model.load import load_backbone

BASE = "tunesmith/reviews-1m"
SPEC = lora.LoraSpec(rank=16, alpha=32)
QUESTIONS = ("Name a fruit.", "Rewrite in the past tense: I walk home.", "What is two plus two?")
MANY = 256
"""Rows of `predict`."""
MALFORMED = (
    ("no JSON", b"{", 400),
    ("an unknown key", b'{"messages": [{"role": "user", "content": "hi"}], "temprature": 1}', 400),
    ("a stream", b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}', 400),
    ("no messages", b"{}", 400), ("too many tokens", b'{"prompt": "a", "max_tokens": 99999}', 400),
    ("a prompt beyond the context", json.dumps({"prompt": "word " * 5000, "max_tokens": 4}).encode(), 400),
)  # fmt: skip
Url = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=100, help="passes of each model, interleaved")
    parser.add_argument("--requests", type=int, default=30, help="requests of each client")
    where, options = place("latency", parser)
    where.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    encoder = load_backbone(needs_encoder(where), "classifier", label_names=["0", "1"]).base_model
    models = [
        _three("all-MiniLM-L6-v2, 128 tokens", encoder, 30522),
        _three(f"{BASE}, 128 tokens", load_backbone(BASE, "causal"), 4096),
    ]
    passes = "\n\n".join([_PASSES.format(options.passes), _passes(models, options.passes)])
    run = _tuned(where)
    sections = [passes, _served(run, options.requests), _predicted(where, run)]
    write("latency", "Latency: merged and unmerged, served, predicted", *sections)


_PASSES = (
    "## One forward\n\nLoRA of rank 16 beside all linear layers of the blocks, its B filled as training would, against "
    "the base, and merged into it: the same modules as the base, by name and kind. Median milliseconds of {} forwards "
    "of one row, the three in turn, so that whatever else runs on the machine meets all alike; quartiles in brackets. "
    "Ratios are medians of the pairs within a turn, with their quartiles."
)


def _three(name: str, base: Any, vocabulary: int) -> tuple[str, dict[str, Any], torch.Tensor]:
    """(name, the base, with the adapter, and with it merged; one row of ids)."""
    base = base.eval().requires_grad_(False)
    beside = copy.deepcopy(base)
    linears = [n for n, m in beside.named_modules() if lora.is_linear(m) and "layer" in n]
    generator = torch.Generator().manual_seed(0)
    for layer in lora.inject(beside, linears, SPEC).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.01)
    beside.eval()
    merged = copy.deepcopy(beside)
    lora.merge(merged)
    lora.remove(merged)
    kinds = [[(n, type(m).__name__) for n, m in model.named_modules()] for model in (base, merged)]
    assert kinds[0] == kinds[1], "a merged model has other modules than its base"
    ids = torch.randint(10, vocabulary, (1, 128), generator=generator)
    return name, {"base": base, "adapter beside": beside, "merged": merged}, ids


@torch.no_grad()
def _passes(models: list[tuple[str, dict[str, Any], torch.Tensor]], num: int) -> str:
    rows = []
    for name, three, ids in models:
        seconds: dict[str, list[float]] = {kind: [] for kind in three}
        for turn in range(num + 5):
            for kind in sorted(three, key=lambda kind, turn=turn: (list(three).index(kind) + turn) % 3):
                began = time.perf_counter()
                three[kind](input_ids=ids)
                if turn >= 5:
                    seconds[kind].append(time.perf_counter() - began)
        base = np.asarray(seconds["base"])
        for kind, values in seconds.items():
            low, middle, high = np.quantile(1e3 * np.asarray(values), [0.25, 0.5, 0.75])
            ratios = np.quantile(np.asarray(values) / base, [0.25, 0.5, 0.75])
            ratio = "–" if kind == "base" else f"{ratios[1]:.3f} [{ratios[0]:.3f}, {ratios[2]:.3f}]"
            rows.append((name, kind, f"{middle:.2f} [{low:.2f}, {high:.2f}]", ratio))
    return table(("model", "", "ms a forward", "over the base"), rows)


def _tuned(where: Place) -> Path:
    """A run to serve: a few steps of instructions with LoRA."""
    rows = json.loads(where.asset("data/instruction/instruction-data.json").read_text())[:300]
    data = where.runs / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    recipe = where.runs / "recipe.yaml"
    recipe.write_text(
        f"stage: sft\nbase: {BASE}\n"
        "data: {train: rows.json, split: {eval: 0.1}, max_length: 256, on_too_long: drop}\n"
        "tune: {method: lora, rank: 16}\ntrain: {steps: 20, batch_examples: 8, learning_rate: 3e-3}\n",
        encoding="utf-8",
    )
    train(where.runs / "tuned", recipe)
    return where.runs / "tuned"


def _served(run: Path, requests: int) -> str:
    """The server as a process of its own: latency by clients, refusals, its memory, and how it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "serve", str(run), "--port", "0"], stderr=subprocess.PIPE, text=True,
        preexec_fn=_heed_interrupts,
    )  # fmt: skip
    log: list[str] = []
    try:
        url = _address(process, log)
        threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
        _ask(url, "/v1/chat/completions", _chat(0))
        rows = [_clients(url, clients, requests) for clients in (1, 4)]
        refused = [(what, *_refusal(url, body, status)) for what, body, status in MALFORMED]
        health = _ask(url, "/health", None)[1]
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    said = next((line.strip() for line in reversed(log) if "finishing" in line), "nothing")
    note = (
        f"`tunesmith serve` on a run of sft with LoRA on {BASE}, in a process of its own, asked over HTTP on loopback: "
        f"chat completions of at most 24 tokens, greedy, {requests} a client, a new connection for each. One request "
        "is computed at a time, so four clients wait for each other and the requests a second stay."
    )
    head = ("clients", "requests/s", "median ms", "95th percentile ms", "tokens/s")
    ended = (
        f"Peak memory of the server: {health['peak_memory_bytes'] / 2**20:,.0f} MiB. After all of it "
        f"{health['answered']} requests had been computed. Ctrl-C: exit code {code}, said `{said}`."
    )
    parts = [f"## Served\n\n{note}", table(head, rows), table(("malformed", "status", "answer"), refused), ended]
    return "\n\n".join(parts)


def _heed_interrupts() -> None:
    """A shell's background jobs, and all they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _address(process: subprocess.Popen[str], log: list[str]) -> Url:
    for line in process.stderr or ():
        log.append(line)
        if found := re.search(r"http://([\d.]+):(\d+)", line):
            return found[1], int(found[2])
    raise SystemExit(f"the server ended: {''.join(log)}")


def _chat(i: int) -> bytes:
    turns = [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]
    return json.dumps({"messages": turns, "max_tokens": 24, "temperature": 0}).encode()


def _ask(url: Url, path: str, body: bytes | None) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(*url, timeout=120)
    connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text)


def _clients(url: Url, clients: int, requests: int) -> tuple[Any, ...]:
    """(clients, requests a second, median and 95th percentile milliseconds, tokens a second)."""
    seconds, tokens = list[float](), list[int]()

    def client() -> None:
        for i in range(requests):
            began = time.perf_counter()
            status, found = _ask(url, "/v1/chat/completions", _chat(i))
            assert status == 200, found
            seconds.append(time.perf_counter() - began)
            tokens.append(found["usage"]["completion_tokens"])

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - began
    assert len(seconds) == clients * requests, "a client was refused"
    return (clients, f"{len(seconds) / whole:.1f}", f"{1e3 * statistics.median(seconds):.0f}",
            f"{1e3 * float(np.quantile(seconds, 0.95)):.0f}", f"{sum(tokens) / whole:.0f}")  # fmt: skip


def _refusal(url: Url, body: bytes, wanted: int) -> tuple[Any, ...]:
    path = "/v1/completions" if b'"prompt"' in body else "/v1/chat/completions"
    status, found = _ask(url, path, body)
    assert status == wanted, (status, found)
    return status, found["error"]["message"].replace("|", "\\|")[:160]


def _predicted(where: Place, run: Path) -> str:
    """`predict` from Python: the run is opened, its rows are answered."""
    prompts = [row["instruction"] for row in rows_of_json(where)][300 : 300 + MANY]
    reviews = [row["text"] for row in rows_of(where.asset("data/imdb/imdb_truncated_validation.jsonl"))[:MANY]]
    classifier = where.runs / "classifier"
    recipe = where.runs / "classify.yaml"
    recipe.write_text(
        f"stage: classify\nbase: {BASE}\ntune: {{method: lora, rank: 16}}\n"
        f"data: {{train: {where.asset('data/imdb/imdb_truncated_train.jsonl')}, max_length: 128, "
        "on_too_long: truncate_left, split: {eval: 0.1}}\n"
        "train: {steps: 10, batch_examples: 8}\nevaluate: {baselines: false}\n",
        encoding="utf-8",
    )
    train(classifier, recipe)
    rows = [
        _rate("labels of reviews (128 tokens kept)", lambda n: tunesmith.predict(classifier, reviews[:n])),
        _rate("answers of at most 24 tokens", lambda n: tunesmith.predict(run, prompts[:n], max_tokens=24)),
    ]
    note = (
        f"`tunesmith.predict` from Python, opening the run included: what one row takes, what {MANY} take. Medians of "
        "5, in turn."
    )
    return f"## Predicted\n\n{note}\n\n{table(('', 'one row, s', f'{MANY} rows, s', 'rows/s'), rows)}"


def rows_of_json(where: Place) -> list[dict[str, str]]:
    """The instructions."""
    return json.loads(where.asset("data/instruction/instruction-data.json").read_text())


def _rate(what: str, predict: Callable[[int], Any]) -> tuple[str, str, str, str]:
    seconds: dict[int, list[float]] = {1: [], MANY: []}
    for _ in range(5):
        for num, found in seconds.items():
            began = time.perf_counter()
            predict(num)
            found.append(time.perf_counter() - began)
    one, many = (statistics.median(found) for found in seconds.values())
    return what, f"{one:.2f}", f"{many:.2f}", f"{MANY / many:.0f}"


if __name__ == "__main__":
    main()
