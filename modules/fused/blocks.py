"""When a model's blocks run fused, and when as plain modules.

modules/fused/lora_block.py is faster and needs less memory than the modules it stands for, but it computes one kind of
block. The modules are there to be edited, and no edit may be lost: the fused block runs only where it computes what
they say. `choose_blocks` asks twice.

    what they are     `why_plain`: the source of all that a block's forward reaches, the attributes of every module in
                      it, hooks, what is trained (modules/fused/known.py has what lora_block.py was written for)
    what they do      `disagreement`: every block's output and gradients on the first batch, fused against plain
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.lora import LoRALinear
from modules.attention import SequenceLayout, packed_layout, padded_layout
from modules.compile import expect_few_kernels
from modules.fused.known import unknown_part
from modules.fused.lora_block import BlockRun, FusedBlock, Offload
from modules.fused.lora_products import AdapterCopies, BlockLayers, put_side_by_side

COMPARED_TOKENS = 1024  # at most, of the first batch: plain blocks keep 0.2 MB per token of an 8B Llama


def choose_blocks(model: nn.Module, batch=None, bind: Callable[[nn.Module], None] | None = None) -> str | None:
    """None if the model's blocks can run fused; else the reason, in words.

    `batch`: the first of the run, on the model's device (data.batches.Batch); without one the blocks are compared on
    tokens of no meaning. `bind(block)` is called before a block's weights are read.
    """
    if reason := why_plain(model):
        return reason
    expect_few_kernels()
    return disagreement(model, batch, bind)


def why_plain(model: nn.Module) -> str | None:
    """What the model's blocks are or have that modules/fused/lora_block.py does not compute; None if it is nothing."""
    for block in model.blocks:
        if reason := unknown_part(block):
            return f"block {block.index}: {reason}" if hasattr(block, "index") else reason
        if block.mlp.activation is not F.silu:
            return "the feed-forward has another activation than SiLU"
        for layer in block.modules():
            if isinstance(layer, LoRALinear) and layer.dropout.p:
                return "--dropout is not 0"
        trained = [name for name, p in block.named_parameters() if p.requires_grad]
        if not trained:
            return "not every block has an adapter"
        if other := [name for name in trained if ".lora_" not in name]:
            return f"{other[0]} is trained, which is no adapter"
    return None


def disagreement(model: nn.Module, batch=None, bind: Callable[[nn.Module], None] | None = None) -> str | None:
    """Run every block both ways, forward and backward, on what the model itself hands it; says where they differ.

    The plain output goes on to the next block. Leaves no gradients behind.
    """
    bind = bind or (lambda block: None)
    device, dtype = model.model.norm.weight.device, model.model.norm.weight.dtype
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    fused, generator, found = FusedBlocks(model), torch.Generator(), []

    compared = set()

    def run_both(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        compared.add(block)
        x = hidden.detach().requires_grad_()
        adapters = {name: p for name, p in block.named_parameters() if p.requires_grad}
        bind(block)
        results = []
        for run in (block, lambda *args: fused.run(block, *args[:4], keep="lean", bind=bind)):
            y = run(x, *inputs)
            dy = torch.randn(y.shape, generator=generator.manual_seed(1)).to(y)
            grads = torch.autograd.grad(y, [x, *adapters.values()], dy, materialize_grads=True)
            results.append([y.detach(), *grads])
        names = ["output", "∂input", *(f"∂{name}" for name in adapters)]
        for name, plain, other in zip(names, *results, strict=True):
            if not (other - plain).norm() <= tolerance * plain.norm():
                found.append(f"block {block.index}: modules/fused/lora_block.py gives another {name}")
        return results[0][0]

    ids, layout = _first_tokens(model, batch)
    layout = layout.prepare(device, dtype)
    run_block, model.model.run_block = model.model.run_block, run_both
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model(ids.to(device), layout)
    finally:
        model.model.run_block = run_block
    if not found and compared != set(model.blocks):
        return "the model does not run each of its blocks once, by `run_block`"
    return found[0] if found else None


def _first_tokens(model: nn.Module, batch) -> tuple[Tensor, SequenceLayout]:
    """The first `COMPARED_TOKENS` tokens of a batch: as many whole rows, or the beginning of the first one."""
    if batch is None:
        length = min(COMPARED_TOKENS, model.config.max_length)
        return torch.arange(length)[None] % model.config.vocab_size, padded_layout(length)
    layout, T = batch.layout, batch.input_ids.shape[1]
    rows, length = max(1, COMPARED_TOKENS // T), min(T, COMPARED_TOKENS)
    if layout.segments is None:
        first = padded_layout(length)
    else:
        segments = layout.segments[:rows, :length].cpu()
        first = packed_layout([row.unique_consecutive(return_counts=True)[1].tolist() for row in segments], length)
    return batch.input_ids[:rows, :length], first.with_window(layout.window)


class FusedBlocks:
    """Runs a model's blocks, and those of its deep copies, fused. One block is `run`.

    `offload`: where what is to wait in host memory goes.
    """

    def __init__(self, model: nn.Module, offload: Offload | None = None):
        self.offload = offload
        self.layers: WeakKeyDictionary[nn.Module, BlockLayers] = WeakKeyDictionary()
        for block in model.blocks:
            self.layers[block] = BlockLayers(block)
        self.tables: tuple[Tensor, Tensor, list[Tensor]] | None = None

    def put_weights_side_by_side(self) -> None:
        """One product for q, k and v, and one for gate and up, where these are dense; not for weights that travel."""
        put_side_by_side([group for layers in self.layers.values() for group in layers.groups])

    def run(
        self,
        block: nn.Module,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: SequenceLayout,
        *,
        keep: str,
        bind: Callable[[nn.Module], None],
    ) -> Tensor:
        """`block(hidden, cos, sin, layout)`, [B, T, D] → [B, T, D].

        keep: "fast", "lean", "offload" or "attention". `bind(block)` is called before the block's weights are read, in
        forward and in backward: weights that are streamed are brought to the card there.
        """
        layers = self.layers.get(block)
        if layers is None:  # a block of a deep copy
            layers = self.layers[block] = BlockLayers(block)
        if not layers.are_in_place():  # adapters are off or merged (modules/adapters/switch.py), or others
            bind(block)
            return block(hidden, cos, sin, layout)
        if layers.copies is None:
            layers.copies = AdapterCopies(layers.groups, hidden.dtype)
        layers.copies.refresh()  # the optimizer may have stepped since the last forward
        run = BlockRun(layout, layers, keep, self.offload, lambda: bind(block))
        return FusedBlock.apply(hidden, *self._tables(cos, sin, hidden), run, *layers.parameters)

    def _tables(self, cos: Tensor, sin: Tensor, hidden: Tensor) -> list[Tensor]:
        """cos and sin for every row of the batch, [B·T, H]; made once for all blocks."""
        tables, (B, T, _) = self.tables, hidden.shape
        if tables is None or tables[0] is not cos or tables[1] is not sin or len(tables[2][0]) != B * T:
            flat = [table.expand(B, T, -1).reshape(B * T, -1) for table in (cos, sin)]
            self.tables = tables = cos, sin, flat
        return tables[2]
