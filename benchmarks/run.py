"""`make bench`: tunesmith against its peers on the same work, interleaved in one session of the machine.

    python benchmarks/run.py [--part sft_lora] [--rounds 3] [--peers litgpt] [--device cuda]

The peers live in environments of their own, `.venv-peers*`, which the first call installs from peers/requirements*.txt;
LitGPT, LLaMA-Factory and Unsloth take part where `--peers` names them or their environment is there. Every part prints
a table of medians and ratios and writes it to benchmarks/results/PART.md with the command, the machine and its measured
matmul rate. A part first checks that all programs compute the same losses.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from contest import Contestant, Outcome, Work, median, run_contest
from environments import PROGRAMS
from material import rows_file, shape_of
from parts import CACHE, OURS, Part, agreement_work, parts

AGREE = 2e-3
"""Largest relative difference between two contestants' losses of the same step, in fp32."""


def matmul_rate(work: Work) -> float:
    """Floating-point operations a second of a square matrix product: the machine's own ceiling."""
    import torch

    torch.set_num_threads(work.threads)
    size = 8192 if work.device == "cuda" else 2048
    a = torch.randn(size, size, dtype=getattr(torch, work.precision), device=work.device)
    rates = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, a)
        if work.device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def present(part: Part, asked: Sequence[str], device: str) -> tuple[Part, dict[str, str]]:
    """The part with those who can take part, their programs installed, and why the others cannot."""
    stay, skipped = [], {}
    for contestant in part.contestants:
        reason = "" if contestant == OURS else _absent(contestant, asked, device)
        if reason:
            skipped[contestant.name] = reason
            print(f"{part.work.name} without {contestant.name}: {reason}", file=sys.stderr, flush=True)
        else:
            stay.append(contestant)
    return replace(part, contestants=tuple(stay)), skipped


def _absent(contestant: Contestant, asked: Sequence[str], device: str) -> str:
    program = PROGRAMS[contestant.program]
    if program.asked and program.name not in asked and not program.installed:
        return f"not installed; `make bench PEERS={program.name}` installs it"
    try:
        program.install(device)
    except OSError as error:
        return str(error)
    lacks = program.lacks(contestant.needs)
    return f"{lacks} is not in {program.folder}" if lacks else ""


def agreement(part: Part) -> str:
    """The losses of the last contestant of every program beside ours."""
    if not part.agree_steps:
        return "not applicable"
    work = part.work
    kind, shape = work.data.name.split("-")[0], shape_of(work.model)
    assert shape is not None, "only work on our own shapes has losses to compare"
    data = rows_file(CACHE, kind, work.batch, shape.vocabulary, seed=1)
    last = {contestant.program: contestant for contestant in part.contestants if contestant != OURS}
    small = agreement_work(work, data, part.agree_steps)
    found = run_contest(small, [OURS, *last.values()], rounds=1)
    ours = found.pop(OURS.name)[0]
    return "; ".join(_verdict(name, ours, theirs[0]) for name, theirs in found.items()) or "nobody to compare with"


def _verdict(name: str, ours: Outcome, theirs: Outcome) -> str:
    if ours.error or theirs.error:
        return f"{name} NOT CHECKED: {ours.error or theirs.error}"
    if len(ours.losses) != len(theirs.losses):
        return f"{name} NOT CHECKED: {len(ours.losses)} numbers beside {len(theirs.losses)}"
    worst = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours.losses, theirs.losses, strict=True))
    verdict = "agrees" if worst <= AGREE else "DISAGREES"
    return f"{name} {verdict}, largest relative difference {worst:.1e} over {len(ours.losses)} numbers"


def flops_share(work: Work, outcome: Outcome, ceiling: float) -> str:
    """Share of the matmul rate: 2 forward + 2 backward (+ 2 for weight gradients) per weight and token, no head.

    Nothing for work that is mostly sampling."""
    shape = shape_of(work.model)
    if shape is None or work.kind in ("generate", "ppo"):
        return ""
    head = shape.width // shape.heads
    attention = shape.width * (2 * shape.width + 2 * head * shape.key_value_heads)
    weights = shape.layers * (attention + 3 * shape.width * shape.inner)
    return f"{(4 if work.method == 'lora' else 6) * weights * outcome.tokens_per_second / ceiling:.0%}"


def report(
    part: Part,
    found: Mapping[str, Sequence[Outcome]],
    skipped: Mapping[str, str],
    *,
    agreed: str,
    ceiling: float,
    rounds: int,
) -> str:
    """The part's table, as markdown."""
    work, ours = part.work, median(found["tunesmith"])
    lines = [
        f"# {work.name}",
        "",
        f"`{_command(work)}` on {datetime.date.today()}: {_machine(work)}; {work.precision}, "
        f"{work.threads} threads, matmul rate {ceiling / 1e9:.0f} GFLOP/s; {rounds} rounds interleaved, medians.",
        f"Work: {work.kind}, {work.model.name}, {work.method}, {work.batch} rows a step. Losses: {agreed}.",
        "",
        "| contestant | tokens/s | ours is | peak memory MB | share of matmul rate | command to first step, s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for contestant in part.contestants:
        outcomes = found[contestant.name]
        middle = median(outcomes)
        if middle is None:
            lines.append(f"| {contestant.name} | failed: {outcomes[0].error} | | | | |")
            continue
        ratio = f"{ours.tokens_per_second / middle.tokens_per_second:.1f}x" if ours else ""
        lines.append(
            f"| {contestant.name} | {middle.tokens_per_second:,.1f} | {ratio} | {middle.peak_memory_bytes / 1e6:,.0f} "
            f"| {flops_share(work, middle, ceiling)} | {_seconds(middle.first_step_seconds)} |"
        )
    lines += [f"| {name} | skipped: {reason} | | | | |" for name, reason in skipped.items()]
    return "\n".join(lines) + "\n"


def _command(work: Work) -> str:
    return f"make bench PART={work.name}" + (" DEVICE=cuda" if work.device == "cuda" else "")


def _seconds(found: float) -> str:
    """Nothing for what has no first step."""
    return f"{found:.1f}" if found else ""


def _machine(work: Work) -> str:
    import torch

    where = torch.cuda.get_device_name() if work.device == "cuda" else f"{os.cpu_count()} cores"
    return f"{platform.machine()}, {where}, torch {torch.__version__}, Python {platform.python_version()}"


def contest(part: Part, asked: Sequence[str], rounds: int) -> str:
    """One part: who can take part, agreement, the contest, its table."""
    part, skipped = present(part, asked, part.work.device)
    agreed = agreement(part)
    print(f"{part.work.name}, losses: {agreed}", file=sys.stderr, flush=True)
    ceiling = matmul_rate(part.work)
    found = run_contest(part.work, part.contestants, rounds=rounds)
    return report(part, found, skipped, agreed=agreed, ceiling=ceiling, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="tunesmith against its peers, side by side")
    parser.add_argument("--part", action="append", help="one part; may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    optional = [program.name for program in PROGRAMS.values() if program.asked]
    parser.add_argument("--peers", action="append", choices=optional, default=[], help="install these peers too")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    known = parts(options.device)
    unknown = [name for name in options.part or () if name not in known]
    if unknown:
        parser.error(f"no part {', '.join(unknown)} on {options.device}; there are {', '.join(known)}")
    for name in options.part or known:
        text = contest(known[name](), options.peers, options.rounds)
        (results / f"{name}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
