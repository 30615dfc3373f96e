"""Activation checkpointing: what a block keeps for its backward, from everything to nothing on the card.

    none       all that autograd asks for, about 0.2 MB per token and block of an 8B Llama
    fast       the results of matrix products and attention, 0.1 MB; norms, rotations, silu are recomputed
    lean       the block's input, 8 KB; all of the block is recomputed (arXiv:1604.06174)
    offload    the same input, in host memory

Recomputing a block is a third more work (half more with LoRA, whose backward skips the frozen weights' gradients).
With `every` = k only each k-th block is `lean` or `offload`, the others are `fast`. With `budget`, as many of the last
blocks are `fast` as fit into that many bytes. With `host_budget`, as many of the first blocks as fit into so much host
memory also send there what attention read and returned, 36 KB per token: then only gate and up are recomputed.

The functions here put PyTorch's checkpoint around any block. Llama blocks with LoRA can run fused
(`modules/fused/lora_block.py`), which keeps and recomputes less.
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

MODES = ("none", "fast", "lean", "offload")
CHEAP_BELOW = 256  # inner dimension of a product


def checkpoint_activations(
    model: nn.Module,
    mode: str,
    *,
    every: int = 1,
    budget: float = 0,
    host_budget: float = 0,
    fused: bool = False,
    compile: bool = False,
    bind: Callable[[nn.Module], None] | None = None,
) -> ActivationOffload | None:
    """Make the model run its blocks so that each keeps what `mode` says; `fused`: by modules/fused/lora_block.py.

    `bind(block)` is called before a block's weights are read, in forward and in backward, for weights that are
    streamed. Returns where inputs wait, if they are offloaded. Raises ValueError: see `check_modes`.
    """
    streaming, bind = bind is not None, bind or (lambda block: None)
    check_modes(mode, every, budget, host_budget, fused=fused, streaming=streaming)
    offload = ActivationOffload(model.model.norm.weight.device) if mode == "offload" else None
    fused_blocks = FusedBlocks(model, offload) if fused else None
    if fused and not streaming:
        fused_blocks.put_weights_side_by_side()
    blocks = len(model.blocks)

    def mode_of(block: nn.Module, hidden: Tensor) -> str:
        if mode in ("none", "fast"):
            return mode
        size = hidden[..., 0].numel() * hidden.element_size()
        if block.index % every or block.index >= blocks - budget // (size * kept_per_token(model)):
            return "fast"
        return "attention" if block.index < host_budget // (size * kept_up_to_attention(model)) else mode

    def run_fused(block: nn.Module, hidden: Tensor, cos, sin, layout, cache=None) -> Tensor:
        if cache is not None:  # generation
            return run_block(block, hidden, cos, sin, layout, cache)
        keep = "fast" if mode == "none" else mode_of(block, hidden)
        return fused_blocks.run(block, hidden, cos, sin, layout, keep=keep, bind=bind)

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
        keep = mode_of(block, hidden) if trains and torch.is_grad_enabled() else "none"  # nothing comes back to it
        if keep == "none":
            return run_block(block, hidden, *inputs)
        if keep == "fast":
            return run_fast(block, hidden, *inputs)
        if keep == "lean":
            return run_lean(block, hidden, *inputs)

        def put(tensor: Tensor):
            return offload.put(tensor) if tensor.data_ptr() == hidden.data_ptr() else tensor

        def get(saved):
            return saved if isinstance(saved, Tensor) else offload.get(saved)

        # `checkpoint` saves the block's inputs as any autograd function does; the hooks send the large one away.
        with saved_tensors_hooks(put, get):
            return checkpoint(run_block, block, hidden, *inputs, use_reentrant=False)

    if compile:
        model.model.norm.compile()
    if compile and not fused:
        compile_blocks(model)
        run_fast = torch.compile(run_fast, options=ROUND_ALIKE)
        if not streaming:  # then the compiler sees that a block's last product need not be computed again
            run_lean = torch.compile(run_lean, options=ROUND_ALIKE)
    model.model.run_block = run_fused if fused else run_plain
    return offload


def check_modes(
    mode: str, every: int = 1, budget: float = 0, host_budget: float = 0, *, fused: bool, streaming: bool
) -> None:
    """Raise ValueError for settings of `checkpoint_activations` that do not exist or do not go together."""
    if mode not in MODES:
        raise ValueError(f"--activations {mode!r} is not one of {', '.join(MODES)}")
    if every < 1:
        raise ValueError(f"--activations-every {every} must be at least 1")
    if not (budget >= 0 and host_budget >= 0):
        raise ValueError("--activations-gib and --activations-host-gib must not be negative")
    if host_budget and (mode != "offload" or not fused):
        raise ValueError("--activations-host-gib needs --activations offload and fused blocks (--fused, --dropout 0)")
    if streaming and not fused and (mode in ("none", "fast") or every > 1 or budget):
        raise ValueError(NEEDS_RECOMPUTATION)  # autograd would keep weights that have left the card


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
    """Numbers that a Llama block keeps per token in the mode `fast`: x, x', q, k, v, attention's output, gate, up."""
    return kept_up_to_attention(model) + 2 * model.config.intermediate_size


def kept_up_to_attention(model: nn.Module) -> int:
    """Of these, all but gate and up."""
    config = model.config
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return 2 * config.hidden_size + heads * config.head_dim
