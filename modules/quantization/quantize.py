"""The one door to weights stored small: `--quantize nf4`, int8, int4 or float8."""

import importlib

from torch import Tensor, nn

KINDS = {  # torchao, behind NF4, takes seconds to import
    "nf4": ("modules.quantization.nf4", "NF4Linear"),
    "int8": ("modules.quantization.quantized", "Int8Linear"),
    "int4": ("modules.quantization.quantized", "Int4Linear"),
    "float8": ("modules.quantization.quantized", "Float8Linear"),
}


def linear_kind(name: str) -> type[nn.Linear] | None:
    """The class of layer that stores its weight like this; None for "none". ValueError for an unknown name."""
    if name == "none":
        return None
    if name not in KINDS:
        raise ValueError(f"--quantize {name!r} is not one of none, {', '.join(KINDS)}")
    module, attribute = KINDS[name]
    return getattr(importlib.import_module(module), attribute)


def quantize_blocks(model: nn.Module, kind: type[nn.Linear] | None, *, head: bool = False) -> list[str]:
    """Replace every linear layer of the model's blocks, and its head if wanted, by one of this kind; → their names.

    Works before loading (on the meta device: each weight is then quantised as it arrives, and the dense model never
    exists) or after it. Raises ValueError for a head that is the embedding, and for a head without a kind.
    """
    names = []
    check_head(kind, head)
    if kind is None:
        return names
    if head and type(model.head) is nn.Linear:
        if model.head.weight is model.model.embed_tokens.weight:
            raise ValueError("--quantize-head: this model's head shares the embedding's weight, which stays dense")
        names = [name for name, module in model.named_modules() if module is model.head]
        model.set_submodule(names[0], kind.from_linear(model.head))
    for prefix, block in ((n, m) for n, m in model.named_modules() if any(m is b for b in model.blocks)):
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear and ".lora_" not in name:  # adapters stay as they are
                block.set_submodule(name, kind.from_linear(layer))
                names.append(f"{prefix}.{name}")
    return names


def check_head(kind: type[nn.Linear] | None, head: bool) -> None:
    if head and kind is None:
        raise ValueError("--quantize-head quantises the head like the blocks: it needs --quantize nf4, int8 …")


def stored_as(kind: type[nn.Linear], weight: Tensor) -> nn.Linear:
    """A layer of this kind with a dense weight, whose `dense_weight()` is the weight after rounding."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return kind.from_linear(dense)
