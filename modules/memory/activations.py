"""What a block keeps for its backward: the ladder from everything to nothing on the card.

    none       all that autograd asks for, about 0.2 MB per token and block of an 8B Llama
    fast       the results of matrix products and attention, 0.1 MB; norms, rotations, silu are computed again
    lean       the block's input, 8 KB; the whole block is computed again (arXiv:1604.06174)
    offload    the same input, waiting in host memory

Recomputing a block is a third more work (half as much again with LoRA, whose backward skips the frozen weights'
gradients). With `every` = k only each k-th block goes down to `lean` or `offload`, the others stay `fast`; with
`budget` as many of the last blocks stay `fast` as that many bytes can hold. With `host_budget` as many of the first
blocks as that many bytes of host memory can hold send what attention read and returned along with their input, 36 KB
per token in all: then only the feed-forward's first products are computed again.

Here are the plain ways, with PyTorch's checkpoint around any block. Llama blocks with LoRA can take the hand-written
one (`modules/fused/lora_block.py`), which keeps and recomputes less.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modules.compile import ROUND_ALIKE, compile_blocks
from modules.fused.blocks import FusedBlocks
from modules.memory.activation_offload import ActivationOffload
from modules.memory.weight_streaming import NEEDS_RECOMPUTATION

RUNGS = ("none", "fast", "lean", "offload")
CHEAP_BELOW = 256  # inner dimension of a product
NEEDS_HAND_WRITTEN = (
    "--activations-host-gib needs --activations offload and the hand-written blocks (--fused, --dropout 0)"
)


def keep_activations(
    model: nn.Module,
    rung: str,
    *,
    every: int = 1,
    budget: float = 0,
    host_budget: float = 0,
    fused: bool = False,
    compile: bool = False,
    bind: Callable[[nn.Module], None] | None = None,
) -> ActivationOffload | None:
    """Make the model run its blocks so that each keeps what `rung` says; `fused`: by the hand-written function.

    `bind(block)` is called before a block's weights are read, in forward and in backward, for weights that are
    streamed. Returns where inputs wait, if they are offloaded. Raises ValueError for settings that do not exist or do
    not go together.
    """
    if rung not in RUNGS:
        raise ValueError(f"--activations {rung!r} is not one of {', '.join(RUNGS)}")
    if every < 1:
        raise ValueError(f"--activations-every {every} must be at least 1")
    if budget < 0 or host_budget < 0:
        raise ValueError("--activations-gib and --activations-host-gib must not be negative")
    if host_budget and (rung != "offload" or not fused):
        raise ValueError(NEEDS_HAND_WRITTEN)
    if bind and not fused and (rung in ("none", "fast") or every > 1 or budget):
        raise ValueError(NEEDS_RECOMPUTATION)  # autograd would keep weights that have left the card
    streaming, bind = bind is not None, bind or (lambda block: None)
    offload = ActivationOffload(model.model.norm.weight.device) if rung == "offload" else None
    hand_written = FusedBlocks(model, offload) if fused else None
    if fused and not streaming:
        hand_written.put_weights_side_by_side()
    index = {id(block): i for i, block in enumerate(model.blocks)}

    def rung_of(block: nn.Module, hidden: Tensor) -> str:
        if rung in ("none", "fast"):
            return rung
        i, size = index[id(block)], hidden[..., 0].numel() * hidden.element_size()
        if i % every or i >= len(index) - budget // (size * kept_per_token(model)):
            return "fast"
        return "attention" if i < host_budget // (size * kept_up_to_attention(model)) else rung

    def run_hand_written(block: nn.Module, hidden: Tensor, cos, sin, layout, cache=None) -> Tensor:
        if cache is not None:  # generation
            return run_block(block, hidden, cos, sin, layout, cache)
        keep = "fast" if rung == "none" else rung_of(block, hidden)
        return hand_written.run(block, hidden, cos, sin, layout, keep=keep, bind=bind)

    def run_block(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        bind(block)
        return block(hidden, *inputs)

    def run_fast(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        policy = partial(create_selective_checkpoint_contexts, keep_products)
        return checkpoint(block, hidden, *inputs, use_reentrant=False, context_fn=policy)

    def run_lean(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        return checkpoint(run_block, block, hidden, *inputs, use_reentrant=False)

    def run_plain(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        trains = hidden.requires_grad or any(p.requires_grad for p in block.parameters())
        keep = rung_of(block, hidden) if trains and torch.is_grad_enabled() else "none"  # nothing comes back to it
        if keep == "none":
            return run_block(block, hidden, *inputs)
        if keep == "fast":
            return run_fast(block, hidden, *inputs)
        if keep == "lean":
            return run_lean(block, hidden, *inputs)
        with saved_tensors_hooks(partial(_put, offload, hidden), partial(_get, offload)):
            return checkpoint(run_block, block, hidden, *inputs, use_reentrant=False)

    if compile:
        model.model.norm.compile()
    if compile and not fused:
        compile_blocks(model)
        run_fast = torch.compile(run_fast, options=ROUND_ALIKE)
        if not streaming:  # then the compiler sees that a block's last product need not be computed again
            run_lean = torch.compile(run_lean, options=ROUND_ALIKE)
    model.model.run_block = run_hand_written if fused else run_plain
    return offload


def keep_products(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """The policy of `fast`. A product [.., k] × [k, ..] costs 2 k operations per number that it returns: where k is a
    LoRA's rank, or the operation no product at all, computing again is cheaper than keeping."""
    name = operation.name()
    if "attention" in name or "attn" in name:
        return CheckpointPolicy.MUST_SAVE
    if name in ("aten::mm", "aten::addmm") and args[name == "aten::addmm"].shape[-1] >= CHEAP_BELOW:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def kept_per_token(model: nn.Module) -> int:
    """Numbers that a Llama block keeps per token at the rung `fast`: x, x', q, k, v, attention's output, gate, up."""
    return kept_up_to_attention(model) + 2 * model.config.intermediate_size


def kept_up_to_attention(model: nn.Module) -> int:
    """Of these, all but gate and up."""
    config = model.config
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return 2 * config.hidden_size + heads * config.head_dim


# Checkpoint saves the block's inputs like any autograd function; hooks around it send the large one away.


def _put(offload: ActivationOffload, hidden: Tensor, tensor: Tensor):
    return offload.put(tensor) if tensor.data_ptr() == hidden.data_ptr() else tensor


def _get(offload: ActivationOffload, saved):
    return saved if isinstance(saved, Tensor) else offload.get(saved)
