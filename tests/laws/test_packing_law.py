"""Law: packed equals one by one, for every family named, in value and in gradient. Control: a planted leak."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, tiny_causal, tiny_classifier, tiny_masked

from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.model.language import LanguageModel
from tunesmith.model.packing import Layout, probe_batch
from tunesmith.model.score import ScoreModel

LENGTHS = (5, 17, 1, 9)


def make_samples(seed: int = 3, label: bool = False) -> list[Sample]:
    draw = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(LENGTHS):
        weights = draw.integers(0, 2, length).astype(np.float32)
        weights[0] = 0
        ids = draw.integers(7, 300, length).astype(np.int32)
        samples.append(Sample(ids, weights, label=number % 2 if label else None, origin=f"row:{number + 1}"))
    return samples


def grads(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_packed_logprobs_and_gradients_equal_one_by_one(family):
    causal = family in CAUSAL
    model = LanguageModel(tiny_causal(family) if causal else tiny_masked(family), causal=causal)
    assert model.layout is Layout.PACKED, model.why
    samples = make_samples()
    packed = model(collate(samples)).logprobs
    packed.sum().backward()
    packed_grads = grads(model)
    model.zero_grad(set_to_none=True)
    alone = torch.cat([model(collate([s])).logprobs for s in samples], 1)
    alone.sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_grads, grads(model), rtol=1e-4, atol=1e-5)
    assert packed.abs().max() > 1


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_a_score_and_its_gradients_do_not_depend_on_neighbours(family):
    model = ScoreModel(tiny_classifier(family, labels=3))
    assert model.layout is Layout.PACKED, model.why
    samples = make_samples(label=True)
    packed = model(collate(samples)).scores
    packed.square().sum().backward()
    packed_grads = grads(model)
    model.zero_grad(set_to_none=True)
    alone = torch.cat([model(collate([s])).scores for s in samples])
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    alone_grads = grads(model)
    torch.testing.assert_close(packed_grads, alone_grads, rtol=1e-4, atol=1e-5 * float(alone_grads.abs().max()))
    assert (packed[0] - packed[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_control_a_leak_changes_scores(family):
    model = ScoreModel(tiny_classifier(family, labels=3))
    samples = make_samples(label=True)
    joined = Sample(np.concatenate([s.ids for s in samples[:2]]), np.concatenate([s.weights for s in samples[:2]]))
    right, leaking = model(collate(samples[:2])).scores, model(collate([joined])).scores
    assert (right[1] - leaking[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_control_a_leak_between_segments_is_seen(family):
    """One long segment instead of four: the law's comparison must fail by far."""
    causal = family in CAUSAL
    model = LanguageModel(tiny_causal(family) if causal else tiny_masked(family), causal=causal)
    samples = make_samples()
    joined = Sample(np.concatenate([s.ids for s in samples]), np.concatenate([s.weights for s in samples]))
    right, leaking = model(collate(samples)), model(collate([joined]))
    difference = (right.logprobs - leaking.logprobs)[collate(samples).weights > 0]
    assert difference.abs().max() > 1e-2


def test_the_verification_at_load_refuses_a_leaking_pack(monkeypatch):
    """When a family ignores the segments, the model falls back to its own padded forward, and says so."""
    from tunesmith.model import attention

    monkeypatch.setattr(
        attention,
        "packed_attention",
        lambda q, k, v, lengths, **o: attention.attend(
            q, k, v, causal=o["causal"], dropout=o["dropout"], scaling=o["scaling"], softcap=o["softcap"]
        ),
    )
    model = LanguageModel(tiny_causal("llama"))
    assert model.layout is Layout.PADDED and "differ" in model.why


@pytest.mark.parametrize("window", [8, 40])
def test_a_family_whose_window_lives_in_its_mask_alone_is_found_out(window, monkeypatch):
    """Packed rows have no mask. The window of 40 is longer than the short probes, so only one past it tells."""
    from tunesmith.model import attention

    assert LanguageModel(tiny_causal("mistral", sliding_window=window)).layout is Layout.PACKED
    monkeypatch.setattr(attention, "_window", lambda *_: None)
    model = LanguageModel(tiny_causal("mistral", sliding_window=window))
    assert model.layout is Layout.PADDED and "differ" in model.why
    monkeypatch.setattr("tunesmith.model.packing._past_window", lambda _: ())
    blind = LanguageModel(tiny_causal("mistral", sliding_window=window))
    assert (blind.layout is Layout.PACKED) == (window == 40), "control: the short probes do not see it"


def test_the_probe_past_a_window_is_left_out_where_it_would_cost_much():
    def lengths(**settings):
        return probe_batch(tiny_causal("mistral", **settings)).lengths

    assert lengths(sliding_window=200) == (5, 9, 3, 208)
    assert lengths(sliding_window=4096) == lengths(sliding_window=None) == (5, 9, 3)
    assert lengths(sliding_window=200, max_position_embeddings=128) == (5, 9, 3)


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_long_row_leaves_the_rotary_scaling_of_its_neighbours_alone(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    longest = 16 if kind == "dynamic" else 256
    model = LanguageModel(tiny_causal("llama", rope_parameters=rope, max_position_embeddings=longest))
    assert model.layout is Layout.PACKED, model.why
    batch = collate(make_samples())
    alone = torch.cat([model(collate([s])).logprobs for s in make_samples()], 1)
    torch.testing.assert_close(model(batch).logprobs, alone, rtol=1e-5, atol=1e-5)
    packed = model._packed_logits(batch).log_softmax(-1)[torch.arange(32), batch.targets[0]][None]
    counted = batch.weights > 0
    assert (packed - alone)[counted].abs().max() > 1e-3, "control: packed all the same, it differs"


def test_a_padded_family_gives_the_same_answers():
    packed = LanguageModel(tiny_causal("llama"))
    padded = LanguageModel(tiny_causal("llama"))
    padded.layout = Layout.PADDED
    padded.backbone.set_attn_implementation("sdpa")
    batch = collate(make_samples())
    torch.testing.assert_close(packed(batch).logprobs, padded(batch).logprobs, rtol=1e-5, atol=1e-5)


def test_positions_restart_in_each_segment():
    batch = collate(make_samples())
    assert batch.positions[0].tolist() == [i for n in LENGTHS for i in range(n)]
