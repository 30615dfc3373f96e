"""A tiny model with any method of the table: what the tests over all of METHODS, and others, share."""

import torch

from data.batches import Batch
from modules.adapters.methods import METHODS, add_method, find_method
from modules.adapters.options import Options
from modules.attention import padded_layout
from modules.optim import build_optimizer
from modules.quantization.nf4 import NF4Linear, quantize_nf4
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import ids, trained

# What a new method has to be listed under, if it is so.
UNMERGEABLE = ("houlsby", "pfeiffer", "parallel", "prompt", "p-tuning", "prefix")  # no plain weight does what they do
OWN_START = ("pissa", "olora")  # training starts at the base up to rounding
WITH_NETWORKS = (*METHODS, "p-tuning lstm", "prefix mlp")  # --prompt-encoder's, by which a method becomes another
MERGEABLE = [name for name in METHODS if name not in UNMERGEABLE]


def make(folder, name, *, nf4=False, drawn=0, **options):
    """A tiny model with the method, over NF4 if wanted, as a recipe puts it together."""
    method, _, encoder = name.partition(" ")
    _, model = make_pair(folder, num_attention_heads=4)
    dense_first = getattr(find_method(method), "NEEDS_DENSE", False)
    if nf4 and not dense_first:
        quantize_nf4(model)
    kind = NF4Linear if nf4 or name == "loftq" else None
    torch.manual_seed(1)
    torch.rand(drawn)
    options = dict(rank=4, alpha=8.0, prompt_encoder=encoder or None) | options
    add_method(model, method, Options(quantize=kind, batches=batches(), **options))
    if nf4 and dense_first:
        quantize_nf4(model)
    return model


def batches():
    layout = padded_layout(20).prepare(torch.device("cpu"), torch.float32)
    return [Batch(ids(seed), layout, torch.arange(38), ids(seed).flatten()[:38]) for seed in (1, 2)]


def optimizer_of(model, lr=1e-2):
    method = find_method(model.method)
    groups = method.parameter_groups(trained(model), lr) if hasattr(method, "parameter_groups") else None
    optimizer = build_optimizer("adamw", trained(model), lr=lr, weight_decay=0.0, groups=groups)
    if hasattr(method, "prepare_optimizer"):
        method.prepare_optimizer(model, optimizer)
    return optimizer


def inner(p):
    """Plain tensors to compare: of an NF4 weight its codes."""
    return p.quantized_data if hasattr(p, "quantized_data") else p.detach()


def base_of(folder, name, nf4=False):
    """The model that `make` put the method into."""
    model = load(folder)
    if nf4 or name == "loftq":
        quantize_nf4(model)
    return model


@torch.no_grad()
def move(model):
    """Adapters away from their start."""
    generator = torch.Generator().manual_seed(4)
    for p in trained(model).values():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
