"""rsLoRA: rank-stabilised LoRA (arXiv:2312.03732). LoRA with its scale divided by √r instead of r.

    y = W x + (α/√r) · B A x

The entries of A x do not shrink as r grows, and B A x sums r of them. Under LoRA's α/r the sum, and the gradients that
flow back through it, therefore fade like 1/√r or faster: large ranks learn slowly and look as if they were useless.
Theorem 3.2: outputs and gradients keep their size, forward and backward, for any rank exactly if the scale is of order
1/√r. At the start, where B = 0 and only B has a gradient, ‖∂loss/∂B‖ ~ √r · scale: constant here, 1/√r with LoRA.

Shapes, parameter count and cost are LoRA's (lora.py): A [r, in], B [out, r]. Use it for ranks above about 32.
At r = 16, rsLoRA with α = 8 is LoRA with α = 32: carry an α over from LoRA by dividing it by √r.
"""

from functools import partial

import torch
from torch import Tensor, nn

from modules.adapters import lora_peft
from modules.adapters.lora import LoRALinear
from modules.adapters.lora_embedding import LoRAEmbedding


class RSLoRAEmbedding(LoRAEmbedding):
    @property
    def scaling(self) -> float:
        return self.alpha / self.rank**0.5


class RSLoRALinear(LoRALinear):
    embedding = RSLoRAEmbedding
    scaling = RSLoRAEmbedding.scaling


add = partial(lora_peft.add, layer=RSLoRALinear)


def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    config, tensors = lora_peft.export(model)
    return config | {"use_rslora": True}, tensors


def opens(config: dict) -> bool:
    rslora = config.get("peft_type") == "LORA" and bool(config.get("use_rslora"))
    return rslora and not config.get("use_dora")


def load(model: nn.Module, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    return lora_peft.load(model, config | {"use_rslora": False}, tensors, dtype, RSLoRALinear)
