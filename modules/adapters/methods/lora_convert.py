"""What other methods add to a weight, as a plain LoRA: y = W x + (α/r) · B A x.

    PiSSA, OLoRA   s · [B, -B₀] [A; A₀]            exact, rank 2 r: what was trained since the start (pissa.py)
    VeRA           (b ⊙ B) (d ⊙ A)                 exact, VeRA's rank
    DoRA           diag(m / ‖V‖) V - W             of full rank, since every row of W changes its length: approximated
    (IA)³          diag(l) W - W, W diag(l) - W    likewise
    LoRA           s · B A                         itself; of a smaller rank approximated

The best approximation of Δ by rank r keeps its r largest singular values (Eckart and Young): with Δ = U S Vᵀ

    A = V[:r]ᵀ   B = U[:r] S[:r]   ‖Δ - B A‖² = Σ S[r:]²        so the error is known in advance
"""

import torch
from torch import Tensor, nn

from modules.adapters.lora import LoRALinear
from modules.adapters.lora_combine import factor, truncate
from modules.adapters.methods.dora import DoRALinear
from modules.adapters.methods.ia3 import IA3Linear
from modules.adapters.methods.pissa import PiSSALinear
from modules.adapters.methods.vera import VeRALinear

Change = Tensor | tuple[Tensor, Tensor]
"""Δ [out, in], or where it has a low rank its factors A [r, in] and B [out, r]."""


@torch.no_grad()
def change_of(layer: nn.Module) -> Change:
    """Δ of an adapted linear layer over its own base weight. Raises ValueError for what no LoRA can do."""
    if isinstance(layer, PiSSALinear):
        A = torch.cat([layer.lora_A.weight, layer.start_A])
        return A, torch.cat([layer.lora_B.weight, -layer.start_B], dim=1) * layer.scaling
    if isinstance(layer, DoRALinear):
        return layer.merged_weight() - layer.dense_weight().float()
    if isinstance(layer, LoRALinear):
        return layer.lora_A.weight, layer.lora_B.weight * layer.scaling
    if isinstance(layer, VeRALinear):
        return layer.vera_lambda_d[:, None] * layer.vera_A, layer.vera_lambda_b[:, None] * layer.vera_B
    if isinstance(layer, IA3Linear):
        if layer.bias is not None and not layer.scales_input:
            raise ValueError("its bias is scaled, too, which a LoRA does not reach")
        W, scale = layer.dense().weight.float(), layer.ia3_l.float() - 1
        return W * (scale if layer.scales_input else scale[:, None])
    raise ValueError(f"no LoRA does what a {type(layer).__name__} computes")


def fit(change: Change, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A [r, in] and B [out, r] closest to Δ, with ‖Δ - B A‖ and ‖Δ‖."""
    if isinstance(change, Tensor):
        A, B = factor(change.float(), min(change.shape))
    else:
        A, B = truncate(change[0].float(), change[1].float(), len(change[0]))
    return A[:rank], B[:, :rank], B[:, rank:].norm().item(), B.norm().item()
