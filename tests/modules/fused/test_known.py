"""Ways to change what a block computes that leave its source as it is: the record must not be deceived by them."""

import functools

import pytest
import torch

from models.llama import LlamaModel
from modules import attention, norm
from modules.adapters.lora import LoRALinear
from modules.attention import Attention, apply_rotary
from modules.feed_forward import FeedForward
from modules.fused.blocks import disagreement, why_plain
from modules.norm import RMSNorm
from tests.modules.memory.test_activations import make_model


class Half:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args) * 0.5

    def __get__(self, module, kind):
        return self if module is None else functools.partial(self, module)


def half(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args) * 0.5

    return call


def with_attribute_access(model, patch):
    class Norm(RMSNorm):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value * 2 if name == "weight" else value

    model.blocks[1].input_layernorm.__class__ = Norm


def with_a_property(model, patch):
    class Norm(RMSNorm):
        weight = property(lambda self: self._parameters["weight"] + 1)

    model.blocks[1].input_layernorm.__class__ = Norm


def with_a_class_of_the_same_name(model, patch):
    kind = type("FeedForward", (FeedForward,), {"forward": lambda self, x: self.down_proj(self.up_proj(x))})
    model.blocks[0].mlp.__class__ = kind


def with_another_method(model, patch):
    class Other(Attention):
        def keys_and_values(self, *args):
            k, v = super().keys_and_values(*args)
            return k, v * 2

    model.blocks[2].self_attn.__class__ = Other


def with_another_code(model, patch):
    def forward(self, x):
        return self.weight * x * self.eps

    patch.setattr(RMSNorm.forward, "__code__", forward.__code__)


def with_a_called_class(model, patch):
    class Called(Attention):
        def __call__(self, *args):
            return super().__call__(*args) * 2

    model.blocks[2].self_attn.__class__ = Called


def with_a_parametrization(model, patch):
    class Double(torch.nn.Module):
        def forward(self, weight):
            return weight * 2

    torch.nn.utils.parametrize.register_parametrization(model.blocks[0].input_layernorm, "weight", Double())


DECEPTIONS = {
    "a wrapper that calls itself the original": lambda m, p: p.setattr(Attention, "forward", half(Attention.forward)),
    "a wrapper around linear layers": lambda m, p: p.setattr(torch.nn.Linear, "forward", half(torch.nn.Linear.forward)),
    "a callable object": lambda m, p: p.setattr(FeedForward, "forward", Half(FeedForward.forward)),
    "a callable object as helper": lambda m, p: p.setattr(attention, "apply_rotary", Half(apply_rotary)),
    "a partial as helper": lambda m, p: p.setattr(attention, "apply_rotary", functools.partial(apply_rotary)),
    "a function of torch as helper": lambda m, p: p.setattr(attention, "apply_rotary", torch.addcmul),
    "another module behind a name": lambda m, p: p.setattr(norm, "torch", torch.nn),
    "a hook for all": lambda m, p: p.setattr(
        torch.nn.modules.module, "_global_forward_hooks", {0: lambda module, args, y: None}
    ),
    "a wrapper of LoRA": lambda m, p: p.setattr(LoRALinear, "forward", half(LoRALinear.forward)),
    "attribute access": with_attribute_access,
    "a property": with_a_property,
    "a class of the same name": with_a_class_of_the_same_name,
    "another method": with_another_method,
    "another code": with_another_code,
    "another call": with_a_called_class,
    "a parametrization": with_a_parametrization,
}


@pytest.mark.parametrize("name", DECEPTIONS)
def test_the_record_is_not_deceived(name, monkeypatch):
    assert why_plain(make_model()) is None
    model = make_model()
    DECEPTIONS[name](model, monkeypatch)
    assert why_plain(model)


def test_a_model_that_runs_its_blocks_itself_is_not_called_fused(monkeypatch):
    def run_embedded(self, hidden, layout=None, caches=None):
        cos, sin = self.rotary(layout.positions, layout.longest, hidden.dtype)
        for block in self.layers:
            hidden = block(hidden, cos, sin, layout)
        return self.norm(hidden)

    monkeypatch.setattr(LlamaModel, "run_embedded", run_embedded)
    assert "run_block" in disagreement(make_model())
