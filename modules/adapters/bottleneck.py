"""Bottleneck adapters: small two-layer networks put into the blocks of a frozen model.

    adapter(h) = W_up f(W_down h + b_down) + b_up          W_down [r, D], W_up [D, r], f a non-linearity

They differ in where they stand and what they read: see houlsby.py, pfeiffer.py and parallel.py in methods/.

W_up and both biases start at zero and W_down at random, as LoRA does (arXiv:2106.09685): training starts at the base
model, exactly, and W_up has a gradient from the first step on. `--rank` is the size r of the bottleneck and `--dropout`
acts on f's output. An adapter has 2 r D + r + D numbers. The non-linearity is what it has over LoRA, and what it pays
for with two more products in every pass for good: it cannot be merged into a weight.

PEFT has none of them. On disk they are PEFT's two files with a `peft_type` of our own and the fields `bottleneck_size`,
`alpha` and `dropout`; tensors are `<module>.adapter.{down,up}.{weight,bias}` behind PEFT's prefix, where the module is
the one whose output the adapter adds to: `mlp.down_proj`, say.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.options import Options
from modules.adapters.parts import find_saved, find_targets, modules_of, put_in, tensors_of

KEY = "adapter."


class Bottleneck(nn.Module):
    """scale · (up(dropout(f(down(x))))): [.., D] → [.., r] → [.., D], computed in x's dtype."""

    def __init__(self, dim: int, options: Options, activation: Callable, *, scale: float = 1.0, device: torch.device):
        super().__init__()
        self.down = nn.Linear(dim, options.rank, device=device, dtype=options.dtype)
        self.up = nn.Linear(options.rank, dim, device=device, dtype=options.dtype)
        self.activation, self.scale, self.alpha = activation, scale, options.alpha
        self.dropout = nn.Dropout(options.dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down, self.up
        h = self.activation(F.linear(x, down.weight.to(x.dtype), down.bias.to(x.dtype)))
        return F.linear(self.dropout(h), up.weight.to(x.dtype), up.bias.to(x.dtype)) * self.scale


def add(model: nn.Module, options: Options, layer: type[nn.Module]) -> list[str]:
    """Replace modules by `layer`, whose `replaces` (a class) and `targets` (names) say which; it has an `adapter`."""
    targets = layer.targets if options.targets is None else options.targets
    modules = find_targets(model, targets, layer.replaces, layer.replaces.__name__)
    return put_in(model, {name: layer(module, options) for name, module in modules.items()})


def export(model: nn.Module, layer: type[nn.Module]) -> tuple[dict, dict[str, Tensor]]:
    layers = modules_of(model, layer)
    first = next(iter(layers.values())).adapter
    sizes = {"bottleneck_size": first.down.out_features, "alpha": first.alpha, "dropout": first.dropout.p}
    return {"peft_type": layer.peft_type, "target_modules": sorted(layers)} | sizes, tensors_of(layers, KEY)


def load(
    model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype, layer: type[nn.Module]
) -> list[str]:
    for field in ("bottleneck_size", "alpha"):
        if not isinstance(config.get(field), int | float) or config[field] <= 0:
            raise ValueError(f"{field} is {config.get(field)!r}, expected a positive number")
    modules = find_saved(model, tensors, KEY, layer.replaces, layer.replaces.__name__)
    options = Options(rank=config["bottleneck_size"], alpha=config["alpha"], dropout=0.0, dtype=dtype)
    return put_in(model, {name: layer(module, options) for name, module in modules.items()}, KEY, tensors)
