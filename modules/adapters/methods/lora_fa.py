"""LoRA-FA: LoRA with A frozen (arXiv:2308.03303).

    y = W x + (α/r) · B A x            A [r, in] random and frozen, B [out, r] zero and trained

A's gradient is what LoRA needs x for. With A frozen a layer keeps for backward only A x, r numbers per token instead
of `in` (16 instead of 4096), and trains r · out numbers instead of r · (in + out). Use it where activations, not
weights, fill the memory and blocks are not recomputed (`--activations none`): a recomputed block keeps its input
anyway, and there this saves nothing. It learns less than LoRA at the same rank; give it a higher one.

The weight's update can only lie in the span of A's rows. Of all ∂B, the one whose effect s · ∂B A (s = α/r) comes
closest to what full fine-tuning would do, -lr · ∂W, is (the paper's correction of the gradient; least squares)

    ∂B ← (1/s²) · ∂B (A Aᵀ)⁻¹

which `prepare_optimizer` applies before every step. A never changes, so (A Aᵀ)⁻¹, [r, r], is computed once. (PEFT's
LoraFAOptimizer does the same with a bfloat16 product and Adam's ε at 1e-6, outside the bias correction.)
"""

import math

import torch
from torch import Tensor, nn

from modules.adapters import lora_peft
from modules.adapters.lora import lora_layers
from modules.adapters.options import Options

export = lora_peft.export


def add(model: nn.Module, options: Options) -> list[str]:
    """LoRA's start, but A follows from the run's seed alone: it is in no checkpoint, a resumed run draws it again."""
    names = lora_peft.add(model, options)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for layer in lora_layers(model).values():
        A = nn.init.kaiming_uniform_(torch.empty(layer.lora_A.weight.shape), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            layer.lora_A.weight.copy_(A)
    freeze_A(model)
    return names


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    names = lora_peft.load(model, config, tensors, dtype)
    freeze_A(model)
    return names


def freeze_A(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)


@torch.no_grad()
def prepare_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Correct B's gradients before every step. Clipping, which comes before it, sees them as they are."""
    factors = []
    for layer in lora_layers(model).values():
        A = layer.lora_A.weight.float()
        inverse = torch.linalg.pinv(A @ A.t() + 1e-8 * torch.eye(layer.rank, device=A.device))
        factors.append((layer.lora_B.weight, inverse, 1 / layer.scaling**2))

    @torch.no_grad()
    def correct(optimizer, args, kwargs) -> None:
        for B, inverse, scale in factors:
            if B.grad is not None:
                B.grad.copy_(scale * (B.grad.float() @ inverse))

    optimizer.register_step_pre_hook(correct)
