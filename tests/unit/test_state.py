"""Resume: k + (n - k) steps are n steps bit for bit, through the file; each part left out is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.engine.checkpoint import load_checkpoint, save_checkpoint
from tunesmith.engine.contracts import Progress
from tunesmith.engine.state import TrainState
from tunesmith.errors import RunError


class Stream:
    def __init__(self):
        self.position = 0

    def next(self):
        self.position += 1
        return torch.randn(6, 5, generator=torch.Generator().manual_seed(self.position))

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.99)),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05), amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def build(optimizer="adamw", *, identity=None, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 1), nn.Linear(1, 1))
    model = model.to(dtype)
    model[4].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    identity = {"data": "aa", "base": "bb"} if identity is None else identity
    return TrainState(0, model, OPTIMIZERS[optimizer](trained), Stream(), Progress(), identity, torch.Generator())


def run(state, num_steps):
    losses = []
    for _ in range(num_steps):
        noise = torch.rand((), generator=state.generator)
        state.optimizer.zero_grad()
        loss = (state.model(state.source.next().to(state.model[0].weight.dtype)) * noise).square().sum()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        state.progress.tokens += 30
        losses.append(loss.item().hex())
    return losses


def through_file(state, folder):
    tensors, meta = state.capture()
    return load_checkpoint(save_checkpoint(folder, state.step, tensors, meta))


def cut_run(folder, optimizer="adamw", drop=None, dtype=torch.float32):
    """Losses of 3 steps, a save, a fresh process's 4 steps more; `drop` leaves one part unrestored."""
    torch.manual_seed(1)
    first = build(optimizer, dtype=dtype)
    losses = run(first, 3)
    saved = through_file(first, folder)
    torch.manual_seed(99)
    second = build(optimizer, dtype=dtype)
    if drop == "source":
        second.source.restore = lambda state: None
    left = dict(saved[0].items())
    fresh = second.capture(copy=True)[0]
    second.restore(left, saved[1])
    if drop == "random":
        second._restore_random(fresh)
    elif drop == "optimizer":
        second.optimizer.state.clear()
    elif drop == "weights":
        second.load_weights(fresh)
    elif drop == "buffers":
        second.model[1].reset_running_stats()
    assert second.step == 3 and second.progress.tokens == 90
    losses += run(second, 4)
    return losses, second


def whole_run(optimizer="adamw", dtype=torch.float32):
    torch.manual_seed(1)
    state = build(optimizer, dtype=dtype)
    return run(state, 7), state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_and_four_steps_are_seven(tmp_path, optimizer):
    (wanted, whole), (found, resumed) = whole_run(optimizer), cut_run(tmp_path, optimizer)
    assert found == wanted
    mine, meta = whole.capture()
    theirs, their_meta = resumed.capture()
    assert mine.keys() == theirs.keys() and meta == their_meta
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_float64_and_frozen_parameters_are_not_saved(tmp_path):
    assert cut_run(tmp_path, dtype=torch.float64)[0] == whole_run(dtype=torch.float64)[0]
    tensors, _ = build().capture()
    assert not any(name.startswith("model.4") for name in tensors)
    assert not any(name.startswith("buffer.") for name in tensors)  # nothing has changed yet


@pytest.mark.parametrize("drop", ["random", "optimizer", "source", "weights"])
def test_control_each_part_left_out_is_seen(tmp_path, drop):
    assert cut_run(tmp_path, drop=drop)[0] != whole_run()[0]


def test_control_buffers_left_out_are_seen(tmp_path):
    _, whole = whole_run()
    _, resumed = cut_run(tmp_path, drop="buffers")
    assert not torch.equal(whole.model[1].running_mean, resumed.model[1].running_mean)


def test_moments_wider_than_their_parameter_keep_their_bits(tmp_path):
    state = build()
    state.model.to(torch.bfloat16)
    weight = state.model[0].weight
    moment = torch.randn(weight.shape, dtype=torch.float64)
    state.optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": moment, "note": (1, float("inf"))}
    saved = through_file(state, tmp_path)
    other = build()
    other.model.to(torch.bfloat16)
    other.restore(*saved)
    assert torch.equal(other.optimizer.state[other.model[0].weight]["exp_avg"], moment)
    assert other.optimizer.state[other.model[0].weight]["note"] == (1, float("inf"))
    groups = zip(state.optimizer.param_groups, other.optimizer.param_groups, strict=True)
    assert all(a["betas"] == b["betas"] and isinstance(b["betas"], tuple) for a, b in groups)


def test_changed_inputs_are_refused_by_name_and_all_of_them():
    tensors, meta = build().capture()
    other = build(identity={"data": "cc", "tokenizer": "dd"})
    with pytest.raises(RunError) as caught:
        other.restore(tensors, meta)
    text = str(caught.value)
    for part in ("data: was aa, is cc", "base: was bb, is absent", "tokenizer: was absent, is dd"):
        assert part in text
    assert other.step == 0
    notes = other.restore(tensors, meta, accept={"data", "base", "tokenizer"})
    assert len(notes) == 3


def test_another_shape_or_another_choice_of_parameters_is_refused_and_nothing_is_changed():
    state = build()
    run(state, 1)
    tensors, meta = state.capture(copy=True)
    other = build()
    before = {name: p.clone() for name, p in other.model.named_parameters()}
    wrong = {**tensors, "model.0.weight": torch.zeros(2, 2), "model.9.weight": torch.zeros(1)}
    del wrong["model.3.bias"]
    with pytest.raises(RunError) as caught:
        other.restore(wrong, meta)
    for part in ("model.0.weight: saved [2, 2]", "model.9.weight is not trained", "model.3.bias is not in"):
        assert part in str(caught.value)
    with pytest.raises(RunError, match="groups"):
        other.restore(tensors, {**meta, "optimizer": {"state": {}, "groups": []}})
    assert all(torch.equal(before[name], p) for name, p in other.model.named_parameters())


def test_a_copy_is_a_snapshot_and_the_live_capture_is_not():
    state = build()
    copied, live = state.capture(copy=True)[0], state.capture()[0]
    run(state, 1)
    assert not torch.equal(copied["model.0.weight"], live["model.0.weight"])


def test_the_best_weights_come_back_alone():
    state = build()
    run(state, 2)
    best = state.capture(copy=True)[0]
    run(state, 2)
    state.load_weights(best)
    assert torch.equal(state.model[0].weight, best["model.0.weight"])
    assert torch.equal(state.model[1].running_mean, best["buffer.1.running_mean"])
    assert state.step == 4
