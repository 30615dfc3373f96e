"""Activation checkpointing (arXiv:1604.06174): keep each block's input, compute the block again in backward.

A block of an 8B Llama keeps about 0.2 MB per token for its backward (counted in modules/memory.py); its input is 8 KB.
Recomputing costs one more forward pass, a third more work (half as much again with LoRA, whose backward skips the
frozen weights' gradients), and lets the same card train sequences many times longer.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module, every: int = 1) -> None:
    """Make the model recompute every `every`-th block in backward instead of keeping its activations."""
    if every < 1:
        raise ValueError(f"--activations-every {every} must be at least 1")
    chosen = {id(block) for i, block in enumerate(model.blocks) if i % every == 0}

    def run_block(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        if id(block) not in chosen or not model.training:
            return block(hidden, *inputs)
        return checkpoint(block, hidden, *inputs, use_reentrant=False)

    model.model.run_block = run_block
