"""LoRA+: LoRA with a larger learning rate for B than for A (arXiv:2402.12354).

    lr_A = lr        lr_B = λ · lr        λ = 16

The layer is LoRA's (lora.py): A [r, in] random, B [out, r] zero, the same parameters and memory; only the
optimizer's groups differ, so on disk this is a plain LoRA. Why unequal: as the width n of the network grows, features
are learned at a stable, non-vanishing rate only if lr_A is of order 1/n and lr_B of order 1 (Theorem 1). With one rate
for both, either B hardly moves or A moves too far. The theory asks for λ of order n; in practice λ = 16 with half of
LoRA's usual lr works (Sec. 5). Use it where LoRA converges slowly, on tasks far from the base model's own.
"""

from torch import nn

from modules.adapters import lora_peft

RATIO = 16.0  # λ

add, export, load = lora_peft.add, lora_peft.export, lora_peft.load


def parameter_groups(trainable: dict[str, nn.Parameter], lr: float, ratio: float = RATIO) -> list[dict]:
    """The named parameters for `build_optimizer(groups=…)`: λ · lr for B and for vectors, as PEFT groups them.

    A schedule that sets each step's rate multiplies it by the group's `lr_ratio`.
    """
    fast = {name: p for name, p in trainable.items() if ".lora_B." in name or p.ndim < 2}
    slow = {name: p for name, p in trainable.items() if name not in fast}
    return [
        {"params": slow, "lr": lr, "lr_ratio": 1.0},
        {"params": fast, "lr": lr * ratio, "lr_ratio": ratio},
    ]
