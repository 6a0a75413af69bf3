"""One contest: the contestants take turns, round after round, each in its own process; medians and ratios come out."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import PEERS, PROGRAMS
from material import reward_model

HERE = Path(__file__).parent
WARM_UP_STEPS = 2
GROUP = 4
"""Completions of a prompt in grpo and ppo."""
MINIBATCHES = 1
"""Optimizer steps in a pass over a round of ppo; with four passes, TRL's defaults."""
KL_COEF = 0.05
"""Price of the KL in ppo, TRL's default."""


_COMPARED = {"ppo": ("reward", "value_loss", "ratio")}
"""What of a line of metrics.jsonl stands beside a peer's numbers, where it is not the loss."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is done, the same for all: `kind` is a stage or `generate`; `batch` rows a step."""

    name: str
    kind: str
    model: Path
    data: Path
    method: str = "lora"
    batch: int = 16
    steps: int = 6
    learning_rate: float = 1e-4
    precision: str = "bfloat16"
    threads: int = 2
    max_tokens: int = 64
    device: str = "cpu"
    temperature: float = 1.0
    epochs: int = 4
    reward: Path | None = None

    @property
    def steps_a_round(self) -> int:
        """Optimizer steps that make one step of the work: ppo counts rounds."""
        return self.epochs * MINIBATCHES if self.kind == "ppo" else 1


@dataclass(frozen=True, slots=True)
class Contestant:
    """Who does it, with the settings tried; `tunesmith` is us, with a user's defaults. `needs` are packages that the
    settings ask for."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    program: str = "trl"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: tokens a second over the steps after warm-up, peak memory, losses, seconds in all."""

    tokens_per_second: float
    peak_memory_bytes: int
    losses: tuple[float, ...]
    wall_seconds: float
    first_step_seconds: float
    error: str = ""


def run_contest(work: Work, contestants: Sequence[Contestant], *, rounds: int) -> dict[str, list[Outcome]]:
    """`rounds` turns of every contestant, interleaved; their environments are there."""
    found: dict[str, list[Outcome]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        for contestant in contestants:
            outcome = _turn(work, contestant)
            found[contestant.name].append(outcome)
            shown = outcome.error or f"{outcome.tokens_per_second:,.1f} tokens/s"
            print(f"{work.name} round {number + 1}/{rounds} {contestant.name}: {shown}", file=sys.stderr, flush=True)
    return found


def median(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The outcome of median speed among those that ran."""
    ran = sorted((o for o in outcomes if not o.error), key=lambda o: o.tokens_per_second)
    return ran[len(ran) // 2] if ran else None


def _turn(work: Work, contestant: Contestant) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = _ours(work, folder) if contestant.name == "tunesmith" else _peer(work, contestant, folder)
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(work.threads), "TUNESMITH_CACHE": str(folder / "cache"),
            "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        started = time.time()
        with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=folder)
            first = _first_step(process, folder / "run" / "metrics.jsonl")
            code = process.wait(timeout=3600)
        wall = time.time() - started
        if code:
            said = (folder / "err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return Outcome(0.0, 0, (), wall, 0.0, (said or ["failed"])[-1][:200])
        return _outcome(work, contestant, folder, wall, None if first is None else first - started)


def _first_step(process: subprocess.Popen[bytes], metrics: Path) -> float | None:
    """When the first line of `metrics` stood there; None for a process that writes none."""
    while process.poll() is None:
        if metrics.is_file() and metrics.stat().st_size:
            return time.time()
        time.sleep(0.02)
    return None


def _ours(work: Work, folder: Path) -> list[str]:
    if work.kind == "generate":
        return [sys.executable, str(HERE / "ours_generate.py"), str(_spec(work, Contestant("tunesmith"), folder))]
    import yaml

    recipe = {
        "stage": work.kind, "base": str(work.model), "precision": work.precision, "device": work.device,
        "threads": work.threads,
        "data": {"train": str(work.data), "max_length": 2048 if work.kind != "classify" else 512},
        "tune": {"method": work.method, **({"rank": 16, "alpha": 32} if work.method == "lora" else {})},
        "train": {
            "steps": work.steps * work.steps_a_round, "batch_examples": work.batch, "learning_rate": work.learning_rate,
        },
    }  # fmt: skip
    if work.kind == "classify":
        recipe["data"]["on_too_long"] = "truncate_left"
    if work.kind == "grpo":
        recipe["reward"] = {"length": {"target": work.max_tokens}}
        recipe["sampling"] = {"max_tokens": work.max_tokens, "continue_prompt": True}
        recipe["grpo"] = {"prompts": work.batch // GROUP, "group": GROUP}
        del recipe["train"]["batch_examples"]
    if work.kind == "ppo":
        recipe["reward"] = {"run": str(work.reward)}
        recipe["sampling"] = {
            "max_tokens": work.max_tokens, "continue_prompt": True, "num_per_prompt": GROUP,
            "temperature": work.temperature,
        }  # fmt: skip
        recipe["ppo"] = {
            "rollouts": work.batch, "epochs": work.epochs, "minibatches": MINIBATCHES, "kl_coef": KL_COEF,
        }  # fmt: skip
        del recipe["train"]["batch_examples"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return [sys.executable, "-m", "tunesmith", "train", "recipe.yaml", "--run", str(folder / "run"), "--json"]


def _peer(work: Work, contestant: Contestant, folder: Path) -> list[str]:
    program = PROGRAMS[contestant.program]
    script = PEERS / ("generate.py" if work.kind == "generate" else program.script)
    return [str(program.python), str(script), str(_spec(work, contestant, folder))]


def _spec(work: Work, contestant: Contestant, folder: Path) -> Path:
    spec = {
        **{name: getattr(work, name) for name in Work.__dataclass_fields__}, "group": GROUP, "minibatches": MINIBATCHES,
        "kl_coef": KL_COEF, "settings": dict(contestant.settings), "output": str(folder / "peer"),
        "reward": reward_model(work.reward) if work.reward else None,
    }  # fmt: skip
    path = folder / "spec.json"
    path.write_text(json.dumps(spec, default=str), encoding="utf-8")
    return path


def _outcome(work: Work, contestant: Contestant, folder: Path, wall: float, first: float | None) -> Outcome:
    answer = json.loads((folder / "out").read_text(encoding="utf-8").strip().splitlines()[-1])
    if contestant.name == "tunesmith" and work.kind != "generate":
        timings, metrics = (_rows(folder / "run" / name) for name in ("timings.jsonl", "metrics.jsonl"))
        each = work.steps_a_round
        answer = {
            "seconds": [sum(row["seconds"] for row in timings[i : i + each]) for i in range(0, len(timings), each)],
            "tokens": [_tokens(work, row["tokens"]) for row in timings[::each]],
            "losses": [row[name] for row in metrics for name in _COMPARED.get(work.kind, ("loss",))],
            "peak_memory_bytes": answer["peak_memory_bytes"],
        }
    skip = min(WARM_UP_STEPS, len(answer["seconds"]) - 1)
    rates = [t / s for t, s in zip(answer["tokens"][skip:], answer["seconds"][skip:], strict=True)]
    waited = answer.get("first_step_seconds", 0.0) if first is None else first
    return Outcome(statistics.median(rates), answer["peak_memory_bytes"], tuple(answer["losses"]), wall, waited)


def _tokens(work: Work, seen: int) -> int:
    """Tokens of a step: those of its rows; where they are sampled, what is asked for (no one ends before it)."""
    return work.batch * work.max_tokens if work.kind in ("grpo", "ppo") else seen


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
