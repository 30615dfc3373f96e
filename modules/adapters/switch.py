"""An adapted model without its adapters, or with them merged, and back again, bit for bit.

Every method that replaces modules leaves the frozen weights as they are, so each adapted layer can take three forms:

    adapted       what is trained
    its base      the frozen layer alone, sharing its parameters: `with adapters_disabled(model): …`
    merged        one plain layer with the same outputs: `merged = merge_adapters(model)`, later `merged.unmerge()`

The form that runs is the module that stands in the model; the adapted layers are set aside and come back unchanged.
Nothing is subtracted to get back, since (W + Δ) - Δ is not W in floating point.

The base is the reference model of preference training (DPO, KTO, GRPO): its logits come from the weights that are on
the card already, not from a second copy. Some methods do not start at the base exactly. The reference of PiSSA and
OLoRA, which take a part of the weight away, is the model at their start; that of LoftQ is the quantised base.

A merged model pays nothing for its adapter, but keeps the original weights, on the card or in host memory, to restore
them exactly. A quantised base becomes dense by merging. With `requantize` it is quantised again, and the error of each
layer is measured.

The fused blocks (modules/fused/blocks.py) run a block whose layers were replaced by its plain modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modules.adapters.parts import replace_modules


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a method put into the model in the place of others. ValueError if there are none."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "base_class"):
            layers[name] = module
    if not layers:
        raise ValueError("the model has no adapted layers: nothing was put into it, or they are set aside already")
    return layers


def base_layer(layer: nn.Module) -> nn.Module:
    """The frozen layer that an adapted one stands for; its parameters are shared."""
    if hasattr(layer, "base_layer"):
        return layer.base_layer().train(layer.training)
    base = layer.base_class(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    base.weight, base.bias = layer.weight, layer.bias
    return base.train(layer.training)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what it did before the method was put into it.

    Rows have no virtual tokens there: `generate` knows, and `virtual_ids(model)` is empty.
    Raises ValueError where that is lost: modules that are trained in full (whole_modules.py) have no copy.
    """
    adapted = adapted_layers(model)
    if names := getattr(model, "whole_modules", []):
        raise ValueError(f"{', '.join(names)} are trained in full, without a copy of the base: load it a second time")
    replace_modules(model, {name: base_layer(layer) for name, layer in adapted.items()})
    try:
        yield
    finally:
        _put_back(model, adapted)


@dataclass(frozen=True)
class Requantised:
    """What rounding did to a merged weight M = W + Δ over a quantised base: ‖Q(M) - M‖, as a part of …"""

    of_weight: float
    """… ‖M‖"""
    of_change: float
    """… ‖Δ‖. Above 1, rounding moves the weight further than the adapter does."""


@dataclass
class MergedAdapters:
    model: nn.Module
    adapted: dict[str, nn.Module]
    errors: dict[str, Requantised]
    """Of every layer that was quantised again."""

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the adapted layers back, with the weights that they had."""
        for name, layer in self.adapted.items():
            _move_weight(layer, next(self.model.get_submodule(name).parameters()).device)
        _put_back(self.model, self.adapted)


@torch.no_grad()
def merge_adapters(
    model: nn.Module, *, keep: Literal["device", "host"] = "device", requantize: bool = False
) -> MergedAdapters:
    """Replace every adapted layer by a plain one with the same outputs; the result's `unmerge()` undoes it.

    The original weights stay where they are or wait in host memory. `requantize`: layers over a quantised base are
    quantised again instead of becoming dense. Raises ValueError for methods that no plain layer can stand for.
    """
    adapted = adapted_layers(model)
    check_mergeable(adapted)
    if getattr(model, "streamed", False):
        raise ValueError("streamed weights cannot be merged: they are overwritten at the block's next visit")
    errors = {}
    for name, layer in adapted.items():
        merged = layer.merged()
        kind = getattr(layer, "base_class", nn.Linear)
        if requantize and hasattr(kind, "pack_weight"):
            dense, merged = merged.weight, kind.from_linear(merged)
            errors[name] = requantised(base_layer(layer).dense_weight(), dense, merged.dense_weight())
        replace_modules(model, {name: merged})
        if keep == "host" and all(layer.weight is not p for p in model.parameters()):  # a tied head's stays
            _move_weight(layer, torch.device("cpu"))
    return MergedAdapters(model, adapted, errors)


def requantised(base: Tensor, merged: Tensor, rounded: Tensor) -> Requantised:
    """From W, M = W + Δ and Q(M), all dense."""
    base, merged, rounded = base.float(), merged.float(), rounded.float()
    error, change = (rounded - merged).norm(), (merged - base).norm()
    return Requantised((error / merged.norm()).item(), (error / change).item() if change else 0.0)


def check_mergeable(adapted: dict[str, nn.Module]) -> None:
    if fixed := {type(layer).__name__ for layer in adapted.values() if not hasattr(layer, "merged")}:
        raise ValueError(f"no plain weight does what {', '.join(sorted(fixed))} computes: it cannot be merged")


def _put_back(model: nn.Module, adapted: dict[str, nn.Module]) -> None:
    for name, layer in adapted.items():
        layer.train(model.get_submodule(name).training)  # train() and eval() did not reach the layers aside
    replace_modules(model, adapted)


def _move_weight(layer: nn.Module, device: torch.device) -> None:
    if layer.weight.device != device:
        layer.weight = nn.Parameter(layer.weight.to(device), requires_grad=False)
