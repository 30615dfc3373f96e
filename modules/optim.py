"""What is trained: optimizers and learning-rate schedules."""

import math

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw-8bit", "adamw-host")


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Rises linearly from 0 over `warmup_steps`, then stays (constant) or falls to 0 at `total_steps` along a line or half
    a cosine: the schedules that transformers calls by the same names, value for value.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


def describe_trained(model: nn.Module) -> str:
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"training {trained:,} of {sum(p.numel() for p in parameters):,} parameters"


def build_optimizer(
    name: str, parameters: dict[str, nn.Parameter], *, lr: float, weight_decay: float, groups: list[dict] | None = None
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over named parameters; matrices decay, vectors (norms, biases) do not.

    adamw       8 bytes of state per parameter, in float32 on the parameter's device
    adamw-8bit  2 bytes, quantised (modules/optim_8bit.py)
    adamw-host  8 bytes of host memory, none on the card; every step moves them there and back (modules/optim_host.py)

    bfloat16 parameters are updated with stochastic rounding, by all three. `groups` divides the parameters, each group
    with its `params` by name and its `lr` (LoRA+) or the `lr_ratio` that a recipe's loop reads. Raises ValueError for
    an unknown name, a learning rate that is not positive, or if torchao is missing.
    """
    check_lr(lr)
    groups = [
        group | {"params": [p for p in group["params"].values() if (p.ndim >= 2) == decays], "weight_decay": decay}
        for group in groups or [{"params": parameters}]
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw-8bit":
        try:
            from modules.optim_8bit import AdamW8bit
        except ImportError as error:
            raise ValueError(f"--optimizer adamw-8bit: {error}") from error
        return AdamW8bit(groups, lr=lr)
    if name == "adamw-host":
        from modules.optim_host import HostAdamW

        return HostAdamW(groups, lr=lr)
    if name != "adamw":
        raise ValueError(f"--optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")
    if any(p.dtype == torch.bfloat16 for p in parameters.values()):
        return StochasticRoundingAdamW(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def check_lr(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr} must be a positive number")


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

    bfloat16 is the upper half of a float32: adding a uniform 16-bit number to the lower half carries into the upper
    one with exactly the right probability.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
