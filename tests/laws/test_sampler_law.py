"""Sampling log-probs equal training log-probs, and a rollout does not depend on its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import CAUSAL, tiny_causal, tiny_tokenizer

from tunesmith.batch import Batch
from tunesmith.model.language import LanguageModel, Policy
from tunesmith.rollout import sampler as sampler_module
from tunesmith.rollout.sampler import Rollout, Sampler

PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [20], [7, 30, 31]]


def flat_batch(rollouts: list[Rollout]) -> Batch:
    """The rollouts as one packed row whose weights are 1 on the completions."""
    ids, targets, weights, positions, segments = [], [], [], [], []
    for s, r in enumerate(rollouts):
        row = [*r.prompt_ids, *r.ids]
        ids += row
        targets += [*row[1:], 0]
        weights += [0.0] * (len(r.prompt_ids) - 1) + [1.0] * len(r.ids) + [0.0]
        positions += range(len(row))
        segments += [s] * len(row)
    lengths = tuple(len(r.prompt_ids) + len(r.ids) for r in rollouts)
    long = [torch.tensor([x]) for x in (ids, targets)]
    return Batch(
        *long,
        torch.tensor([weights]),
        torch.tensor([positions]),
        torch.tensor([segments]),
        lengths=lengths,
    )


def training_logprobs(model: LanguageModel, rollouts: list[Rollout]) -> torch.Tensor:
    batch = flat_batch(rollouts)
    with torch.no_grad():
        logprobs = model(batch).logprobs
    return logprobs[batch.weights > 0]


def sampled(family: str, **settings: Any) -> tuple[LanguageModel, list[Rollout]]:
    model = LanguageModel(tiny_causal(family))
    settings = {"num_per_prompt": 2, "max_tokens": 14, "seed": 3} | settings
    sampler = Sampler(model, tiny_tokenizer())
    assert sampler.uses_cache, "the law must hold of the cache, not of computing everything again"
    return model, sampler.sample(PROMPTS, **settings)


def flat(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.tensor([x for r in rollouts for x in r.logprobs])


@pytest.mark.parametrize("family", CAUSAL)
def test_sampling_logprobs_are_training_logprobs(family: str):
    model, rollouts = sampled(family, temperature=0.7, top_p=0.9)
    torch.testing.assert_close(flat(rollouts), training_logprobs(model, rollouts), atol=2e-5, rtol=0)


def test_control_another_temperature_breaks_the_law():
    model, rollouts = sampled("llama", temperature=0.7)
    batch = flat_batch(rollouts)
    tempered = (model._packed_logits(batch) / 0.7).log_softmax(-1)
    wrong = tempered.gather(1, batch.targets[0][:, None])[:, 0][batch.weights[0] > 0]
    assert (wrong - flat(rollouts)).abs().max() > 1e-2


def test_control_another_model_breaks_the_law():
    _, rollouts = sampled("llama")
    other = LanguageModel(tiny_causal("llama", seed=1))
    assert (flat(rollouts) - training_logprobs(other, rollouts)).abs().max() > 1e-2


def test_control_padding_that_is_seen_breaks_the_law(monkeypatch: pytest.MonkeyPatch):
    def seen(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = padded(*args)
        return ids, torch.ones_like(mask)

    padded = sampler_module._left_padded
    monkeypatch.setattr(sampler_module, "_left_padded", seen)
    model, rollouts = sampled("llama")
    assert (flat(rollouts) - training_logprobs(model, rollouts)).abs().max() > 1e-3


@pytest.mark.parametrize("family", CAUSAL)
def test_a_rollout_does_not_depend_on_its_neighbours(family: str):
    model, together = sampled(family)
    tokenizer = tiny_tokenizer()
    fewer = Sampler(model, tokenizer).sample(PROMPTS[:2], num_per_prompt=2, max_tokens=14, seed=3)
    alone = Sampler(model, tokenizer, max_cache_tokens=1).sample(PROMPTS, num_per_prompt=2, max_tokens=14, seed=3)
    assert [r.ids for r in fewer] == [r.ids for r in together[:4]]
    assert [r.ids for r in alone] == [r.ids for r in together]
    other = Sampler(model, tokenizer).sample(PROMPTS, num_per_prompt=2, max_tokens=14, seed=4)
    assert [r.ids for r in other] != [r.ids for r in together]  # control: the seed does matter


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_equals_the_family_s_own_generation(family: str):
    backbone = tiny_causal(family)
    prompt = torch.tensor([PROMPTS[1]])
    own = backbone.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=2
    )[0, prompt.shape[1] :]
    ours = Sampler(LanguageModel(backbone), tiny_tokenizer()).sample(PROMPTS, temperature=0, max_tokens=12)[1]
    assert list(ours.ids) == own.tolist()


def test_draws_have_the_distribution_asked_for():
    model = LanguageModel(tiny_causal("llama"))
    num = 4000
    rollouts = Sampler(model, tiny_tokenizer()).sample(
        [[7]], num_per_prompt=num, temperature=0.2, max_tokens=1, top_k=4, seed=0
    )
    with torch.no_grad():
        best = model.backbone(input_ids=torch.tensor([[7]])).logits[0, -1].topk(4)
    counts = torch.tensor([sum(r.ids[0] == int(i) for r in rollouts) for i in best.indices], dtype=torch.float)
    assert counts.sum() == num
    limit = 16.3  # 99.9 % of chi-square with 3 degrees of freedom
    assert chi_square(counts, (best.values / 0.2).softmax(0)) < limit
    assert chi_square(counts, best.values.softmax(0)) > limit  # control: temperature ignored


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def test_in_bfloat16_the_two_differ_by_hundredths():
    model = LanguageModel(tiny_causal("llama"), compute=torch.bfloat16)
    rollouts = Sampler(model, tiny_tokenizer()).sample(PROMPTS, num_per_prompt=4, max_tokens=14, seed=3)
    gap = (flat(rollouts) - training_logprobs(model, rollouts)).abs()
    assert gap.mean() < 0.03 and gap.max() < 0.3
    precise = training_logprobs(LanguageModel(model.backbone), rollouts)
    assert (flat(rollouts) - precise).abs().max() > 1e-5  # control: it was bfloat16


def test_the_law_holds_of_a_hot_policy():
    model = LanguageModel(tiny_causal("llama"), policy=Policy(temperature=1.6))
    rollouts = Sampler(model, tiny_tokenizer()).sample(PROMPTS, temperature=1.6, max_tokens=14, stop=("t",), seed=3)
    torch.testing.assert_close(flat(rollouts), training_logprobs(model, rollouts), atol=2e-5, rtol=0)
    plain = training_logprobs(LanguageModel(model.backbone), rollouts)
    assert (flat(rollouts) - plain).abs().max() > 1e-2  # control: temperature ignored
