"""When a model's blocks run by hand, and when as plain modules.

lora_block.py is faster and needs less memory than the modules it stands for, but it covers one kind of block.
`why_not` says what a model has beyond that; `disagreement` computes a block both ways, for changes that nobody
announced; `FusedBlocks` runs the blocks, and leaves one whose layers were exchanged since to its modules.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.llama import LlamaBlock
from modules.adapters.lora import LoRALinear
from modules.adapters.parts import FrozenLinear
from modules.attention import Attention, SequenceLayout, padded_layout
from modules.fused.lora_block import BlockLayers, FusedBlock, How
from modules.fused.lora_products import AdapterCopies, put_side_by_side
from modules.memory.activation_offload import ActivationOffload


def why_not(model: nn.Module) -> str | None:
    """What the model's blocks have that modules/fused/lora_block.py does not cover; None if it covers them."""
    for block in model.blocks:
        if type(block) is not LlamaBlock:
            return f"its blocks are {type(block).__name__}, not LlamaBlock"
        if type(block.self_attn) is not Attention:
            return f"self_attn is a {type(block.self_attn).__name__}"
        if block.mlp.activation is not F.silu:
            return "its feed-forward has another activation than SiLU"
        for name, layer in block.named_modules():
            own_forward = isinstance(layer, LoRALinear) and type(layer).forward is not LoRALinear.forward
            if own_forward or isinstance(layer, FrozenLinear):
                return f"{name} is a {type(layer).__name__}"
            if isinstance(layer, LoRALinear) and layer.dropout.p:
                return "--dropout is not 0"
            if getattr(layer, "bias", None) is not None:
                return f"{name} has a bias"
        trained = [name for name, p in block.named_parameters() if p.requires_grad]
        if not trained:
            return "not every block has an adapter"
        if other := [name for name in trained if ".lora_" not in name]:
            return f"{other[0]} is trained, and no adapter"
    return None


def disagreement(model: nn.Module, bind: Callable[[nn.Module], None] | None = None) -> str | None:
    """Run the first block both ways on a few random tokens; says how the results differ, None if they do not.

    The plain modules are there to be changed, and a change that lora_block.py does not know must not be lost silently.
    """
    block, norm = model.blocks[0], model.model.norm.weight
    layout = padded_layout(32).prepare(norm.device, norm.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, model.config.hidden_size, generator=generator).to(norm.device, norm.dtype).requires_grad_()
    inputs = (*model.model.rotary(layout.positions, layout.longest, norm.dtype), layout)
    adapters = [p for p in block.parameters() if p.requires_grad]
    bind = bind or (lambda block: None)
    bind(block)
    results = []
    for y in (block(x, *inputs), FusedBlocks(model).run(block, x, *inputs, keep="lean", bind=bind)):
        dy = torch.randn(y.shape, generator=generator.manual_seed(1)).to(y)
        results.append([y, *torch.autograd.grad(y, [x, *adapters], dy, materialize_grads=True)])
    names = ["output", "∂input", *(f"∂{name}" for name, p in block.named_parameters() if p.requires_grad)]
    tolerance = 1e-3 if norm.dtype == torch.float32 else 0.05
    for name, plain, fused in zip(names, *results, strict=True):
        if not (fused - plain).norm() <= tolerance * plain.norm():
            return f"modules/fused/lora_block.py gives another {name} than models/llama.py"
    return None


class FusedBlocks:
    """A model's blocks, run by hand. One block, or a forward through all of them in order, is `run`.

    `offload`: where what is to wait in host memory goes.
    """

    def __init__(self, model: nn.Module, offload: ActivationOffload | None = None):
        self.offload = offload
        self.blocks = {id(block): BlockLayers(block) for block in model.blocks}
        self.tables: tuple[Tensor, Sequence[Tensor]] | None = None

    def put_weights_side_by_side(self) -> None:
        """One product for q, k and v, and one for gate and up, where these are dense; not for weights that travel."""
        put_side_by_side([group for layers in self.blocks.values() for group in layers.groups])

    def run(
        self,
        block: LlamaBlock,
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
        layers = self.blocks[id(block)]
        if not layers.are_in_place():  # adapters are off, or merged: modules/adapters/switch.py
            bind(block)
            return block(hidden, cos, sin, layout)
        if layers.copies is None:
            layers.copies = AdapterCopies(layers.groups, hidden.dtype)
        layers.copies.refresh()  # the optimizer may have stepped since the last forward
        how = How(layout, layers, keep, self.offload, lambda: bind(block))
        return FusedBlock.apply(hidden, *self._tables(cos, sin, hidden), how, *layers.parameters)

    def _tables(self, cos: Tensor, sin: Tensor, hidden: Tensor) -> Sequence[Tensor]:
        """cos and sin for every row of the batch, [B·T, H]; made once for all blocks."""
        if self.tables is None or self.tables[0] is not cos:
            B, T, _ = hidden.shape
            self.tables = cos, [table.expand(B, T, -1).reshape(B * T, -1) for table in (cos, sin)]
        return self.tables[1]
