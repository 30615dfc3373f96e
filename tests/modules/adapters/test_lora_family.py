"""What every relative of LoRA has to keep, beside what all methods have to (test_every_method.py)."""

import pytest
import torch

from modules.fused.blocks import disagreement, why_not
from tests.models.test_llama import make_pair
from tests.modules.adapters.every_method import make, optimizer_of
from tests.modules.adapters.peft_methods import ids, logits, loss_of, train, trained

FAMILY = ("lora", "rslora", "dora", "lora-plus", "lora-fa", "pissa", "olora", "vera", "loftq", "eva")


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "loftq"])
def test_starts_at_the_base(tmp_path, name):
    _, base = make_pair(tmp_path / "again")
    model = make(tmp_path, name)
    exact = name not in ("pissa", "olora")  # W - s · B A + s · B A rounds
    deviation = (logits(model) - logits(base)).abs().max()
    assert deviation == 0 if exact else 0 < deviation < 1e-5


@pytest.mark.parametrize("name", FAMILY)
def test_by_hand_where_the_layer_computes_what_lora_does(tmp_path, name):
    """DoRA's and VeRA's blocks are left to the plain modules, by name."""
    model = make(tmp_path, name)
    train(model, optimizer_of(model), steps=2)
    if name in ("dora", "vera"):
        assert why_not(model) == f"self_attn.q_proj is a {'DoRALinear' if name == 'dora' else 'VeRALinear'}"
    else:
        assert why_not(model) is None and disagreement(model) is None


def test_every_option_reaches_the_layers(tmp_path):
    for name in FAMILY:
        model = make(tmp_path / name, name, dropout=0.5, targets=("q_proj", "down_proj"), dtype=torch.bfloat16)
        assert {key.split(".")[-3 if "lora_A" in key or "lora_B" in key else -2] for key in trained(model)} <= {
            "q_proj",
            "down_proj",
        }
        assert all(p.dtype == torch.bfloat16 for p in trained(model).values())
        train(model, torch.optim.SGD(trained(model).values(), lr=0.5), steps=2)
        model.train()
        assert not torch.equal(loss_of(model, ids()), loss_of(model, ids()))  # dropout
        model.eval()
        assert torch.equal(loss_of(model, ids()), loss_of(model, ids()))
