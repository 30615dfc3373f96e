"""`torch.compile`, block by block: the blocks are alike, so one compilation serves all of them and takes seconds."""

import torch
from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of the model in place; module names and state dict stay as they are."""
    # Every block adds entries to the same code object's cache; per-block differences must not exhaust the limit.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in model.blocks:
        block.compile()
