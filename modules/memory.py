"""What a run will need, in bytes, before it starts: an estimate from shapes, good to about a fifth.

Weights, gradients and optimizer states follow from the parameters. Activations are counted per token: a block that is
kept whole holds about 6 D + 2 (N + 2 K) H + 4 F numbers, a checkpointed one its input, D numbers.

D model, N query heads, K key/value heads, H head dim, F feed-forward.
"""

import torch
from torch import Tensor, nn

from modules.loss import CHUNK_BYTES


def plan_memory(model: nn.Module, *, tokens: int, dtype: torch.dtype, checkpointed: bool) -> dict[str, int]:
    """Bytes by purpose for training with micro-batches of `tokens` tokens computed in `dtype`."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    block = 6 * config.hidden_size + 2 * heads * config.head_dim + 4 * config.intermediate_size
    kept = len(model.blocks) * (config.hidden_size if checkpointed else block)
    return {
        "weights": sum(storage_bytes(p) for p in parameters),
        "gradients": sum(storage_bytes(p) for p in trained),
        "optimizer": sum(8 * p.numel() for p in trained),
        "activations": tokens * (kept + (block if checkpointed else 0)) * dtype.itemsize,
        "loss": min(tokens * config.vocab_size * 4, CHUNK_BYTES) * 2,
    }


def describe_memory(plan: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.items())
    return f"memory: about {sum(plan.values()) / 2**30:.2f} GiB ({parts})"


def storage_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of a tensor subclass (NF4, 8-bit states), its inner tensors'."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(storage_bytes(getattr(tensor, name)) for name in names)
