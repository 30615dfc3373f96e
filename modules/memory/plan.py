"""What a run will need on its device, in bytes, before it starts: an estimate from shapes, good to about a tenth.

Weights, gradients and optimizer states follow from the parameters. Activations are counted per token: what every block
keeps in the chosen mode, and what else is alive in the block that is being computed.

D model, N query heads, K key/value heads, H head dim, F feed-forward.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.compile import runs_as_written
from modules.fused.lora_block import TILE_BYTES, WORKSPACE_BYTES
from modules.loss import CHUNK_BYTES
from modules.memory.activations import kept_per_token, kept_up_to_attention
from modules.memory.host_embedding import HostEmbedding
from modules.memory.weight_streaming import inner_tensors

STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "adamw-host": 0}  # per trained parameter
FIRST_USE_BYTES = 48 * 2**20  # what PyTorch's CPU libraries take when they first compute: 30 to 60 MiB, measured


def plan_memory(
    model: nn.Module,
    mode: str,
    *,
    tokens: int,
    dtype: torch.dtype,
    targets: int | None = None,
    grad_accum: int = 1,
    every: int = 1,
    budget: float = 0,
    host_budget: float = 0,
    fused: bool = False,
    optimizer: str = "adamw",
    step_in_backward: bool = False,
    streamed=None,
) -> dict[str, int]:
    """Bytes by purpose for training with micro-batches of `tokens` tokens, `targets` of them trained, in `dtype`.

    "host" is what waits in host memory, without streamed weights. "not at once": parts of the other sums that do not
    coincide, see `total_bytes`. For a model on the CPU, "process" is what Python, its libraries and the data take: it
    is measured, so the weights must be loaded. `streamed`: a StreamedWeights, of which two blocks are on the device.
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
    fast = kept_per_token(model)
    kept = {"none": fast if fused else plain, "fast": fast, "lean": D, "offload": 0}[mode]
    reduced = mode in ("lean", "offload")
    blocks = len(model.blocks)
    fast_blocks = sum(i % every > 0 for i in range(blocks)) if reduced else 0
    other_blocks = blocks - fast_blocks
    activations = tokens * size * (kept * other_blocks + fast * fast_blocks)
    alive = tokens * size * plain  # while a block is recomputed
    if fused:
        tile = min(tokens * 4 * F * size, TILE_BYTES * 4 // 3)
        workspace = min(8 * tokens * config.num_attention_heads * config.head_dim, WORKSPACE_BYTES)
        # x, x', their gradients, and what attention reads with its gradients; feed-forward and attention take turns.
        alive = tokens * size * (4 * D + 2 * heads) + max(tile, workspace)
        alive += tokens * size * kept_up_to_attention(model) * bool(host_budget)  # of the next block, coming back
    inputs = tokens * size * D * other_blocks if mode == "offload" else 0
    made = tokens * size * (kept_up_to_attention(model) - D) * other_blocks  # by attention, all that there is
    on_card = 2**28 if optimizer == "adamw-host" and any(p.is_cuda for p in trained) else 0  # on their way
    moments = STATE_BYTES["adamw"] * sum(p.numel() for p in trained) if optimizer == "adamw-host" else 0
    quantised = any(hasattr(p, "__tensor_flatten__") for p in parameters.values())
    targets = tokens if targets is None else targets
    head = sum(storage_bytes(p) for p in model.head.parameters() if p.requires_grad)  # its gradient, in forward
    chunk = min(targets * model.head.out_features * size, CHUNK_BYTES)
    # Uncompiled, the loss holds two float32 copies of a chunk's logits, of half-precision ones a third.
    device = model.model.norm.weight.device
    copies = (2 if size == 4 else 3) * chunk * 4 // size if runs_as_written(device) else 0
    weights = sum(storage_bytes(p) for name, p in parameters.items() if name not in away)
    plan = {
        "weights": weights + (streamed.card_bytes if streamed else 0),
        "gradients": max(gradients, default=0) if step_in_backward else sum(gradients),
        "optimizer": STATE_BYTES[optimizer] * sum(p.numel() for p in trained) + on_card,
        "activations": int(activations + budget * reduced),
        "one block": alive + (D * F * size if quantised else 0),
        "loss": chunk + max(copies, head) + head + (tokens + 2 * targets) * D * size,
        "host": inputs + int(min(host_budget, made)) + moments,
    }
    if device.type == "cpu":
        plan["process"] = max(0, resident_bytes() - weights) + FIRST_USE_BYTES
    # The loss is over when the backward of the blocks begins. Gradients come as activations go; with gradient
    # accumulation they are there from the second micro-batch on. A tied head's gradient is added to the embedding's.
    at_once = plan["activations"] + max(plan["one block"], plan["loss"])
    if grad_accum == 1:
        at_once = max(at_once, plan["gradients"] + max(plan["one block"], 2 * head))
    else:
        at_once += plan["gradients"]
    parts = ("gradients", "activations", "one block", "loss")
    plan["not at once"] = sum(plan[part] for part in parts) - at_once
    return plan


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell (only Linux does)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def plan_vision(
    model: nn.Module,
    mode: str,
    plan: dict[str, int],
    *,
    images: int,
    dtype: torch.dtype,
    optimizer: str = "adamw",
    step_in_backward: bool = False,
) -> int:
    """Bytes that vision tower and projector add to the language model's plan, for micro-batches of `images` images.

    `mode`: what the tower's blocks keep, if anything in it is trained. What else is alive in them does not coincide
    with the language model's activations.
    """
    tower, config = model.vision_tower, model.vision_tower.config
    D, F, patches = config.hidden_size, config.intermediate_size, images * config.patches
    parameters = [*tower.parameters(), *model.projector.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    gradients = [storage_bytes(p) for p in trained]
    inner = (3 if config.hidden_act == "quick_gelu" else 2) * F  # x · sigmoid(x) is written out, and keeps one more
    plain = 8 * D + inner
    kept = {"none": plain, "fast": 7 * D + F, "lean": D, "offload": 0}[mode]
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


def total_bytes(plan: dict[str, int]) -> int:
    """What the device holds at the peak."""
    return sum(plan.values()) - plan["host"] - 2 * plan["not at once"]


def describe_memory(plan: dict[str, int]) -> str:
    total, host = total_bytes(plan), plan["host"]
    sizes = {name: size for name, size in plan.items() if name not in ("host", "not at once")}
    unit, scale, digits = ("GiB", 2**30, 2) if total >= 2**30 else ("MiB", 2**20, 1)  # a small model's are 0.00 GiB
    parts = ", ".join(f"{name} {size / scale:.{digits}f}" for name, size in sizes.items())
    waiting = f", and {host / scale:.{digits}f} {unit} of host memory" if host > scale / 200 else ""
    return f"memory: about {total / scale:.{digits}f} {unit} ({parts}){waiting}"


def storage_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of a tensor subclass (NF4, 8-bit states), its inner tensors'."""
    return sum(inner.nbytes for inner in inner_tensors(tensor).values())
