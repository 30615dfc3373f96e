"""What a run will need on its device, in bytes, before it starts: an estimate from shapes, good to about a tenth.

Weights, gradients and optimizer states follow from the parameters. Activations are counted per token: what every block
keeps at the chosen rung, and what the block that is being computed has alive besides.

D model, N query heads, K key/value heads, H head dim, F feed-forward.
"""

import torch
from torch import Tensor, nn

from modules.fused.lora_block import TILE_BYTES, WORKSPACE_BYTES
from modules.loss import CHUNK_BYTES
from modules.memory.activations import kept_per_token, kept_up_to_attention
from modules.memory.host_embedding import HostEmbedding

STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "adamw-host": 0}  # per trained parameter


def plan_memory(
    model: nn.Module,
    rung: str,
    *,
    tokens: int,
    dtype: torch.dtype,
    every: int = 1,
    budget: float = 0,
    host_budget: float = 0,
    fused: bool = False,
    optimizer: str = "adamw",
    step_in_backward: bool = False,
    streamed=None,
) -> dict[str, int]:
    """Bytes by purpose for training with micro-batches of `tokens` tokens computed in `dtype`.

    "host" is what waits in host memory for want of room, streamed weights apart. `streamed`: a StreamedWeights, whose
    parameters are not on the device but for the blocks that visit it.
    """
    config, size = model.config, dtype.itemsize
    D, F = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    away = set(streamed.names) if streamed else set()
    embedding = model.model.embed_tokens
    if issubclass(getattr(embedding, "base_class", type(embedding)), HostEmbedding):
        away.add("model.embed_tokens.weight")
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    gradients = [storage_bytes(p) for p in trained]
    plain = 6 * D + 2 * heads + 4 * F  # numbers per token that autograd keeps of a block
    whole = {"none": plain, "fast": kept_per_token(model)}
    kept = whole[rung] if rung in whole else (D if rung == "lean" else 0)
    if fused and rung == "none":
        kept = whole["fast"]
    blocks = len(model.blocks)
    entire = sum(i % every > 0 for i in range(blocks)) if rung not in whole else 0
    activations = tokens * size * (kept * (blocks - entire) + whole["fast"] * entire)
    alive = tokens * size * plain  # while a block is computed again
    if fused:
        tile = min(tokens * 4 * F * size, TILE_BYTES * 4 // 3)
        workspace = min(8 * tokens * config.num_attention_heads * config.head_dim, WORKSPACE_BYTES)
        # x, x', their gradients, and what attention reads with its gradients; feed-forward and attention take turns.
        alive = tokens * size * (4 * D + 2 * heads) + max(tile, workspace)
        alive += tokens * size * kept_up_to_attention(model) * bool(host_budget)  # of the next block, coming back
    inputs = tokens * size * D * (blocks - entire) if rung == "offload" else 0
    made = tokens * size * (kept_up_to_attention(model) - D) * (blocks - entire)  # by attention, all that there is
    on_card = 2**28 if optimizer == "adamw-host" and any(p.is_cuda for p in trained) else 0  # on their way
    moments = STATE_BYTES["adamw"] * sum(p.numel() for p in trained) if optimizer == "adamw-host" else 0
    quantised = any(hasattr(p, "__tensor_flatten__") for p in parameters.values())
    return {
        "weights": sum(storage_bytes(p) for name, p in parameters.items() if name not in away)
        + (streamed.card_bytes if streamed else 0),
        "gradients": max(gradients, default=0) if step_in_backward else sum(gradients),
        "optimizer": STATE_BYTES[optimizer] * sum(p.numel() for p in trained) + on_card,
        "activations": int(activations + budget * (rung not in whole)),
        "one block": alive + (D * F * size if quantised else 0),
        "loss": sum(storage_bytes(p) for p in model.lm_head.parameters() if p.requires_grad)  # its gradient, in forward
        + min(tokens * config.vocab_size * size, CHUNK_BYTES)
        + 3 * tokens * D * size,
        "host": inputs + int(min(host_budget, made)) + moments,
    }


def plan_vision(
    model: nn.Module,
    rung: str,
    plan: dict[str, int],
    *,
    images: int,
    dtype: torch.dtype,
    optimizer: str = "adamw",
    step_in_backward: bool = False,
) -> int:
    """Bytes that vision tower and projector add to the language model's plan, for micro-batches of `images` images.

    `rung`: what the tower's blocks keep, if anything in it is trained. What a block has alive besides is there before
    the language model's forward or after its backward, when this one's activations are not.
    """
    tower, config = model.vision_tower, model.vision_tower.config
    D, F, patches = config.hidden_size, config.intermediate_size, images * config.patches
    parameters = [*tower.parameters(), *model.projector.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    gradients = [storage_bytes(p) for p in trained]
    inner = (3 if config.hidden_act == "quick_gelu" else 2) * F  # x · sigmoid(x) is written out, and keeps one more
    plain = 8 * D + inner
    kept = {"none": plain, "fast": 7 * D + F, "lean": D, "offload": 0}[rung]
    if any(p.requires_grad for p in tower.parameters()):
        activations, alive = kept * len(tower.blocks), plain - kept + 7 * D
    else:
        activations, alive = 0, 3 * D + inner
    elsewhere = plan["activations"] + plan["one block"]
    return (
        sum(storage_bytes(p) for p in parameters)
        + (max(gradients, default=0) if step_in_backward else sum(gradients))
        + STATE_BYTES[optimizer] * sum(p.numel() for p in trained)
        + patches * dtype.itemsize * activations
        + max(0, patches * dtype.itemsize * alive - elsewhere)
    )


def describe_memory(plan: dict[str, int]) -> str:
    sizes = dict(plan)
    host = sizes.pop("host")
    total = sum(sizes.values()) - min(sizes["one block"], sizes["loss"])  # which are never alive together
    unit, scale, digits = ("GiB", 2**30, 2) if total >= 2**30 else ("MiB", 2**20, 1)  # a small model's are 0.00 GiB
    parts = ", ".join(f"{name} {size / scale:.{digits}f}" for name, size in sizes.items())
    waiting = f", and {host / scale:.{digits}f} {unit} of host memory" if host > scale / 200 else ""
    return f"memory: about {total / scale:.{digits}f} {unit} ({parts}){waiting}"


def storage_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of a tensor subclass (NF4, 8-bit states), its inner tensors'."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(storage_bytes(getattr(tensor, name)) for name in names)
