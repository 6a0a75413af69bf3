"""Kernels against plain float64 references, with gradients."""

from __future__ import annotations

import pytest
import torch

from tunesmith import ops


def plain_logprobs(hidden, weight, bias, targets, scale, softcap):
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_chunked_logprobs_equal_the_plain_formula_with_gradients(monkeypatch, head_trains, with_bias, scale, softcap):
    monkeypatch.setattr(ops, "CHUNK_LOGITS", 40)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    targets = torch.tensor([3, 1, 0, 12, 7])
    outer = draw(5)
    results = []
    weight, bias, hidden = draw(13, 6), draw(13) if with_bias else None, draw(5, 6)
    for function in (plain_logprobs, ops.chunked_logprobs):
        w = weight.clone().requires_grad_(head_trains)
        b = None if bias is None else bias.clone().requires_grad_(head_trains)
        h = hidden.clone().requires_grad_()
        if function is plain_logprobs:
            out = function(h, w, b, targets, scale, softcap)
        else:
            out = function(h, w, b, targets, scale=scale, softcap=softcap)
        out.double().backward(outer)
        results.append((out.double(), h.grad, w.grad, None if b is None else b.grad))
    for plain, ours in zip(*results, strict=True):
        assert (plain is None) == (ours is None)
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert results[0][1].abs().max() > 1e-2


def test_three_token_loss_equals_the_hand_computed_one():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ours = ops.chunked_logprobs(hidden, weight, None, torch.tensor([2, 0]))
    e = torch.e
    expected = torch.tensor([1 - torch.log(torch.tensor(2 * e + 1)), -torch.log(torch.tensor(2 * e + 1))])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_packed_attention_equals_each_segment_alone(causal, window, softcap):
    generator = torch.Generator().manual_seed(1)
    lengths = (4, 1, 7)
    q = torch.randn(1, 4, 12, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    packed = ops.packed_attention(q, k, v, lengths, causal=causal, window=window, softcap=softcap)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        expected = reference_attention(q[:, :, part], k[:, :, part], v[:, :, part], causal, window, softcap)
        torch.testing.assert_close(packed[:, :, part], expected, rtol=1e-9, atol=1e-9)
        start += length
    leaking = ops.packed_attention(q, k, v, (12,), causal=causal, window=window, softcap=softcap)
    assert (leaking - packed).abs().max() > 1e-2, "the control must differ: one segment instead of three"


def reference_attention(q, k, v, causal, window, softcap):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for i in range(scores.shape[2]):
        for j in range(scores.shape[3]):
            too_far = window is not None and (i - j >= window if causal else abs(i - j) > window)
            if (causal and j > i) or too_far:
                scores[:, :, i, j] = float("-inf")
    return scores.softmax(-1) @ v


def test_segment_sums_leave_padding_out():
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    segments = torch.tensor([[0, 0, 1, -1]])
    assert ops.segment_sums(values, segments, 2).tolist() == [3.0, 4.0]
