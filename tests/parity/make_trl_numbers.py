"""Write `trl_numbers.json`: random inputs and the losses that TRL's own trainers compute from them.

Run once in an environment that has TRL (`pip install trl torch==2.13.0`): `python tests/parity/make_trl_numbers.py`.
The trainers' loss methods are called on a stand-in for the trainer, so that no model and no data set are needed: the
numbers are TRL's, the inputs are these. The suite compares with the file and does not need TRL.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LENGTHS = (4, 7, 2, 5, 3, 9)
"""Completion tokens: three chosen, then three rejected; six completions of a group for GRPO."""
PROMPT = 3


def stand_in(**settings: Any) -> MagicMock:
    """A trainer that has these settings; whatever it logs goes nowhere."""
    trainer = MagicMock()
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    for name in ("gather", "gather_for_metrics", "reduce", "unwrap_model"):
        getattr(trainer.accelerator, name).side_effect = lambda value, *_, **__: value
    trainer.accelerator.device, trainer.accelerator.num_processes = torch.device("cpu"), 1
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


class Said:
    """A model's outputs: these log-probs, and zeros for whatever else is only logged."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    def __getattr__(self, name: str) -> Tensor:
        return torch.zeros_like(self.log_probs, dtype=torch.bool if name == "is_top1" else None)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers with four decimals, so that the file holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale * 1e4).round() / 1e4


def completions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mask, policy, reference, old) `[6, 9]`: log-probs of completion tokens, 0 beyond each one's end."""
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).float()
    policy = -draw(1, 6, 9).abs() - 0.05
    reference = (policy + draw(2, 6, 9, scale=0.5)).clamp(max=-0.01)
    old = (policy + draw(3, 6, 9, scale=0.3)).clamp(max=-0.01)
    return mask, *((part * mask * 1e4).round() / 1e4 for part in (policy, reference, old))


def dpo(policy: Tensor, reference: Tensor, mask: Tensor, loss_type: str) -> float:
    """DPOTrainer's loss at beta 0.1."""
    trainer = stand_in(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], beta=0.1, label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    whole = torch.cat([torch.zeros(6, PROMPT), mask], 1).long()
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    logprobs = torch.cat([torch.zeros(6, PROMPT - 1), policy], 1)

    return float(DPOTrainer._compute_loss(trainer, lambda **_: Said(logprobs), inputs, False))


def grpo(policy: Tensor, reference: Tensor, old: Tensor, mask: Tensor, **settings: Any) -> float:
    """GRPOTrainer's loss, clips 0.2 and 0.28, at most 16 tokens a completion."""
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = stand_in(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", args=args,
        epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, vllm_importance_sampling_correction=False,
        max_completion_length=16, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        aux_loss_enabled=False, **settings,
    )  # fmt: skip
    trainer.model.training = True
    trainer._get_per_token_logps_and_entropies.return_value = (policy, torch.zeros_like(policy), None)
    inputs = {
        "prompt_ids": torch.ones(6, PROMPT).long(), "prompt_mask": torch.ones(6, PROMPT).long(),
        "completion_ids": torch.ones_like(mask).long(), "completion_mask": mask, "advantages": advantages(),
        "old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return float(GRPOTrainer._compute_loss(trainer, trainer.model, inputs))


def advantages() -> Tensor:
    return draw(4, 6)


def reward(scores: Tensor, **more: Any) -> float:
    """RewardTrainer's loss; `scores [6]` are three chosen, then three rejected."""
    center = more.pop("center", None)
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(6, 4), **more}
    return float(RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs))


def main() -> None:
    mask, policy, reference, old = completions()
    means = (policy.sum(1) / mask.sum(1)).chunk(2)
    scores = draw(5, 6)
    cpo = stand_in(loss_type="simpo", alpha=0.0, beta=2.0, simpo_gamma=1.0, label_smoothing=0.0)
    found = {
        "reward": {
            "plain": reward(scores), "centred": reward(scores, center=0.01),
            "margin": reward(scores, margin=torch.full((3,), 0.5)),
        },
        "dpo": {name: dpo(policy, reference, mask, name) for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm")},
        "orpo_odds_ratio": float(-ORPOTrainer.odds_ratio_loss(stand_in(beta=0.1), *means)[0].mean()),
        "simpo": float(CPOTrainer.cpo_loss(cpo, *means)[0].mean()),
        "grpo": {
            f"{name} {beta}": grpo(policy, reference, old, mask, loss_type=name, beta=beta)
            for name in ("grpo", "dapo", "dr_grpo") for beta in (0.0, 0.04)
        },
    }  # fmt: skip
    inputs = {"lengths": LENGTHS, "policy": policy.tolist(), "reference": reference.tolist(), "old": old.tolist(),
              "advantages": advantages().tolist(), "scores": scores.tolist()}  # fmt: skip
    made = {"trl": trl.__version__, "torch": torch.__version__.split("+")[0], "inputs": inputs, "losses": found}
    text = json.dumps(made, separators=(",", ": ")) + "\n"
    Path(__file__).with_name("trl_numbers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
