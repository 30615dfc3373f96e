"""(IA)³: infused adapter by inhibiting and amplifying inner activations (arXiv:2205.05638, Sec. 3.3).

Three learned vectors per block rescale keys, values and the feed-forward's inner activations, entry by entry:

    softmax(q (l_k ⊙ k)ᵀ / √H) (l_v ⊙ v)            l_k, l_v [kv heads · H]
    W_d (l_ff ⊙ silu(W_g x) ⊙ W_u x)                l_ff [F]

So k_proj and v_proj have their outputs scaled, down_proj its input. All vectors start at 1: training starts at the base
model. (Keys are scaled before their rotation, where k_proj ends, as PEFT does it.)

That is 2 · kv heads · H + F numbers per block: 524 thousand in Llama 3 8B, where LoRA of rank 16 has 42 million. A
vector can only turn up or down what the model computes already, so use it for few examples and many tasks (the paper
trains on 20 to 70 examples; lr 3e-3); LoRA fits more. As the weights are frozen but scaled, merging is exact:

    diag(l) W x + l ⊙ b    outputs scaled           W diag(l) x + b    inputs scaled
"""

import torch
from torch import Tensor, nn

from modules.adapters.options import Options
from modules.adapters.parts import FrozenLinear, find_saved, find_targets, modules_of, put_in, tensors_of
from modules.adapters.peft_names import PREFIX, target_modules

TARGETS = ("k_proj", "v_proj", "down_proj")
INPUT_SCALED = ("down_proj",)
KEY = "ia3_l"
PEFT_TYPE = "IA3"
READS = ("targets",)
VECTORS = True


class IA3Linear(FrozenLinear):
    """A frozen linear layer whose outputs, or inputs, are scaled by the trained vector `ia3_l`."""

    def __init__(self, base: nn.Linear, scales_input: bool, dtype: torch.dtype):
        super().__init__(base)
        self.scales_input = scales_input
        size = base.in_features if scales_input else base.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, device=base.weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        # The product is rounded to x's dtype, not the vector: in bfloat16 1.003 is 1.
        if self.scales_input:
            return self.frozen((x * self.ia3_l).to(x.dtype))
        return (self.frozen(x) * self.ia3_l).to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs; the scaling is formed in float32 and rounded once."""
        plain, scale = self.dense(), self.ia3_l.float()
        if self.scales_input:
            return self.dense(plain.weight.float() * scale)
        bias = None if self.bias is None else self.bias.float() * scale
        return self.dense(plain.weight.float() * scale[:, None], bias)


def add(model: nn.Module, options: Options) -> list[str]:
    layers = find_targets(model, TARGETS if options.targets is None else options.targets)
    of_inputs = {name: name.rpartition(".")[2] in INPUT_SCALED for name in layers}
    return put_in(model, {name: IA3Linear(layer, of_inputs[name], options.dtype) for name, layer in layers.items()})


# On disk a vector that scales inputs is [1, in], one that scales outputs [out, 1]: that says which it is.


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    layers = modules_of(model, IA3Linear)
    inputs = [name for name, layer in layers.items() if layer.scales_input]
    outputs = [name for name in layers if name not in inputs]
    targets = target_modules(layers, (name for name, _ in model.named_modules()))
    of_inputs, of_outputs = (
        {t for t in targets if any(f".{n}".endswith(f".{t}") for n in x)} for x in (inputs, outputs)
    )
    if of_inputs & of_outputs:  # a short name stands for layers of both sorts
        targets, of_inputs = sorted(layers), inputs
    config = {"peft_type": PEFT_TYPE, "target_modules": targets, "feedforward_modules": sorted(of_inputs)}
    config |= {"fan_in_fan_out": False, "init_ia3_weights": True, "modules_to_save": None}
    tensors = tensors_of(layers, KEY)
    for name, layer in layers.items():
        shape = (1, -1) if layer.scales_input else (-1, 1)
        tensors[f"{PREFIX}{name}.{KEY}"] = layer.ia3_l.detach().view(shape)
    return config, tensors


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    layers = find_saved(model, tensors, KEY)
    if wrong := [f"{name} {tuple(t.shape)}" for name, t in tensors.items() if t.ndim != 2 or 1 not in t.shape]:
        raise ValueError(f"expected vectors of shape [1, in] or [out, 1], got {', '.join(wrong)}")
    of_inputs = {name: tensors[f"{PREFIX}{name}.{KEY}"].shape[0] == 1 for name in layers}
    new = {name: IA3Linear(layer, of_inputs[name], dtype) for name, layer in layers.items()}
    return put_in(model, new, KEY, {name: tensor.flatten() for name, tensor in tensors.items()})
