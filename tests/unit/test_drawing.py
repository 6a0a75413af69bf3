"""Drawing a token: softmax's distribution, what was cut is never drawn, and a row depends on its stream alone."""

from __future__ import annotations

import pytest
import torch

from tunesmith.errors import ModelError
from tunesmith.model import lean
from tunesmith.rollout import sampler
from tunesmith.rollout.sampler import Draw, next_tokens


def streams(number: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


@pytest.mark.parametrize("vocabulary", [3, 256, 300, 1000])
def test_shares_are_those_of_softmax(vocabulary: int) -> None:
    """Chi-squared over 20 classes of equal mass stays below its 1 - 1e-6 quantile (19 degrees: 64)."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    shares = logits.double().softmax(0)
    rows = 20_000
    tokens, _ = next_tokens(logits.expand(rows, -1), Draw(), streams(rows))
    classes = (shares.cumsum(0) * 20 - 1e-9).long().clamp_max(19)
    expected = torch.zeros(20, dtype=torch.float64).index_add(0, classes, shares) * rows
    found = torch.bincount(classes[tokens], minlength=20).double()
    kept = expected > 5
    assert float(((found - expected)[kept] ** 2 / expected[kept]).sum()) < 64
    # control: the same draws held against another distribution are far off
    other = logits.double().flip(0).softmax(0)
    wrong = torch.zeros(20, dtype=torch.float64).index_add(0, classes, other) * rows
    assert float(((found - wrong) ** 2 / wrong.clamp_min(1e-3)).sum()) > 1000


def test_what_is_impossible_is_never_drawn() -> None:
    """Zero mass before, between and behind, whole parts included; also where rounding puts the aim at an edge."""
    logits = torch.full((4000, 1024), float("-inf"))
    logits[:, [257, 258, 700]] = torch.tensor([0.0, -20.0, 1.0])
    tokens, logprobs = next_tokens(logits, Draw(), streams(4000))
    assert set(tokens.tolist()) <= {257, 258, 700}
    assert torch.isfinite(logprobs).all()
    one = torch.full((50, 1024), float("-inf"))
    one[:, 1023] = 3.0
    assert set(next_tokens(one, Draw(), streams(50))[0].tolist()) == {1023}


@pytest.mark.parametrize("aim", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval(monkeypatch: pytest.MonkeyPatch, aim: float) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([aim], dtype=torch.float64))
    logits = torch.full((1, 600), float("-inf"))
    logits[0, 100:500] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    token = int(next_tokens(logits, Draw(), streams(1))[0])
    assert token == (100 if aim == 0.0 else 499)


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    together, _ = next_tokens(logits, Draw(temperature=0.7), streams(6))
    alone = [next_tokens(logits[i : i + 1], Draw(temperature=0.7), [streams(6)[i]])[0] for i in range(6)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_log_probs_are_the_models_own_whatever_drew() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    tokens, found = next_tokens(logits, Draw(temperature=0.3, top_k=5), streams(3), temperature=2.0)
    expected = (logits / 2.0).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, expected)


def test_linears_are_put_back_after_sampling_even_when_it_fails() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4, bias=False)})
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="planted"), lean.narrowed(model, torch.bfloat16):
        assert model["a"].weight.dtype == model["b"].weight.dtype == torch.bfloat16
        raise RuntimeError("planted")
    assert dict(model.named_modules()) == before
    with lean.narrowed(model, torch.float32):
        assert dict(model.named_modules()) == before
    assert sampler.PART == 256


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("draw", [Draw(), Draw(temperature=0.0), Draw(top_k=3), Draw(top_p=0.5)])
def test_logits_that_are_no_numbers_are_told(bad: float, draw: Draw) -> None:
    logits = torch.zeros(2, 300)
    logits[1, 7] = bad
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with pytest.raises(ModelError, match="1 of 2 rows hold NaN or infinity"):
        next_tokens(logits, draw, generators)
    assert next_tokens(logits[:1], draw, generators[:1])[0].shape == (1,), "control: sound ones are drawn from"


def test_a_temperature_too_near_0_is_told() -> None:
    with pytest.raises(ModelError, match="temperature is too near 0"):
        next_tokens(torch.randn(1, 300), Draw(temperature=1e-40), [torch.Generator().manual_seed(0)])
