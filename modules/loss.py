"""Losses of a language model without its logits.

For Llama 3 the logits of 8,192 tokens are 4.2 GB in float32, and autograd would keep two or three such tensors. So the
positions go through the head in chunks, and a chunk's logits become a loss and a gradient before the next chunk.

All losses take the model and call `model.logits`, as generation does, or take a linear layer (dense, adapted,
quantised, with or without bias). Autograd finds the trained tensors that the logits depend on: an adapter of the head,
its bias, a learned temperature in `logits`.

N target positions, D model, V vocabulary, C chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.compile import compiled

IGNORE_INDEX = -100
CHUNK_BYTES = 256 * 2**20  # of logits alive at a time
IntoGradient = Callable[..., Tensor]  # (logits_CV, *per_position) → loss; see linear_loss


def linear_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, index: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Cross entropy of the logits against `targets`, *summed* over the valid positions, as a float32 scalar.

    hidden: [.., D]; head: the model or a linear layer; targets: [..] token ids or -100. Divide by the valid tokens of
    the whole optimizer step. With `index` (flat positions [N] that have a target, made on the CPU with the batch),
    `targets` is [N], the ids there, and nothing waits for the GPU. No valid position gives a zero with zero gradients.
    """
    hidden_ND, targets_N = _select(hidden, targets, index)
    return linear_loss(hidden_ND, head, _cross_entropy_into_gradient_, targets_N, chunk=chunk)


def linear_loss(
    hidden_ND: Tensor, head: nn.Module, into_gradient_: IntoGradient, *per_position: Tensor, chunk: int | None = None
) -> Tensor:
    """A loss that is a sum over positions, from their hidden states [N, D] and further tensors [N, ..].

    `into_gradient_(logits_CV, *per_position)`, with the chunk's part of each, returns the chunk's summed loss and
    overwrites the logits by its gradient (if `torch.is_grad_enabled()`). `by_autograd` makes one of a loss function.
    """
    chunk = chunk or _chunk_length(head, hidden_ND)
    if wrong := [tuple(t.shape) for t in per_position if t.shape[:1] != hidden_ND.shape[:1] or t.requires_grad]:
        raise ValueError(f"expected {len(hidden_ND)} entries without gradient, one per position; got shapes {wrong}")
    if len(hidden_ND) == 0:
        return _logits(head, hidden_ND).sum(dtype=_wide(hidden_ND))
    loss = torch.zeros((), dtype=_wide(hidden_ND), device=hidden_ND.device)
    gradients: dict[Tensor, Tensor] = {}  # of the hidden states and of every other tensor that the logits train
    for start in range(0, len(hidden_ND), chunk):
        rows = slice(start, start + chunk)
        h_CD = hidden_ND[rows].detach().requires_grad_(hidden_ND.requires_grad)
        chunk_loss, parts = _run_chunk(head, h_CD, into_gradient_, *(t[rows] for t in per_position))
        loss += chunk_loss
        for leaf, part in parts.items():
            tensor, place = (hidden_ND, rows) if leaf is h_CD else (leaf, ...)
            if tensor not in gradients:
                gradients[tensor] = torch.zeros_like(tensor)
            gradients[tensor][place] += part
    return _KnownGradients.apply(loss, list(gradients.values()), *gradients) if gradients else loss


def by_autograd(loss_fn: Callable[..., Tensor]) -> IntoGradient:
    """For `linear_loss`: differentiates `loss_fn(logits_CV, *per_position)`, which returns the chunk's *summed* loss.

        def focal(logits_CV, targets_C):
            logp_C = -F.cross_entropy(logits_CV, targets_C, reduction="none")
            return -((1 - logp_C.exp()) ** 2 * logp_C).sum()

        hidden_ND = hidden.flatten(0, 1).index_select(0, batch.target_index)
        loss = linear_loss(hidden_ND, model, by_autograd(focal), batch.targets) / tokens

    The logits are float32. Trained tensors of the function's own would get no gradient, and are refused.
    """

    def into_gradient_(logits_CV: Tensor, *per_position: Tensor) -> Tensor:
        wide_CV = logits_CV.to(_wide(logits_CV)).detach().requires_grad_()
        loss = loss_fn(wide_CV, *per_position)
        if any(leaf is not wide_CV for leaf in _trained_leaves(loss)):
            raise ValueError("the loss function uses a trained tensor; compute what it needs under torch.no_grad()")
        if torch.is_grad_enabled():
            logits_CV.copy_(*torch.autograd.grad(loss, wide_CV))
        return loss.detach()

    return into_gradient_


def linear_logprobs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, index: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """log p(target) per position: [N] float32 with `index`, else shaped as `targets`, zero where they are -100.

    Their gradient is not known in forward, so backward recomputes each chunk.
    """
    hidden_ND, targets_N = _select(hidden, targets, index)
    chunk = chunk or _chunk_length(head, hidden_ND)

    def logprobs(h_CD: Tensor, targets_C: Tensor) -> Tensor:
        logits_CV = _logits(head, h_CD)
        wide_CV = logits_CV.to(_wide(logits_CV))
        return wide_CV.gather(1, targets_C[:, None]).squeeze(1) - wide_CV.logsumexp(-1)

    chunks = zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    logprobs_N = torch.cat([checkpoint(logprobs, h_CD, targets_C, use_reentrant=False) for h_CD, targets_C in chunks])
    if index is not None:
        return logprobs_N
    return logprobs_N.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, logprobs_N)


def _run_chunk(head: nn.Module, h_CD: Tensor, into_gradient_: IntoGradient, *given: Tensor) -> tuple[Tensor, dict]:
    """The chunk's loss, and its gradient for every trained tensor that the logits depend on, `h_CD` among them."""
    logits_CV = _logits(head, h_CD)
    gradient_CV = logits_CV.detach()  # the same memory: first the logits, then their gradient
    if hasattr(logits_CV.grad_fn, "_saved_result") or logits_CV._is_view():  # tanh's backward reads what it returned
        gradient_CV = gradient_CV.clone()
    with torch.set_grad_enabled(logits_CV.requires_grad):
        loss = into_gradient_(gradient_CV, *given)
    leaves = _trained_leaves(logits_CV)
    parts = torch.autograd.grad(logits_CV, leaves, gradient_CV, materialize_grads=True) if leaves else ()
    return loss, dict(zip(leaves, parts, strict=True))


def _trained_leaves(tensor: Tensor) -> list[Tensor]:
    """The trained tensors that this one was computed from: where the graph of its backward ends."""
    nodes = [torch.autograd.graph.get_gradient_edge(tensor).node] if tensor.requires_grad else []
    seen = dict.fromkeys(nodes)
    while nodes:
        following = [node for node, _ in nodes.pop().next_functions if node is not None and node not in seen]
        seen |= dict.fromkeys(following)
        nodes += following
    return [node.variable for node in seen if hasattr(node, "variable")]


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients with respect to `inputs` are known: backward only scales them."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)  # not on ctx: autograd frees them after backward
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        return None, None, *(gradient * grad_loss for gradient in ctx.saved_tensors)


def _cross_entropy_into_gradient_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The chunk's summed loss; overwrites the logits by softmax − onehot, their gradient."""
    if not torch.is_grad_enabled():
        return F.cross_entropy(logits_CV.to(_wide(logits_CV)), targets_C, reduction="sum")
    loss, at_target_C1 = _softmax_(logits_CV, targets_C[:, None])
    logits_CV.scatter_(1, targets_C[:, None], at_target_C1)
    return loss


@compiled
def _softmax_(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites logits by probabilities; the summed loss, and p − 1 of the targets before p is rounded."""
    wide_CV = logits_CV.to(_wide(logits_CV))
    largest_C1 = wide_CV.amax(-1, keepdim=True)
    exp_CV = (wide_CV - largest_C1).exp()
    sum_C1 = exp_CV.sum(-1, keepdim=True)  # the compiler finds both in one pass over the logits
    logprob_C1 = wide_CV.gather(1, targets_C1) - largest_C1 - sum_C1.log()
    logits_CV.copy_(exp_CV / sum_C1)
    return -logprob_C1.sum(), (logprob_C1.exp() - 1).to(logits_CV.dtype)


def _logits(head: nn.Module, hidden_CD: Tensor) -> Tensor:
    logits_CV = head(hidden_CD) if isinstance(head, nn.Linear) else head.logits(hidden_CD)
    if logits_CV.ndim != 2 or len(logits_CV) != len(hidden_CD):
        raise ValueError(f"logits {tuple(logits_CV.shape)} do not fit hidden states {tuple(hidden_CD.shape)}")
    return logits_CV


def _chunk_length(head: nn.Module, hidden_ND: Tensor) -> int:
    layer = head if isinstance(head, nn.Linear) else getattr(head, "head", None)  # adapted or quantised it is one, too
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"expected a linear layer, or a model whose `head` is one; got {type(head).__name__}")
    return max(1, CHUNK_BYTES // (hidden_ND.element_size() * layer.out_features))


def _select(hidden: Tensor, targets: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Only the positions that have a target, before anything is projected: hidden [N, D] and targets [N]."""
    if index is None:
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden states {tuple(hidden.shape)}")
        index = (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
        targets = targets.reshape(-1)[index]
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), targets


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
