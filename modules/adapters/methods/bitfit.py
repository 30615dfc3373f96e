"""BitFit: only biases are trained (arXiv:2106.10199, Sec. 3).

    y = W x + b + b'          b' [out], starts at 0; b is the base model's own bias, if it has one

Llama has no biases, so there BitFit adds them. (Where b exists, b' is what training adds to it: under Adam without
weight decay that is the same training.) On all linear layers of the blocks this is, per block, the sum of their output
sizes: 43 thousand numbers, 1.4 million for the 32 blocks of Llama 3 8B, a thirtieth of LoRA's at rank 16.

A bias moves all tokens alike; it cannot make the model look at other inputs. The paper finds it level with full
fine-tuning on small data sets and behind it on large ones. Backward is as cheap as it gets: no weight's gradient, and
b' needs no input kept, only the sum of dy over tokens. Merging is exact: b + b' (of a Llama saved with biases,
`attention_bias` and `mlp_bias` in config.json must be true).

PEFT has no BitFit, but has LoRA whose B carries a bias, y = W x + s · (B (A x) + b'). With r = 1, s = 1, A = 0 and
B = 0 that is BitFit, and since the gradients of A and B are then 0, too, it trains as BitFit. So this is the format on
disk: PEFT opens it, at the price of in + out zeros per layer.
"""

import torch
from torch import Tensor, nn

from modules.adapters.lora import ALL_LINEAR
from modules.adapters.options import Options
from modules.adapters.parts import FrozenLinear, find_saved, find_targets, modules_of, put_in
from modules.adapters.peft_names import PREFIX, target_modules

KEY = "bitfit_bias"
READS = ("targets",)
VECTORS = True


class BitFitLinear(FrozenLinear):
    """A frozen linear layer plus the trained `bitfit_bias`."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype):
        super().__init__(base)
        self.bitfit_bias = nn.Parameter(torch.zeros(base.out_features, device=base.weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.bitfit_bias.to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs and the bias b + b'."""
        bias = self.bitfit_bias.float()
        return self.dense(bias=bias if self.bias is None else self.bias.float() + bias)


def add(model: nn.Module, options: Options) -> list[str]:
    layers = find_targets(model, ALL_LINEAR if options.targets is None else options.targets)
    return put_in(model, {name: BitFitLinear(layer, options.dtype) for name, layer in layers.items()})


def missing_biases(model: nn.Module) -> tuple[dict[str, tuple[int]], dict[str, bool]]:
    """Biases that the merged model has on disk and the base lacks, with their shapes; what config.json says of them.

    A Llama has biases on all layers of its attention or on none, and so of its feed-forward: where only some are
    trained the others get zeros. Raises ValueError for a layer that can have none there, such as the head.
    """
    new = [name for name, layer in modules_of(model, BitFitLinear).items() if layer.bias is None]
    inside = {f"{name}.": block for name, block in model.named_modules() if any(block is b for b in model.blocks)}
    if wrong := [name for name in new if not name.startswith(tuple(inside))]:
        raise ValueError(f"{', '.join(wrong)} got a bias, for which a Llama's config.json has no word: not mergeable")
    shapes, fields = {}, {}
    for part, field in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
        if not any(name.split(".")[-2] == part for name in new):
            continue
        fields[field] = True
        for prefix, block in inside.items():
            for leaf, layer in block.get_submodule(part).named_children():
                shapes[f"{prefix}{part}.{leaf}.bias"] = (layer.out_features,)
    return shapes, fields


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    layers = modules_of(model, BitFitLinear)
    targets = target_modules(layers, (name for name, _ in model.named_modules()))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_bias": True, "target_modules": targets}
    tensors = {}
    for name, layer in layers.items():
        b = layer.bitfit_bias
        tensors[f"{PREFIX}{name}.lora_A.weight"] = b.new_zeros(1, layer.in_features)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.new_zeros(layer.out_features, 1)
        tensors[f"{PREFIX}{name}.lora_B.bias"] = b
    return config, tensors


def opens(config: dict) -> bool:
    return config.get("peft_type") == "LORA" and bool(config.get("lora_bias"))


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    if config.get("lora_alpha") != config.get("r") or any(t.any() for n, t in tensors.items() if n.endswith(".weight")):
        raise ValueError("it is a LoRA with lora_bias, which no method has; of these only BitFit, A = B = 0, is read")
    biases = {n.replace(".lora_B.bias", f".{KEY}"): t for n, t in tensors.items() if not n.endswith(".weight")}
    layers = find_saved(model, biases, KEY)
    return put_in(model, {name: BitFitLinear(layer, dtype) for name, layer in layers.items()}, KEY, biases)
