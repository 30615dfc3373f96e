"""AdamW, written out, with stochastic rounding for bfloat16 weights."""

import math

import torch
from torch import Tensor


class StochasticRoundingAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights, without float32 copies of them.

    bfloat16 resolves 1/256 of a value, an Adam step is often smaller: rounding to nearest would lose it every time.
    Rounding up or down at random, with probabilities given by the distance, is right on average (arXiv:2010.06192).
    The moments are float32.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["step"] += 1
                adamw_update(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"].item(), group)


def adamw_update(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: float, group: dict) -> None:
    """Step number `step`, counted from 1, of AdamW (Alg. 2, arXiv:1711.05101) on p, m and v, in place.

        m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
        p ← p - lr λ p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

    The arithmetic is float32, as m and v are; a bfloat16 p is then rounded stochastically.
    """
    beta1, beta2 = group["betas"]
    grad = grad.float()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight = p.float().mul_(1 - group["lr"] * group["weight_decay"])
    weight.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
    p.copy_(stochastic_round(weight) if p.dtype == torch.bfloat16 else weight)


def stochastic_round(x: Tensor) -> Tensor:
    """float32 → bfloat16, up or down at random so that the expectation is x.

    bfloat16 is the upper half of a float32: a random 16-bit number added to the lower half carries as often as needed.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
