"""Law: what changed after one step is what was declared. Control: one more parameter set free is noticed."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import CAUSAL, ENCODERS, tiny_causal, tiny_classifier

from tunesmith.model.trainable import TrainableSpec, make_trainable

SPECS = [
    TrainableSpec("full"),
    TrainableSpec("last_layers", layers=1),
    TrainableSpec("head"),
    TrainableSpec("lora", rank=2),
    TrainableSpec("lora", rank=2, dora=True),
    TrainableSpec("lora", rank=2, init="pissa", train_also=("embeddings",)),
    TrainableSpec("peft", peft={"peft_type": "LOHA", "r": 2}),
]


def changed(model, free=()):
    """Names of the parameters that one large step changed."""
    for name, parameter in model.named_parameters():
        if name in free:
            parameter.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1, weight_decay=0.1)
    ids = torch.randint(7, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # B is zero at first, so A moves at the second step
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


CASES = [(f, s) for f in (*CAUSAL, *ENCODERS) for s in SPECS if (f, s.method) != ("gpt2", "peft")]  # no LoHa for it


@pytest.mark.parametrize(("family", "spec"), CASES, ids=lambda c: getattr(c, "method", c))
def test_what_changed_is_what_was_declared(family, spec):
    model = tiny_causal(family) if family in CAUSAL else tiny_classifier(family)
    made = make_trainable(model, spec)
    assert changed(model) == set(made.names)


def test_control_one_more_parameter_is_noticed():
    model = tiny_causal("llama")
    made = make_trainable(model, TrainableSpec("lora", rank=2))
    assert changed(model, free=("model.norm.weight",)) != set(made.names)
