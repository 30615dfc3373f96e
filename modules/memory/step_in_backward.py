"""The optimizer's step inside backward: each weight is updated once its gradient is complete, which is then freed.

Ordinarily every gradient waits for the end of backward, 2 bytes per bfloat16 weight: 16 GB for an 8B model. Here one
gradient exists at a time (with compiled blocks, those of one block), as in LOMO (arXiv:2306.09782) but with any
optimizer. The arithmetic is the same. A hook on each parameter calls optimizer.step(), which skips parameters without a
gradient: all but one. A checkpoint fits runs with and without this.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


def step_in_backward(
    optimizer: torch.optim.Optimizer, *, grad_accum: int, max_grad_norm: float, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Make backward() update the optimizer's parameters, which it leaves without gradients.

    Set the learning rate before backward; a step() after it finds nothing to do. Returns a function that gives the
    global gradient norm, on the device, of the backward passes since its last call. A tied weight is updated once, with
    the sum of its gradients. Raises ValueError: see `check`.
    """
    check(grad_accum=grad_accum, max_grad_norm=max_grad_norm, dtype=dtype)
    norms = []
    weak = weakref.ref(optimizer)  # parameter → hook → optimizer → parameter: a cycle that Python could not free

    def update(parameter: nn.Parameter) -> None:
        norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        weak().step()
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(update)

    def grad_norm() -> Tensor:
        total = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))  # perhaps nothing had a gradient
        norms.clear()
        return total

    return grad_norm


def check(*, grad_accum: int, max_grad_norm: float, dtype: torch.dtype) -> None:
    """Raise ValueError for what needs all gradients at once."""
    if grad_accum != 1:
        raise ValueError(
            f"--step-in-backward frees each gradient at once, so --grad-accum {grad_accum} has nothing to add up: "
            "use --grad-accum 1 and a larger --batch-size"
        )
    if max_grad_norm:
        raise ValueError(
            f"--step-in-backward updates weights before the global gradient norm is known: --max-grad-norm "
            f"{max_grad_norm:g} cannot be kept to; use --max-grad-norm 0 (the norm is logged all the same)"
        )
    if dtype == torch.float16:
        raise ValueError(
            "--step-in-backward updates weights before the loss scaler has seen every gradient: "
            "use --dtype bfloat16 or float32 instead of float16"
        )
