"""Cutting the tail, ending, limits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_causal, tiny_tokenizer

from tunesmith.errors import ModelError
from tunesmith.model.language import LanguageModel
from tunesmith.rollout.sampler import Draw, Sampler, cut, stream_seed

LOGITS = torch.tensor([[0.2, 0.5, 0.3]]).log()


@pytest.mark.parametrize(
    ("draw", "kept"),
    [
        (Draw(top_p=0.5), [1]),
        (Draw(top_p=0.6), [1, 2]),
        (Draw(top_p=0.81), [0, 1, 2]),
        (Draw(top_k=1), [1]),
        (Draw(top_k=2), [1, 2]),
        (Draw(top_k=2, top_p=0.6), [1]),  # 0.5 / 0.8 is more than 0.6
        (Draw(top_k=9), [0, 1, 2]),
        (Draw(), [0, 1, 2]),
    ],
)
def test_cut_keeps_what_was_worked_out_by_hand(draw: Draw, kept: list[int]):
    assert torch.isfinite(cut(LOGITS, draw))[0].nonzero().flatten().tolist() == kept


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(LanguageModel(tiny_causal("llama")), tiny_tokenizer())


def test_an_end_token_ends_and_is_kept(sampler: Sampler):
    free = sampler.sample([[7, 8]], temperature=0, max_tokens=6)[0]
    assert not free.ended and len(free.ids) == len(free.logprobs) == 6
    stop = free.ids[2]
    first = free.ids.index(stop)
    ended = sampler.sample([[7, 8]], temperature=0, max_tokens=6, stop_ids=[stop])[0]
    assert ended.ended and ended.ids == free.ids[: first + 1]


def test_order_and_indices(sampler: Sampler):
    rollouts = sampler.sample([[7, 8, 9], [10]], num_per_prompt=2, max_tokens=2)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r.prompt_ids for r in rollouts] == [(7, 8, 9)] * 2 + [(10,)] * 2
    assert sampler.sample([]) == []


def test_stays_within_the_positions_of_the_model():
    model = LanguageModel(tiny_causal("gpt2", n_positions=32))
    rollouts = Sampler(model, tiny_tokenizer()).sample([[7] * 30, [8] * 4], max_tokens=10, stop_ids=())
    assert len(rollouts[0].ids) <= 2 and len(rollouts[1].ids) <= 10


def test_modes_are_put_back(sampler: Sampler):
    sampler.model.train()
    sampler.model.backbone.lm_head.eval()
    sampler.sample([[7]], max_tokens=1)
    assert sampler.model.training and not sampler.model.backbone.lm_head.training
    sampler.model.eval()


def test_every_problem_is_named(sampler: Sampler):
    with pytest.raises(ModelError, match=r"prompt 1 is empty.*prompt 2 has 256 tokens.*max_tokens 0"):
        sampler.sample([[7], [], [7] * 256], max_tokens=0)
    with pytest.raises(ModelError, match=r"temperature -1.*top_p 0.*top_k -1"):
        sampler.sample([[7]], temperature=-1, top_p=0, top_k=-1)


def test_streams_differ():
    seeds = {stream_seed(s, i, k) for s in range(4) for i in range(8) for k in range(8)}
    assert len(seeds) == 4 * 8 * 8


def test_a_family_without_cache_is_computed_again(sampler: Sampler):
    slow = Sampler(sampler.model, sampler.tokenizer)
    slow.uses_cache = slow._pads = False
    prompts = [[7, 8], [9, 10], [11]]
    assert [r.ids for r in slow.sample(prompts, max_tokens=5, seed=1)] == [
        r.ids for r in sampler.sample(prompts, max_tokens=5, seed=1)
    ]
