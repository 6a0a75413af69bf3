"""PPO rounds by the last TRL that has a PPO trainer: `python train_ppo.py SPEC.json` prints one JSON line.

A step is a round: rollouts, rewards, and all passes over them. Policy with PEFT's LoRA, its start with the adapter
switched off; critic and reward model are the sequence classifier of the spec, the critic with LoRA and its head.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from timing import answer, read_spec, seconds_now
from torch import nn
from train import ALL_LINEAR, Clock, adapter, common
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


class RoundClock(Clock):
    """Seconds of every round, from the end of the one before; of the first, from the beginning of training.

    `losses` holds three numbers a round: mean reward, value loss and ratio, means over the round's passes.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started = seconds_now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._started = seconds_now()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "objective/scores" in logs:
            self.losses += [float(logs[key]) for key in ("objective/scores", "loss/value_avg", "val/ratio")]


class Scorer(nn.Module):
    """The reward model as the trainer calls it, asked at the end token that follows the completion.

    The trainer looks at the last token of what it passes, so everything moves one to the left.
    """

    base_model_prefix = "backbone"

    def __init__(self, classifier: nn.Module, end: int) -> None:
        super().__init__()
        self.inner, self.score, self.end = classifier.model, classifier.score, end

    def backbone(self, input_ids, attention_mask, position_ids, **how):
        def longer(rows, last):
            return torch.cat([rows, last.to(rows.dtype).reshape(-1, 1)], 1)

        found = self.inner(
            input_ids=longer(input_ids, torch.full_like(input_ids[:, -1], self.end)),
            attention_mask=longer(attention_mask, torch.ones_like(attention_mask[:, -1])),
            position_ids=longer(position_ids, position_ids[:, -1] + 1),
            **how,
        )
        found.hidden_states = (found.hidden_states[-1][:, 1:],)
        return found


def prompts(spec: dict, tokenizer) -> Dataset:
    """The rows of one round: every prompt as often as it is answered."""
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()[: spec["batch"] // spec["group"]]
    rows = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    return Dataset.from_dict({"input_ids": [row for row in rows for _ in range(spec["group"])]})


def build(spec: dict, clock: RoundClock):
    """TRL's trainer for the spec; `load` of its settings goes to `from_pretrained`."""
    if spec["precision"] == "bfloat16":  # as `accelerate launch --mixed_precision bf16` does
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    settings = dict(spec["settings"])
    load = settings.pop("load", {})
    policy = AutoModelForCausalLM.from_pretrained(spec["model"], **load)
    critic, judge = (AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, **load)
                     for _ in range(2))  # fmt: skip
    lora = adapter(spec, "SEQ_CLS", ALL_LINEAR)
    arguments = common(spec | {"settings": settings})
    del arguments["max_steps"]
    return PPOTrainer(
        args=PPOConfig(
            **arguments, total_episodes=spec["steps"] * spec["batch"], num_ppo_epochs=spec["epochs"],
            num_mini_batches=spec["minibatches"], response_length=spec["max_tokens"], temperature=spec["temperature"],
            kl_coef=spec["kl_coef"],
        ),
        processing_class=tokenizer, model=policy, ref_model=None, reward_model=Scorer(judge, tokenizer.eos_token_id),
        value_model=get_peft_model(critic, lora), train_dataset=prompts(spec, tokenizer),
        peft_config=adapter(spec, "CAUSAL_LM", ALL_LINEAR), callbacks=[clock],
    )  # fmt: skip


def main() -> None:
    spec = read_spec()
    clock = RoundClock()
    build(spec, clock).train()
    answer(clock, [spec["batch"] * spec["max_tokens"]] * len(clock.seconds))


if __name__ == "__main__":
    main()
