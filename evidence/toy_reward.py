"""toy_reward: a task whose optimum is known (write the word "birds") by grpo and by ppo, from near 0 to above 0.9."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from common import RECIPES, interval, place, rows_of, table, write
from sentiment import side_by_side, train

STAGES = {
    "grpo": ("grpo.prompts=6", "grpo.group=8", "grpo.kl_coef=0.0"),
    "ppo": ("ppo.rollouts=48", "ppo.epochs=2", "ppo.minibatches=2", "ppo.kl_coef=0.002", "train.steps=96",
            "ppo.critic_learning_rate=1e-3"),
}  # fmt: skip


_WHO = ("girl named Lily", "boy named Tim", "dog named Max", "cat named Mia", "bird named Sam", "bear named Ben")
_WHERE = ("in a big house", "near the park", "by the sea", "in the forest", "on a farm", "in a small town")
_THEN = ("One day", "Today", "In the morning", "One night")


def prompts(folder: Path) -> dict[str, Path]:
    """144 beginnings of stories, a third held out; the split is seeded."""
    found = [
        f"Once upon a time, there was a {who} who lived {where}. {then},"
        for who, where, then in itertools.product(_WHO, _WHERE, _THEN)
    ]
    random.Random(0).shuffle(found)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for side, texts in (("train", found[:96]), ("eval", found[96:])):
        files[side] = folder / f"prompts-{side}.jsonl"
        files[side].write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return files


def main() -> None:
    where, _ = place("toy_reward")
    files, rows, samples = prompts(where.runs / "data"), [], []
    for stage, settings in STAGES.items():
        run = where.runs / stage
        train(
            run, RECIPES / "toy_reward.yaml", f"stage={stage}", f"base={where.asset('models/tinystories-656K')}",
            f"data.train={files['train']}", f"data.eval={files['eval']}", *settings,
        )  # fmt: skip
        result, steps = json.loads((run / "result.json").read_text()), rows_of(run / "metrics.jsonl")
        reached = next((s["step"] for s in steps if s["reward"] > 0.9), None)
        rows.append(
            (stage, interval(result["before"]["reward"]), interval(result["after"]["reward"]),
             interval(result["after"]["kl"], 1), len(rows_of(run / "rollouts.jsonl")), reached)
        )  # fmt: skip
        samples.append(f"## {stage}\n\n{side_by_side(run, 4)}")
    head = ("stage", "reward before", "after", "KL (nats)", "rollouts", "first step above 0.9")
    write("toy_reward", 'The word "birds" in 16 tokens, 656,000 parameters', table(head, rows), *samples)


if __name__ == "__main__":
    main()
