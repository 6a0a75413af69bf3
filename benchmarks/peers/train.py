"""One training run by a peer, in the peers' own environment: `python train.py SPEC.json` prints one JSON line.

Kinds: sft, dpo, reward and grpo by TRL, classify by transformers' Trainer; LoRA by PEFT. `settings` of the spec are
passed to the peer's own config on top of what makes the runs comparable (rows a step, steps, precision, rate).
"""

from __future__ import annotations

import time

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from timing import Times, answer, read_spec, seconds_now
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback, Times):
    """Seconds of every optimizer step, and the losses the trainer logs."""

    def __init__(self) -> None:
        Times.__init__(self)
        self._started = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._started = seconds_now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(seconds_now() - self._started)
        self.first = self.first or time.time()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def adapter(spec: dict, task: str, targets: list[str]) -> LoraConfig | None:
    if spec["method"] != "lora":
        return None
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type=task)


def common(spec: dict) -> dict:
    return {
        "output_dir": spec["output"],
        "max_steps": spec["steps"],
        "learning_rate": spec["learning_rate"],
        "per_device_train_batch_size": spec["batch"],
        "use_cpu": spec["device"] == "cpu",
        "bf16": spec["precision"] == "bfloat16",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **spec["settings"],
    }


def token_counter(trainer, counts: list[int]):
    """Real tokens of every micro-batch, counted where the trainer prepares it."""
    prepare = trainer._prepare_inputs

    def counting(inputs):
        if not hasattr(inputs, "get"):  # the rows themselves, before they are made a batch
            return prepare(inputs)
        mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids")
        counts.append(int(mask.sum()) if mask is not None else (ids.numel() if ids is not None else 0))
        return prepare(inputs)

    trainer._prepare_inputs = counting


def build(spec: dict, clock: Clock):
    """The peer's trainer for the spec; `load` of its settings goes to `from_pretrained`."""
    kind, load = spec["kind"], spec["settings"].pop("load", {})
    data = load_dataset("json", data_files=spec["data"], split="train")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if kind == "classify":
        return _classifier(spec, data, tokenizer, clock)
    import trl

    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig, "grpo": trl.GRPOConfig}[kind]
    trainer = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "reward": trl.RewardTrainer, "grpo": trl.GRPOTrainer}[kind]
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, **load)
        lora = adapter(spec, "SEQ_CLS", ALL_LINEAR)
    else:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], **load)
        lora = adapter(spec, "CAUSAL_LM", ALL_LINEAR)
    extra = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]} if kind == "grpo" else {}
    more = {}
    if kind == "grpo":
        more = {"num_generations": spec["group"], "max_completion_length": spec["max_tokens"], "beta": 0.04}
    return trainer(
        model=model,
        args=config(**common(spec), **more),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
        **extra,
    )


def _classifier(spec: dict, data, tokenizer, clock: Clock):
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer.truncation_side = "left"
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=512), batched=True)
    data = data.rename_column("label", "labels").select_columns(["input_ids", "attention_mask", "labels"])
    model = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=2)
    lora = adapter(spec, "SEQ_CLS", ["query", "key", "value", "dense"])
    model = model if lora is None else get_peft_model(model, lora)
    args = TrainingArguments(**common(spec))
    return Trainer(
        model=model, args=args, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer), callbacks=[clock]
    )


def step_tokens(counts: list[int], steps: int) -> list[int]:
    """Tokens of every step from those of its micro-batches."""
    each = len(counts) // max(1, steps)
    return [sum(counts[i * each : (i + 1) * each]) for i in range(steps)]


def run(spec: dict, trainer, clock: Clock) -> None:
    """Train, and answer with the real tokens of every step; of grpo, those that are asked for."""
    counts: list[int] = []
    token_counter(trainer, counts)
    trainer.train()
    tokens = step_tokens(counts, len(clock.seconds))
    if spec["kind"] == "grpo":
        tokens = [spec["batch"] * spec["max_tokens"]] * len(clock.seconds)
    answer(clock, tokens)


def main() -> None:
    spec, clock = read_spec(), Clock()
    run(spec, build(spec, clock), clock)


if __name__ == "__main__":
    main()
