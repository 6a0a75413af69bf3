"""Cutting the tail, ending, limits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_causal, tiny_tokenizer

from tunesmith.errors import ModelError
from tunesmith.model.language import LanguageModel, Policy
from tunesmith.rollout.sampler import Draw, Rollout, Sampler, _Stops, cut, first_stop, next_tokens, stream_seed
from tunesmith.rollout.steps import FamilySteps

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
    slow.why_slow = "told so"
    prompts = [[7, 8], [9, 10], [11]]
    assert [r.ids for r in slow.sample(prompts, max_tokens=5, seed=1)] == [
        r.ids for r in sampler.sample(prompts, max_tokens=5, seed=1)
    ]


class Spelling:
    """A tokenizer whose decoder writes each id as a letter or two, so that stop strings cross tokens."""

    eos_token_id = 2
    all_special_ids = (0, 1, 2)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        shown = [int(i) for i in ids if not (skip_special_tokens and int(i) in self.all_special_ids)]
        return "".join(f"{chr(97 + i % 26)}{i % 10}" for i in shown)


def spelled(**settings) -> list[Rollout]:
    model = LanguageModel(tiny_causal("llama"))
    return Sampler(model, Spelling()).sample([[7, 8], [9]], num_per_prompt=2, max_tokens=12, seed=5, **settings)


def test_a_stop_string_cuts_exactly_also_across_tokens():
    free = spelled()
    stop = free[0].text[5:9]  # the second half of a token, a whole one, and the first half of the next
    at = free[0].text.index(stop)
    tokens = -(-(at + len(stop)) // 2)
    stopped = spelled(stop=[stop])
    assert stopped[0].ended and stopped[0].stop == stop
    assert stopped[0].text == free[0].text[:at]
    assert stopped[0].ids == free[0].ids[:tokens]
    torch.testing.assert_close(torch.tensor(stopped[0].logprobs), torch.tensor(free[0].logprobs[:tokens]))
    for was, now in zip(free[1:], stopped[1:], strict=True):
        assert now.stop or now.ids == was.ids


def test_of_two_stop_strings_the_first_in_the_text_counts():
    assert first_stop("one two", ["two", "one"]) == "one"
    assert first_stop("one two", ["one", "one t"]) == "one t"
    assert first_stop("one two", ["three"]) == ""
    free = spelled()[0].text
    assert spelled(stop=[free[6:8], free[2:4]])[0].text == free[: min(free.index(free[6:8]), free.index(free[2:4]))]


def test_special_tokens_do_not_hide_a_stop_string(sampler: Sampler):
    stops = _Stops(frozenset(), ("t a",), sampler.tokenizer, frozenset(sampler.tokenizer.all_special_ids))
    before, after = (sampler.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("cat", " a"))
    assert stops.found([*before, 4, *after]) == "t a"
    assert stops.found([*before, *before]) == ""


def test_stop_strings_wait_for_whole_characters(sampler: Sampler):
    stops = _Stops(frozenset(), ("ü",), sampler.tokenizer, frozenset())
    ids = sampler.tokenizer("ü", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 and stops.found(ids[:1]) == "" and stops.found(ids) == "ü"


def test_an_empty_stop_string_is_refused(sampler: Sampler):
    with pytest.raises(ModelError, match="a stop string is empty"):
        sampler.sample([[7]], stop=["", "x"])


def test_logprobs_are_those_of_the_model_s_temperature():
    backbone = tiny_causal("llama")
    hot = Sampler(LanguageModel(backbone, policy=Policy(temperature=2.0)), tiny_tokenizer())
    one = hot.sample([[7, 8]], max_tokens=5, temperature=2.0, seed=1)[0]
    with torch.no_grad():
        logits = backbone(input_ids=torch.tensor([[7, 8, *one.ids]])).logits[0, 1:-1]
    wanted = (logits / 2.0).log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.logprobs), wanted, atol=2e-5, rtol=0)
    assert (logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0] - wanted).abs().max() > 1e-2


def test_a_completion_ends_where_the_chat_template_ends_an_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<sep>'")
    model = LanguageModel(tiny_causal("llama"))
    assert Sampler(model, tokenizer).end_ids() == (2, 6)
    assert Sampler(model, tiny_tokenizer(chat=False)).end_ids() == (2,)


def test_a_token_too_unlikely_for_its_own_probability_keeps_its_logprob():
    logits = torch.zeros(200, 4)
    logits[:, 1:] = -120.0
    streams = [torch.Generator().manual_seed(i) for i in range(200)]
    tokens, logprobs = next_tokens(logits, Draw(temperature=30.0), streams)
    assert (tokens > 0).any() and logprobs.isfinite().all()
    torch.testing.assert_close(logprobs[tokens > 0], torch.full_like(logprobs[tokens > 0], -120.0))


def test_the_cache_is_thinned_only_when_rows_have_ended(monkeypatch: pytest.MonkeyPatch):
    model, kept = LanguageModel(tiny_causal("gemma3")), []
    monkeypatch.setattr(FamilySteps, "keep", lambda self, rows: kept.append(len(rows)))
    Sampler(model, tiny_tokenizer()).sample([[7, 8], [9, 10]], temperature=0, max_tokens=4, stop_ids=())
    assert kept == []
