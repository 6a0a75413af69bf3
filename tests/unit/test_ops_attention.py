"""Attention in blocks of like segments against a plain float64 loop over segments; RMSNorm against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith import ops
from tunesmith.ops_attention import _rows, block_attention, blocks_of, keep_mask
from tunesmith.ops_norm import rms_norm

LENGTHS = [(7,), (5, 5, 5), (9, 3, 8, 1, 6, 9), (40, 2, 39, 17)]


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], causal: bool, scaling: float) -> Tensor:
    """Segment by segment, softmax written out."""
    shared, parts, start = query.shape[1] // key.shape[1], [], 0
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    for length in lengths:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) * scaling
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(weights @ v)
        start += length
    return torch.cat(parts, 2)


def drawn(lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator, tokens = torch.Generator().manual_seed(0), sum(lengths)
    shapes = [(1, 6, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8), (1, 6, tokens, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_values_and_gradients_are_those_of_a_plain_loop(
    lengths: tuple[int, ...], causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    *inputs, grad = drawn(lengths, dtype)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    out = block_attention(*ours, lengths, causal=causal, scaling=0.3)
    expected = plain(*theirs, lengths, causal, 0.3)
    found = torch.autograd.grad(out, ours, grad)
    wanted = torch.autograd.grad(expected, theirs, grad.double())
    for a, b in zip((out, *found), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        assert float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) < tolerance


def test_however_heads_lie_in_memory() -> None:
    lengths = (9, 3, 8)
    *inputs, grad = drawn(lengths, torch.float64)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    straight = [x.clone().requires_grad_() for x in inputs]
    grads = [
        torch.autograd.grad(block_attention(*x, lengths, causal=True, scaling=0.3), x, grad) for x in (turned, straight)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_many_tiles_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (40, 2, 39, 17)
    *inputs, grad = drawn(lengths, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    out = block_attention(*leaves, lengths, causal=True, scaling=0.3)
    whole = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    monkeypatch.setattr("tunesmith.ops_attention.TILE_QUERIES", 7)
    monkeypatch.setattr("tunesmith.ops_attention.TILE_SCORES", 300)
    for a, b in zip(whole, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_every_token_has_one_place() -> None:
    blocks, order = blocks_of((9, 3, 8, 1, 6, 9))
    every = [torch.from_numpy(rows).flatten(0, 1) for rows in _rows((9, 3, 8, 1, 6, 9), 1, True)]
    places = torch.cat([p[b.real] if b.real is not None else p.flatten() for p, b in zip(every, blocks, strict=True)])
    assert sorted(places.tolist()) == list(range(36))
    assert torch.equal(torch.cat([p.flatten() for p in every])[order], torch.arange(36))
    for block in blocks:
        lengths = [block.longest] if block.real is None else block.real.sum(1).tolist()
        assert min(lengths) >= 0.7 * block.longest


def test_packed_attention_takes_blocks_measured_or_trained_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (9, 3, 8)
    query, key, value, _ = drawn(lengths, torch.float32)
    measured = ops.packed_attention(query, key, value, lengths, causal=True, window=None)
    trained = ops.packed_attention(query.requires_grad_(), key, value, lengths, causal=True, window=None)
    assert torch.equal(measured, trained)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("blocks")

    monkeypatch.setattr(ops, "block_attention", refuse)
    with pytest.raises(AssertionError, match="blocks"):
        ops.packed_attention(query, key, value, lengths, causal=True, window=None)
    ops.packed_attention(query, key, value, lengths, causal=True, window=4)
    ops.packed_attention(query, key, value, lengths, causal=True, window=None, softcap=5.0)
    several = [x.detach().expand(3, -1, -1, -1) for x in (query, key, value)]
    assert ops.packed_attention(*several, (20,), causal=True, window=None).shape == several[0].shape


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_drops_weights_by_one_mask_both_ways(causal: bool) -> None:
    """Linear in the values: with unit vectors as values the output is the dropped weights themselves."""
    tokens = 16
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    value = torch.eye(tokens, dtype=torch.float64).expand(1, 2, tokens, tokens)[..., :8].contiguous()

    def answer(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        return block_attention(*inputs, (9, 7), causal=causal, scaling=0.3, dropout=0.25)

    leaves = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(answer, leaves, atol=1e-6)
    with torch.random.fork_rng():
        weights = answer(query, key, value).detach()
        whole = block_attention(query, key, value, (9, 7), causal=causal, scaling=0.3).detach()
    kept = weights != 0
    torch.testing.assert_close(weights[kept], whole[kept] / 0.75, rtol=1e-12, atol=1e-14)
    assert 0.1 < float((whole[~kept] != 0).sum() / (whole != 0).sum()) < 0.4


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.01])
def test_a_mask_keeps_the_share_that_was_asked_for_at_every_place(dropout: float) -> None:
    mask = keep_mask((1000, 401), dropout, torch.Generator().manual_seed(0))
    spread = 5 * (dropout * (1 - dropout)) ** 0.5
    assert abs(float((~mask).float().mean()) - dropout) < spread / 401_000**0.5
    for place in range(4):
        part = (~mask).flatten()[place::4].float()
        assert abs(float(part.mean()) - dropout) < spread / len(part) ** 0.5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_rms_norm_is_its_formula(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 5, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.rand(16, generator=generator, dtype=torch.float64).to(dtype)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    theirs = [t.double().requires_grad_() for t in (x, weight)]
    out = rms_norm(ours[0], ours[1], 1e-6)
    expected = theirs[0] / (theirs[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * theirs[1]
    wanted = torch.autograd.grad(expected, theirs, grad.double())
    for a, b in zip((out, *torch.autograd.grad(out, ours, grad)), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        assert float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) < tolerance
