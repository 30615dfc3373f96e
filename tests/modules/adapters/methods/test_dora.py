"""DoRA against peft, with biases and dropout; that it is not LoRA; the norm without a second matrix."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from checkpointing.adapters import load_adapter
from modules.adapters.lora import lora_layers
from modules.adapters.methods.dora import DoRALinear
from modules.quantization.nf4 import NF4Linear
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import adamw, assert_follows_peft, ids, loss_of, train

SETTINGS = dict(r=4, lora_alpha=8, use_dora=True, task_type="CAUSAL_LM")


@pytest.mark.parametrize("model", [{}, dict(attention_bias=True, mlp_bias=True)])
def test_follows_peft(tmp_path, model):
    targets = ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
    assert_follows_peft(tmp_path, LoraConfig(target_modules=targets, **SETTINGS), **model)


def test_follows_peft_with_rslora(tmp_path):
    """peft allows both at once; α then holds the √r."""
    config = LoraConfig(target_modules=["v_proj", "gate_proj"], use_rslora=True, **SETTINGS)
    assert_follows_peft(tmp_path, config)


def test_dropout_is_where_peft_has_it(tmp_path):
    """One layer, so that both draw the same mask."""
    reference, ours = make_pair(tmp_path / "base", attention_bias=True, num_hidden_layers=1)
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, **SETTINGS)
    theirs = get_peft_model(copy.deepcopy(reference), config)
    train(theirs, adamw(theirs, 1e-2), steps=3)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    for layer in lora_layers(ours).values():
        layer.dropout.p = 0.5
    losses = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(7)
        losses.append(loss_of(model, ids()))
    assert abs(losses[0] - losses[1]) < 1e-5
    assert abs(loss_of(ours.eval(), ids()) - losses[1]) > 1e-4


@pytest.mark.parametrize("kind", [torch.nn.Linear, NF4Linear])
def test_norm_is_that_of_the_sum(kind):
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 32)
    layer = DoRALinear(base if kind is torch.nn.Linear else kind.from_linear(base), 4, 8.0, 0.0, torch.float32)
    assert torch.equal(layer.norm(torch.float32), layer.lora_magnitude_vector)  # B = 0
    torch.nn.init.normal_(layer.lora_B.weight)
    expected = (layer.dense_weight() + 2.0 * layer.lora_B.weight @ layer.lora_A.weight).norm(dim=1)
    torch.testing.assert_close(layer.norm(torch.float32), expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_streamed_weights_are_refused():
    base = torch.nn.Linear(8, 8)
    base.weight.data.fill_(float("nan"))  # what a streamed layer shows
    with pytest.raises(ValueError, match="--weights resident"):
        DoRALinear(base, 2, 4.0, 0.0, torch.float32)
