"""The language-model loss without the logits.

For Llama 3 the logits of 8,192 tokens are 8,192 × 128,256 numbers: 4.2 GB in float32, more than the 4-bit model that
made them, and autograd would keep two or three such tensors. They are needed for a moment only, so the positions go
through the head in chunks. The gradient of cross entropy is known in closed form,

    ∂loss/∂logits = softmax(logits) − onehot(target)

so `linear_cross_entropy` forms the gradients of hidden states and head *during forward*, overwriting each chunk's
logits; backward only scales them. `linear_logprobs` is for losses that weigh tokens afterwards (DPO, RL,
distillation): its gradient is not known in forward, so each chunk is computed a second time in backward.

Both take the head as a *module* (a linear layer, LoRA, quantised, with or without bias) and call it: nothing that an
adapter adds to the head can be forgotten here. Positions to be ignored are dropped before the projection.

N target positions, D model, V vocabulary, C chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.compile import compiled

IGNORE_INDEX = -100
CHUNK_BYTES = 256 * 2**20  # of logits alive at a time


def linear_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, index: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Cross entropy of `head(hidden)` against `targets`, *summed* over the valid positions, as a float32 scalar.

    hidden: [.., D]; targets: [..] token ids or -100. Divide by the number of valid tokens of the whole optimizer step.
    With `index` (flat positions [N] that have a target, made on the CPU with the batch), `targets` is [N], the ids at
    those positions, and nothing waits for the GPU. No valid position at all gives a zero that backward accepts.
    """
    hidden_ND, targets_N = _select(hidden, head, targets, index)
    trained = _trained(head)
    if not torch.is_grad_enabled() or not (hidden_ND.requires_grad or trained):
        return _forward_only(hidden_ND, head, targets_N, chunk)
    return _LinearCrossEntropy.apply(hidden_ND, targets_N, head, chunk, *trained)


def linear_logprobs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, index: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """log p(target) per position: [N] float32 with `index`, else shaped as `targets`, zero where they are -100."""
    hidden_ND, targets_N = _select(hidden, head, targets, index)
    logprobs_N = _LinearLogprobs.apply(hidden_ND, targets_N, head, chunk, *_trained(head))
    if index is not None:
        return logprobs_N
    return logprobs_N.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, logprobs_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, targets_N, head, chunk, *parameters):
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True) if needed]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(p) for p in wanted]
        loss = torch.zeros((), dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
        for rows in _chunks(hidden_ND, head, chunk):
            with torch.enable_grad():
                h_CD = hidden_ND[rows].detach().requires_grad_()
                logits_CV = head(h_CD)
            loss += _cross_entropy_into_gradient_(logits_CV.detach(), targets_N[rows])
            # The storage of logits_CV now holds ∂loss/∂logits; the head's own backward does the rest.
            grad_h_CD, *chunk_grads = torch.autograd.grad(logits_CV, [h_CD, *wanted], logits_CV.detach())
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = grad_h_CD
            for grad, part in zip(grads, chunk_grads, strict=True):
                grad += part
        ctx.save_for_backward(grad_hidden_ND, *grads)  # not on ctx: autograd frees them after backward
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden_ND, *grads = ctx.saved_tensors
        scaled = iter(grad * grad_loss for grad in grads)
        grad_hidden_ND = None if grad_hidden_ND is None else grad_hidden_ND * grad_loss
        return grad_hidden_ND, None, None, None, *(next(scaled) if n else None for n in ctx.needs_input_grad[4:])


def _cross_entropy_into_gradient_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The chunk's summed loss; overwrites the logits by softmax − onehot, their gradient."""
    loss, at_target_C1 = _softmax_(logits_CV, targets_C[:, None])
    logits_CV.scatter_(1, targets_C[:, None], at_target_C1)
    return loss


@compiled
def _softmax_(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites logits by probabilities; the summed loss, and p − 1 of the targets before p is rounded."""
    wide_CV = logits_CV.to(_wide(logits_CV.dtype))
    largest_C1 = wide_CV.amax(-1, keepdim=True)
    exp_CV = (wide_CV - largest_C1).exp()
    sum_C1 = exp_CV.sum(-1, keepdim=True)  # the compiler finds both in one pass over the logits
    logprob_C1 = wide_CV.gather(1, targets_C1) - largest_C1 - sum_C1.log()
    logits_CV.copy_(exp_CV / sum_C1)
    return -logprob_C1.sum(), (logprob_C1.exp() - 1).to(logits_CV.dtype)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, targets_N, head, chunk, *parameters):
        ctx.save_for_backward(hidden_ND, targets_N)
        ctx.head, ctx.chunk, ctx.parameters = head, chunk, parameters
        ctx.random_state = _random_state(hidden_ND.device)  # dropout in the head must repeat itself in backward
        parts = [_logprobs(head(hidden_ND[rows]), targets_N[rows]) for rows in _chunks(hidden_ND, head, chunk)]
        return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=_wide(hidden_ND.dtype))

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, targets_N = ctx.saved_tensors
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True) if needed]
        grad_hidden_ND, grads = torch.zeros_like(hidden_ND), [torch.zeros_like(p) for p in wanted]
        now = _random_state(hidden_ND.device)
        _set_random_state(hidden_ND.device, ctx.random_state)
        for rows in _chunks(hidden_ND, ctx.head, ctx.chunk):
            with torch.enable_grad():
                h_CD = hidden_ND[rows].detach().requires_grad_()
                logprobs_C = _logprobs(ctx.head(h_CD), targets_N[rows])
            grad_h_CD, *chunk_grads = torch.autograd.grad(logprobs_C, [h_CD, *wanted], grad_N[rows])
            grad_hidden_ND[rows] = grad_h_CD
            for grad, part in zip(grads, chunk_grads, strict=True):
                grad += part
        _set_random_state(hidden_ND.device, now)
        scaled = iter(grads)
        return (
            grad_hidden_ND,
            None,
            None,
            None,
            *(next(scaled) if n else None for n in ctx.needs_input_grad[4:]),
        )


def _logprobs(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    wide_CV = logits_CV.to(_wide(logits_CV.dtype))
    return wide_CV.gather(1, targets_C[:, None]).squeeze(1) - wide_CV.logsumexp(-1)


def _forward_only(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, chunk: int | None) -> Tensor:
    loss = torch.zeros((), dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
    for rows in _chunks(hidden_ND, head, chunk):
        logits_CV = head(hidden_ND[rows])
        loss += F.cross_entropy(logits_CV.to(loss.dtype), targets_N[rows], reduction="sum")
    return loss


def _select(hidden: Tensor, head: nn.Module, targets: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Only the positions that have a target: hidden [N, D] and targets [N]."""
    if not isinstance(head, nn.Linear):  # with an adapter or quantised it is one, too
        raise ValueError(f"the head must be a linear layer (dense, adapted or quantised), got {type(head).__name__}")
    if index is None:
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden states {tuple(hidden.shape)}")
        index = (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
        targets = targets.reshape(-1)[index]
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), targets


def _trained(head: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def _chunks(hidden_ND: Tensor, head: nn.Module, chunk: int | None) -> list[slice]:
    N = hidden_ND.shape[0]
    chunk = chunk or max(1, CHUNK_BYTES // (hidden_ND.element_size() * head.out_features))
    return [slice(start, min(start + chunk, N)) for start in range(0, N, chunk)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
