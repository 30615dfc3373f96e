"""LN-tuning: only the norms' weights are trained (arXiv:2312.11420, Sec. 3).

    y = w' ⊙ x / rms(x)          w' [D], starts as the base model's w

All that is learned is how strongly each of the D features enters a block's attention, its feed-forward and the head.
In Llama these are 2 norms per block and the last one, (2 L + 1) · D numbers: 266 thousand in Llama 3 8B, among the
fewest of all methods. Use it to move a model to another domain or modality cheaply (the paper turns text models into
multi-modal ones); it teaches few facts. Gradients still flow through every block: it saves memory for optimizer states,
not for activations.

The base model's `weight` stays as it is and `ln_tuning_layers`, a norm of its own (PEFT's name and idea), does the
work. Merging puts its weight in the place of the other.
"""

import torch
from torch import Tensor, nn

from modules.adapters.options import Options
from modules.adapters.parts import find_saved, find_targets, modules_of, put_in, tensors_of
from modules.adapters.peft_names import target_modules
from modules.norm import RMSNorm

TARGETS = ("input_layernorm", "post_attention_layernorm", "norm")
KEY = "ln_tuning_layers"
PEFT_TYPE = "LN_TUNING"
READS = ("targets",)
VECTORS = True


class TunedNorm(RMSNorm):
    """A frozen RMSNorm and a trained copy of it, which does the work."""

    def __init__(self, base: RMSNorm, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.weight, self.eps = base.weight, base.eps
        self.ln_tuning_layers = RMSNorm(base.weight.shape[0], base.eps)
        self.ln_tuning_layers.weight = nn.Parameter(base.weight.detach().to(dtype, copy=True))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_tuning_layers(x)

    def base_layer(self) -> RMSNorm:
        norm = RMSNorm(self.weight.shape[0], self.eps)
        norm.weight = self.weight
        return norm

    def merged(self) -> RMSNorm:
        """A plain norm with the trained weight, in the base model's dtype."""
        norm = RMSNorm(self.weight.shape[0], self.eps)
        weight = self.ln_tuning_layers.weight.detach().to(self.weight.dtype, copy=True)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return norm.train(self.training)


def add(model: nn.Module, options: Options) -> list[str]:
    norms = find_targets(model, TARGETS if options.targets is None else options.targets, RMSNorm, "norm")
    return put_in(model, {name: TunedNorm(norm, options.dtype) for name, norm in norms.items()})


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    norms = modules_of(model, TunedNorm)
    targets = target_modules(norms, (name for name, _ in model.named_modules()))
    config = {"peft_type": PEFT_TYPE, "target_modules": targets, "modules_to_save": None}
    return config, tensors_of(norms, KEY)


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    norms = find_saved(model, tensors, KEY, RMSNorm, "norm")
    return put_in(model, {name: TunedNorm(norm, dtype) for name, norm in norms.items()}, KEY, tensors)
