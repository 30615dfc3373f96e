"""DoRA: weight-decomposed low-rank adaptation (arXiv:2402.09353). Over an NF4 weight the same layer is QDoRA.

LoRA's updates change a weight's length and its direction together; full fine-tuning changes them independently of
each other (Sec. 3.2). DoRA therefore writes each row w of W as its length times its direction, trains the length
directly and the direction by LoRA (Eq. 5; the paper's columns are rows here, where W is [out, in]):

    V = W + (α/r) · B A        y = m ⊙ (V x) / ‖V‖        m [out], ‖V‖ [out] the lengths of V's rows

m starts as ‖W‖ and B as zero, so training starts at the base model, exactly. ‖V‖ is held constant in backward (Sec.
4.3), which costs nothing in quality and saves the gradient of a norm over [out, in].

‖V‖ needs no second [out, in] matrix either, since V's rows differ from W's by a product of rank r. With s = α/r,

    ‖V‖² = ‖W‖² + 2 s Σ_r (W Aᵀ) ⊙ B + s² Σ_r (B A Aᵀ) ⊙ B        ‖W‖² [out] is computed once

where W Aᵀ, [out, r], comes out of the frozen layer's own product, whatever form its weight is stored in.

It trains r · (in + out) + out numbers per layer: 0.02 % of a 4096 × 4096 matrix more than LoRA. In exchange each
forward reads W a second time (for W Aᵀ), and autograd keeps W x for m's gradient. Worth it at small ranks (4 to 16),
where it gains most over LoRA; merged, it costs nothing.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import lora_peft
from modules.adapters.lora import LoRALinear

NEEDS_RESIDENT = "--method dora starts from the lengths of the weights' rows: it needs --weights resident"


class DoRALinear(LoRALinear):
    """A frozen linear layer with a trained direction, `lora_A` and `lora_B`, and length, `lora_magnitude_vector`."""

    embedding = None

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        super().__init__(base, rank, alpha, dropout, dtype)
        norm_squared = self.dense_weight().detach().float().square().sum(1)
        if not (norm_squared.is_meta or bool(torch.isfinite(norm_squared).all())):
            raise ValueError(NEEDS_RESIDENT)
        self.register_buffer("norm_squared", norm_squared, persistent=False)  # ‖W‖², [out]
        self.lora_magnitude_vector = nn.Parameter(norm_squared.sqrt().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        dropped = self.dropout(x)
        Wx = self.frozen(dropped) if self.training and self.dropout.p else y
        if self.bias is not None:
            Wx = Wx - self.bias
        a = F.linear(dropped, self.lora_A.weight.to(x.dtype))
        BAx = F.linear(a, self.lora_B.weight.to(x.dtype)) * self.scaling
        # As the reference implementation adds it up: dropout reaches all that differs from the base.
        ratio = self.lora_magnitude_vector.float() / self.norm(x.dtype)
        return y + (ratio - 1).to(x.dtype) * Wx + ratio.to(x.dtype) * BAx

    @torch.no_grad()
    def norm(self, dtype: torch.dtype) -> Tensor:
        """‖V‖, [out] float32; `dtype` is that of the product with W."""
        A, B = self.lora_A.weight.float(), self.lora_B.weight.float()
        WA = self.frozen(A.to(dtype))  # [r, out]
        if self.bias is not None:
            WA = WA - self.bias
        cross = (WA.float().t() * B).sum(1)
        return (self.norm_squared + 2 * self.scaling * cross + self.scaling**2 * (B @ (A @ A.t()) * B).sum(1)).sqrt()

    def merged_weight(self) -> Tensor:
        V = super().merged_weight()
        return V * (self.lora_magnitude_vector.float() / V.norm(dim=1))[:, None]


add = partial(lora_peft.add, layer=DoRALinear)


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    config, tensors = lora_peft.export(model)
    return config | {"use_dora": True}, tensors


def opens(config: dict) -> bool:
    return config.get("peft_type") == "LORA" and bool(config.get("use_dora"))


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    return lora_peft.load(model, config | {"use_dora": False}, tensors, dtype, DoRALinear)
