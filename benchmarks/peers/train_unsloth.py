"""sft with LoRA by Unsloth on one GPU: `python train_unsloth.py SPEC.json` prints one JSON line."""

from __future__ import annotations

import unsloth  # before trl and transformers, which it changes
from datasets import load_dataset
from timing import read_spec
from train import ALL_LINEAR, Clock, common, run
from trl import SFTConfig, SFTTrainer


def main() -> None:
    spec, clock = read_spec(), Clock()
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        spec["model"], max_seq_length=2048, load_in_4bit=False, full_finetuning=spec["method"] == "full"
    )
    if spec["method"] == "lora":
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=ALL_LINEAR,
            use_gradient_checkpointing=spec["settings"].pop("unsloth_checkpointing", "unsloth"),
        )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**common(spec)), processing_class=tokenizer, callbacks=[clock],
        train_dataset=load_dataset("json", data_files=spec["data"], split="train"),
    )  # fmt: skip
    run(spec, trainer, clock)


if __name__ == "__main__":
    main()
