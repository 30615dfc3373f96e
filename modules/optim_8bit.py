"""AdamW with its two moments in 8 bits: 2 bytes of state per parameter instead of 8 (arXiv:2110.02861), from torchao.

Every 256 numbers share a scale, their largest magnitude; a code is an index into 256 fixed levels that lie the denser
the closer they are to 0 ("dynamic quantisation", Sec. 2), because most of a block is far smaller than its largest
number. A step reads the codes, does the arithmetic in float32 and quantises the result again, in one kernel that
torchao compiles for each shape of parameter: the first step on a GPU takes seconds.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from modules import torchao_parts


class AdamW8bit(torchao_parts.AdamW8bit):
    """torchao's AdamW8bit, used like any other optimizer: a learning rate is a number. bfloat16 rounds stochastically.

    Tensors that are small (fewer than 4,096 elements) or no multiple of 256 keep unquantised, float32 moments.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bf16_stochastic_round=True)
        for group in self.param_groups:
            group["lr"] = lr  # torchao has made it a tensor

    @torch.no_grad()
    def step(self, closure=None) -> None:
        # A number would be compiled into the kernel, and each new one compile it anew; a tensor is an argument.
        rates = [group["lr"] for group in self.param_groups]
        on_cpu = not any(p.is_cuda for group in self.param_groups for p in group["params"])
        # On a CPU a compilation takes 10 seconds per shape and a C++ compiler, for a step of milliseconds.
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            try:
                for group, lr in zip(self.param_groups, rates, strict=True):
                    group["lr"] = torch.tensor(lr, dtype=torch.float32)
                super().step()
            finally:
                for group, lr in zip(self.param_groups, rates, strict=True):
                    group["lr"] = lr

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        # What is not quantised would be of the parameter's dtype, and bfloat16 loses most of v's changes: at 1/1000
        # per step they are below its resolution.
        return super()._new_buffer(p, signed).float()
