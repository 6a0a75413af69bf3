"""chain: sft -> reward -> ppo from one file, killed twice on the way, against the same chain left alone.

Win rates on held-out prompts of the plain base, the base with two examples before each prompt, the sft stage and the
policy: by the chain's own reward model, and by a judge that no stage was trained on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RECIPES, ROOT, interval, place, rows_of, table, write
from pairs import SEED, instruction_pairs, split

import tunesmith
from tunesmith.rundir import RunDir
from tunesmith.stages.from_run import content

KILLS = (("1-sft", 100), ("3-ppo", 12))
"""Where the processes are killed: after so many steps of the stage."""
MAX_TOKENS, HELD_OUT = 32, 100


def main() -> None:
    where, _ = place("chain")
    base = where.asset("models/tinystories-656K")
    data = where.runs / "data"
    split(instruction_pairs(where.asset("data/instruction/instruction-data-with-preference.json")), data)
    _answers(json.loads(where.asset("data/instruction/instruction-data.json").read_text()), data)
    overrides = [f"base={base}"]
    for stage, prefix in (("sft", "answers-"), ("reward", ""), ("ppo", "prompts-")):
        overrides += [f"stages.{stage}.data.{side}={data}/{prefix}{side}.jsonl" for side in ("train", "eval")]
    killed, whole = where.runs / "killed", where.runs / "whole"
    kills = _run_and_kill(killed, overrides, where.runs / "kills.json")
    _train(whole, overrides)
    sections = [
        _lineage(killed, base), _same(killed, whole, kills), _stages(killed), _win_rates(where.runs, base, killed, data)
    ]  # fmt: skip
    write("chain", "chain: sft, reward and ppo from one file, 656,000 parameters", *sections, _samples(killed))


def _answers(rows: list[dict[str, str]], data: Path) -> None:
    """Demonstrations and prompts on the same side of the split as the preferences of the same prompt."""
    sides = {row["prompt"]: side for side in ("train", "eval") for row in rows_of(data / f"{side}.jsonl")}
    for side in ("train", "eval"):
        kept: dict[str, str] = {}
        for row in rows:
            prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
            if sides.get(prompt) == side and row["output"].strip():
                kept.setdefault(prompt, row["output"])
        demonstrations = [{"prompt": p, "completion": c} for p, c in kept.items()]
        prompts = [{"prompt": p, "answer": c} for p, c in kept.items()]
        for name, lines in (("answers", demonstrations), ("prompts", prompts)):
            kept_lines = lines if side == "train" else lines[:HELD_OUT]
            text = "".join(json.dumps(line) + "\n" for line in kept_lines)
            (data / f"{name}-{side}.jsonl").write_text(text, encoding="utf-8")


def _command(run: Path, overrides: list[str]) -> list[str]:
    begun = (run / "recipe.yaml").is_file()
    what = ["--resume", str(run)] if begun else [str(RECIPES / "chain.yaml"), *overrides, "--run", str(run)]
    return [sys.executable, "-m", "tunesmith", "train", *what]


def _train(run: Path, overrides: list[str]) -> dict[str, Any]:
    if not (run / "result.json").is_file():
        subprocess.run(_command(run, overrides), check=True)
    return json.loads((run / "result.json").read_text())


def _run_and_kill(run: Path, overrides: list[str], log: Path) -> list[dict[str, Any]]:
    """Train with a SIGKILL at each of `KILLS`, then to the end; what was killed where."""
    done: list[dict[str, Any]] = json.loads(log.read_text()) if log.is_file() else []
    for stage, step in KILLS[len(done) :]:
        process = subprocess.Popen(_command(run, overrides))
        metrics = run / stage / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < step:
            if process.poll() is not None:
                raise SystemExit(f"the chain ended with {process.returncode} before it could be killed in {stage}")
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done.append({"stage": stage, "step": metrics.read_bytes().count(b"\n"), "code": process.returncode})
        log.write_text(json.dumps(done))
    _train(run, overrides)
    return done


def _lineage(run: Path, base: Path) -> str:
    tree = "\n".join(json.loads((run / "result.json").read_text())["tree"]).replace(str(base), "tinystories-656K")
    return f"## Lineage\n\n```\n{tree}\n```"


def _same(killed: Path, whole: Path, kills: list[dict[str, Any]]) -> str:
    rows = []
    for name in ("1-sft", "2-reward", "3-ppo"):
        ours, theirs = ((run / name) for run in (killed, whole))
        if not (theirs / "result.json").is_file():
            rows.append((name, f"{len(rows_of(ours / 'metrics.jsonl')):,}", *["not compared"] * 3))
            continue
        weights = [next(p.glob("final/step_*/tensors.safetensors")).read_bytes() for p in (ours, theirs)]
        metrics = [(p / "metrics.jsonl").read_bytes() for p in (ours, theirs)]
        gives = [content(RunDir(p)) for p in (ours, theirs)]
        same = [("yes" if a == b else "NO") for a, b in (weights, metrics, gives)]
        rows.append((name, f"{len(metrics[0].splitlines()):,}", *same))
    told = " and ".join(f"after step {kill['step']} of {kill['stage']} (exit {kill['code']})" for kill in kills)
    head = ("stage", "steps", "same weights", "same metric file", "same content")
    return (
        f"## Killed and resumed\n\nSIGKILL {told}, then resumed; against the chain left alone:\n\n{table(head, rows)}"
    )


def _stages(run: Path) -> str:
    lineage = json.loads((run / "lineage.json").read_text())
    rows = []
    for stage in lineage["stages"]:
        own, probe = stage["own_task"], stage["probe"]
        cells = [interval(own[when]) for when in ("before", "after")]
        tax = f"{probe['change']['value']:+.4f} ({probe['since_base']:+.4f})" if probe else "gives no text"
        rows.append((stage["name"], own["metric"], *cells, tax))
    head = ("stage", "metric", "before", "after", "bits per byte outside the task (since the base)")
    tasks = [
        (row["task"], row["metric"], f"{row['before']['value']:.4f}",
         *(f"{row['after'][s['name']]['value']:.4f}" if s["name"] in row["after"] else "" for s in lineage["stages"]))
        for row in lineage["tasks"]
        if len(row["after"]) > 1
    ]  # fmt: skip
    columns = ("task of", "metric", "before", *(f"after {s['name']}" for s in lineage["stages"]))
    return f"## Stages and what they cost\n\n{table(head, rows)}\n\n{table(columns, tasks)}"


def _win_rates(runs: Path, base: Path, chain: Path, data: Path) -> str:
    """Every system over the one before it, by two judges."""
    prompts = data / "prompts-eval.jsonl"
    systems = {"base": str(base), "prompted": str(_prompted(runs, base, data)), "sft": str(chain / "1-sft"),
               "ppo": str(chain)}  # fmt: skip
    judges = {"own reward model": f"reward:{chain / '2-reward'}", "overlap": f"{ROOT}/evidence/judges.py:overlap"}
    rows, notes = [], []
    for a, b in (("prompted", "base"), ("sft", "base"), ("sft", "prompted"), ("ppo", "sft"), ("sft", "sft")):
        cells = []
        for name, judge in judges.items():
            to = runs / f"winrate-{a}-{b}-{name.partition(' ')[0]}-{content(tunesmith_run(chain))[:8]}.jsonl"
            found = tunesmith.winrate(systems[a], systems[b], prompts, judge, max_tokens=MAX_TOKENS, to=to)
            cells.append(f"{interval(found['win_rate'])}, {found['ties']} ties")
            notes += found["notes"]
        rows.append((f"{a} over {b}", *cells))
    assert notes, "the judge that was the reward is not named"
    said = "The own reward model is what ppo was trained on: its column says how well ppo met its reward."
    note = (
        f"{len(rows_of(prompts))} held-out prompts, greedy, at most {MAX_TOKENS} tokens, order random, ties half. "
        f"`overlap` is ROUGE-L with the reference answer, which no stage was trained on. {said} Prompted: two examples "
        "before each prompt."
    )
    return f"## Win rates\n\n{note}\n\n{table(('', *judges), rows)}"


def tunesmith_run(chain: Path) -> Any:
    """The run that gives the chain's model."""
    from tunesmith.rundir import model_run, open_run

    return model_run(open_run(chain))


def _prompted(runs: Path, base: Path, data: Path) -> Path:
    """Completions of the plain base with two examples before every prompt, under the prompts themselves."""
    to = runs / "prompted.jsonl"
    if to.is_file():
        return to
    examples = random.Random(SEED).sample([r for r in rows_of(data / "answers-train.jsonl") if len(str(r)) < 200], 2)
    shown = "".join(f"{row['prompt']}\n{row['completion']}\n\n" for row in examples)
    prompts = [row["prompt"] for row in rows_of(data / "prompts-eval.jsonl")]
    asked = runs / "prompted-prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": shown + prompt}) + "\n" for prompt in prompts))
    found = tunesmith.sample(base, asked, num=1, temperature=0.0, max_tokens=MAX_TOKENS)["rows"]
    rows = [
        {"prompt": p, "completions": [r["completions"][0].partition("\n\n")[0]]}
        for p, r in zip(prompts, found, strict=True)
    ]
    to.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


def _samples(run: Path) -> str:
    parts = ["## The same prompts, before and after ppo"]
    for row in rows_of(run / "3-ppo" / "samples.jsonl")[:3]:
        parts.append(
            f"**{row['prompt'].strip()[:300]}**\n\nbefore: {row['before'][:300]}\n\nafter: {row['after'][:300]}"
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
