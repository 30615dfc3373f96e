"""AdamW with its two moments in 8 bits: 2 bytes of state per parameter instead of 8 (arXiv:2110.02861), from torchao.

Every 256 numbers share a scale, their largest magnitude. A code is an index into 256 fixed levels, most of them close
to 0 ("dynamic quantisation", Sec. 2), because most numbers are far smaller than the largest. A step decodes, computes
in float32 and quantises again, in kernels compiled from torchao's function.

The compiler makes kernels for each size of parameter, which takes seconds in the first step on a GPU, and they pass the
moments on in float32: 2 GB for the embedding of a 1B Llama. So large parameters are taken in parts of one size.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from modules.quantization import torchao_parts

PART = 2**24  # numbers of a parameter at a time; a multiple of the 256 that share a scale


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
        on_cpu = not any(p.is_cuda for group in self.param_groups for p in group["params"])
        # On a CPU a compilation takes 10 seconds per size and a C++ compiler, for a step of milliseconds.
        stance = torch.compiler.set_stance("force_eager") if on_cpu else nullcontext()
        with stance, torch._dynamo.utils.disable_cache_limit():
            for group in self.param_groups:
                # A number would be compiled into the kernel, each new one again; a tensor is an argument.
                lr = torch.tensor(group["lr"], dtype=torch.float32)
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, lr, group)

    def _update(self, p: Tensor, lr: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = self._new_buffer(p, True), self._new_buffer(p, False)
        state["step"] += 1
        update = torch.compile(torchao_parts.single_param_adam, fullgraph=True, dynamic=False)
        settings = (*group["betas"], group["weight_decay"], group["eps"], True, p.dtype == torch.bfloat16)
        for part, grad, m, v in _parts(p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"]):
            update(part, grad, state["step"], m, v, None, lr, *settings)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        # Unquantised moments would have the parameter's dtype. bfloat16 loses v's changes of 1/1000 per step.
        return super()._new_buffer(p, signed).float()


def _parts(p: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of all these tensors, which share memory with them."""
    if p.numel() <= PART or not p.is_contiguous():
        yield p, *others
        return
    for start in range(0, p.numel(), PART):
        end = min(start + PART, p.numel())
        yield tuple(_part(tensor, start, end, p.numel()) for tensor in (p, *others))


def _part(tensor: Tensor, start: int, end: int, total: int) -> Tensor:
    """The part for the numbers start to end of `total`; for a quantised tensor, their codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.reshape(-1)[start * tensor.numel() // total : end * tensor.numel() // total]
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    inner |= {name: _part(inner[name], start, end, total) for name in ("codes", "scale")}
    return type(tensor).__tensor_unflatten__(inner, context, inner["codes"].shape, (1,))
