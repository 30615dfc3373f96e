"""What is trained: optimizers and learning-rate schedules."""

import math

import torch
from torch import nn

from modules.adamw import StochasticRoundingAdamW

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
    adamw-8bit  2 bytes, quantised (modules/memory/optim_8bit.py)
    adamw-host  8 bytes of host memory, none on the card (modules/memory/optim_host.py)

    bfloat16 parameters are updated with stochastic rounding, by all three. `groups` divides the parameters: `params` by
    name, and `lr` (LoRA+) or the `lr_ratio` that a recipe's loop reads. Raises ValueError for a bad name or learning
    rate, or if torchao is missing.
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
            from modules.memory.optim_8bit import AdamW8bit
        except ImportError as error:
            raise ValueError(f"--optimizer adamw-8bit: {error}") from error
        return AdamW8bit(groups, lr=lr)
    if name == "adamw-host":
        from modules.memory.optim_host import HostAdamW

        return HostAdamW(groups, lr=lr)
    if name != "adamw":
        raise ValueError(f"--optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")
    if any(p.dtype == torch.bfloat16 for p in parameters.values()):
        return StochasticRoundingAdamW(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def check_lr(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr} must be a positive number")
