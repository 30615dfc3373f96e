"""A Llama block with LoRA, forward and backward in one function that saves memory.

`models/llama.py` says what a block computes, block_by_formula.py how its gradients are formed. This file computes the
same with less memory and less traffic, because it knows what autograd does not: which of a block's values are cheap to
recompute. With n = norm(x), n' = norm(x'),

    q, k, v  = n W_qkvᵀ + LoRA, rotated        x' = x + attention(q, k, v) W_oᵀ + LoRA
    gate, up = n' W_guᵀ + LoRA                 y  = x' + (silu(gate) · up) W_dᵀ + LoRA

LoRA's own products of rank r are, in each line, a = s · x Aᵀ in forward and g = dy B in backward, with x what the line
reads and y what it makes (modules/fused/lora_products.py).

A frozen product needs nothing kept for its backward, dx = dy W. The rest needs, per token of an 8B Llama in bfloat16,
x 8 KB, x' 8, q k v 12, attention's output 8 and gate and up 57, together 94 KB; everything else (norms, silu · up, the
rank-r products) is one pass over memory away. What is kept is the caller's choice:

    fast       those 94 KB: no matrix product is computed a second time
    lean       x: everything up to gate and up is recomputed; the product with W_d is not, nobody needs its result
    offload    x, in host memory
    attention  x and the 28 KB up to x', in host memory: only gate and up are recomputed. No flag has this name: it
               is how `--activations offload --activations-host-gib G` runs the first blocks, as many as fit into G

The feed-forward runs over tiles of tokens, and attention over groups of heads, so that what is alive inside a block
grows with neither gate and up (57 KB per token) nor the float32 workspace of attention's backward (32 KB). What a group
of heads read and made is in tensors of its own, which go when it is done.

This covers blocks of `models/llama.py` whose seven linear layers are nn.Linear, quantised or LoRALinear over one of
them, frozen but for the adapters, with SiLU and without dropout; modules/fused/blocks.py checks that.

B batch, T tokens (B · T where flat), D model, N query heads, K key/value heads, H head dim, F feed-forward.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from modules import attention
from modules.attention import SequenceLayout
from modules.fused.lora_products import BlockLayers, GradientSum
from modules.fused.pointwise import (
    rms_norm,
    rms_norm_backward,
    split_and_rotate,
    split_and_rotate_backward,
    swiglu,
    swiglu_backward_,
)

TILE_BYTES = 768 * 2**20  # of gate, up and silu(gate) · up alive at a time
WORKSPACE_BYTES = 512 * 2**20  # of attention's backward: dq in float32, dk and dv for every query head


class Offload(Protocol):
    """Where tensors wait for backward in host memory: modules/memory/activation_offload.py."""

    def put(self, tensor: Tensor, held: Iterable[Tensor] = ()) -> Any: ...
    def get(self, item: Any) -> Tensor: ...


class BlockRun(NamedTuple):
    """How a block is run: what its forward and its backward both need to know."""

    layout: SequenceLayout
    layers: BlockLayers
    keep: str
    offload: Offload | None
    bind: Callable[[], None]  # called before weights are read: brings them to the card where they are streamed


class FusedBlock(torch.autograd.Function):
    """`apply(hidden, cos, sin, run, *adapters)`: hidden [B, T, D] → [B, T, D]; cos, sin [B·T, H], not trained."""

    @staticmethod
    def forward(ctx, hidden, cos, sin, run, *adapters):
        run.bind()
        x, trained = hidden.flatten(0, 1), any(ctx.needs_input_grad)
        block = BlockPass(run.layers, hidden.shape, cos, sin, run.layout)
        kept = block.first_half(x, sent_away=run.keep == "attention")
        if trained:
            offloaded = None
            if run.keep in ("offload", "attention"):  # on its way while the feed-forward is computed
                offloaded = run.offload.put(x, kept.large() if run.keep == "attention" else ())
            ctx.call = (cos, sin, run, hidden.shape)
            ctx.kept = kept if run.keep in ("fast", "attention") else None
            ctx.offloaded = offloaded
            ctx.save_for_backward(*([] if offloaded else [x]))
        out = torch.empty_like(x)
        for tile in block.tiles:
            gate_up, a = block.gate_and_up(kept.x_mid[tile])
            h = swiglu(*gate_up.chunk(2, dim=1))
            _, a_down = run.layers.down.forward(h, onto=kept.x_mid[tile], out=out[tile])
            if run.keep == "fast":
                kept.gate_up.append((gate_up, a, a_down))
            del gate_up, h
        return out.view(hidden.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin, run, shape = ctx.call
        layers = run.layers
        run.bind()
        x = run.offload.get(ctx.offloaded) if ctx.offloaded else ctx.saved_tensors[0]
        block = BlockPass(layers, shape, cos, sin, run.layout)
        # What was kept serves one backward and is freed on the way; another one (retain_graph) recomputes it.
        kept, ctx.kept = ctx.kept or block.first_half(x), None
        dy, x_mid, second_half = grad.flatten(0, 1), kept.x_mid, GradientSum(layers.gate_up, layers.down)
        for tile in block.tiles:
            gate_up = kept.gate_up.pop(0) if kept.gate_up else (*block.gate_and_up(x_mid[tile]), None)
            dx_tile, grads = block.feed_forward_backward(dy[tile], x_mid[tile], gate_up)
            second_half.add(grads)
            if len(block.tiles) > 1:
                x_mid[tile] = dx_tile  # in the place of x', which nobody needs any more
            del gate_up
        dx_mid = dx_tile if len(block.tiles) == 1 else x_mid
        del dx_tile, x_mid
        kept = kept._replace(x_mid=None, saved=[])
        dx, grads = block.attention_backward(dx_mid, x, kept, ctx.needs_input_grad[0])
        first_half = GradientSum(layers.qkv, layers.o)
        first_half.add(grads)
        return dx if dx is None else dx.view(shape), None, None, None, *first_half.sums, *second_half.sums


class ForBackward(NamedTuple):
    """What a block's backward needs besides x."""

    heads: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # q, k, v, output of each group, which autograd connects
    a_qkv: Tensor | None
    a_o: Tensor | None
    x_mid: Tensor | None
    gate_up: list[tuple]  # gate and up side by side, their a, down's a, of each tile; empty: to be recomputed
    saved: list[Tensor]  # what attention's graph holds on to

    def large(self) -> list[Tensor]:
        """What is worth sending away: x', q, k, v, output, and the copies of them that attention may have made."""
        copies = [t for t in self.saved if t.ndim >= 3 and t.dtype == self.x_mid.dtype]
        return [self.x_mid, *(t for group in self.heads for t in group), *copies]


class BlockPass:
    """One pass, forward or backward, over a block whose weights are on the card. Tokens are flat: x [B·T, D]."""

    def __init__(self, layers: BlockLayers, shape_BTD: Sequence[int], cos_TH: Tensor, sin_TH: Tensor, layout):
        B, T, _ = shape_BTD
        self.layers, self.layout, self.batch, self.tables = layers, layout, B, (cos_TH, sin_TH)
        self.groups = _groups(8 * B * T * layers.heads * layers.head_dim, layers.kv_heads)
        row = 3 * layers.gate_up.sizes[0] * cos_TH.element_size()
        tile = math.ceil(B * T / math.ceil(B * T * row / TILE_BYTES))
        self.tiles = [slice(start, min(start + tile, B * T)) for start in range(0, B * T, tile)]

    def first_half(self, x: Tensor, *, sent_away: bool = False) -> ForBackward:
        """x' = x + attention, with what its backward needs; `saved` is filled only if that will be `sent_away`."""
        layers = self.layers
        qkv, a_qkv = layers.qkv.forward(rms_norm(x, layers.norm.weight, layers.norm.eps))
        q, k, v = split_and_rotate(qkv, *self.tables, layers.heads, layers.kv_heads)
        del qkv
        groups = list(zip(*(self._split(t) for t in (q, k, v)), strict=True))
        del q, k, v
        heads, saved = [], []
        with torch.enable_grad():
            for parts in groups:
                leaves = [part.detach().requires_grad_() for part in parts]
                with saved_for_backward() if sent_away else nullcontext([]) as kept_by_graph:
                    heads.append((*leaves, attention.attend(*leaves, self.layout)))
                saved += kept_by_graph
        x_mid, a_o = layers.o.forward(*(_by_token(out.detach()).flatten(1) for _, _, _, out in heads), onto=x)
        return ForBackward(heads, a_qkv, a_o, x_mid, [], saved)

    def _split(self, heads_TNH: Tensor) -> list[Tensor]:
        """Each group's heads, [B, N, T, H]; of several groups in memory of their own."""
        parts = [part.contiguous() for part in heads_TNH.chunk(self.groups, dim=1)]
        return [part.view(self.batch, -1, *part.shape[1:]).transpose(1, 2) for part in parts]

    def attention_backward(
        self, dx_mid: Tensor, x: Tensor, kept: ForBackward, needs_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """∂x (of the first block nobody needs it), and the gradients of the adapters of q, k, v and o.

        Empties `kept.heads` on the way.
        """
        layers = self.layers
        g_o = layers.o.low_rank_backward(dx_mid)
        outs = [_by_token(out.detach()).flatten(1) for _, _, _, out in kept.heads]
        grads_o = layers.o.gradients(layers.o.B_gradients(dx_mid, kept.a_o), g_o, *outs)
        columns = [out.shape[1] for out in outs]
        del outs
        dq, dk, dv, end = [], [], [], 0
        for size in columns:
            start, end = end, end + size
            dout = layers.o.backward(dx_mid, g_o, slice(start, end) if len(columns) > 1 else None)
            *leaves, out = kept.heads.pop(0)
            grads = torch.autograd.grad(out, leaves, dout.view(self.batch, -1, *out.shape[1::2]).transpose(1, 2))
            for parts, grad in zip((dq, dk, dv), grads, strict=True):
                parts.append(_by_token(grad))
            del leaves, out, dout, grads, grad
        del parts
        dq = _together(dq)  # one after the other: each time the parts go
        dk = _together(dk)
        dv = _together(dv)
        dqkv = split_and_rotate_backward(dq, dk, dv, *self.tables)
        del dq, dk, dv
        g_qkv = layers.qkv.low_rank_backward(dqkv)
        dn = layers.qkv.backward(dqkv, g_qkv) if needs_dx else None
        dBs = layers.qkv.B_gradients(dqkv, kept.a_qkv)
        del dqkv
        if needs_dx:
            dx, n = rms_norm_backward(dn, x, layers.norm.weight, layers.norm.eps, dx_mid)
        else:
            dx, n = None, rms_norm(x, layers.norm.weight, layers.norm.eps)
        del dn
        return dx, layers.qkv.gradients(dBs, g_qkv, n) + grads_o

    def gate_and_up(self, x_mid: Tensor) -> tuple[Tensor, Tensor | None]:
        norm = self.layers.norm2
        gate_up, a = self.layers.gate_up.forward(rms_norm(x_mid, norm.weight, norm.eps))
        return gate_up, a

    def feed_forward_backward(self, dy: Tensor, x_mid: Tensor, kept: tuple) -> tuple[Tensor, list[Tensor]]:
        """∂x' of a tile, and the gradients of the adapters of gate, up and down; overwrites gate and up."""
        layers, norm = self.layers, self.layers.norm2
        gate_up, a, a_down = kept
        g_down = layers.down.low_rank_backward(dy)
        dh = layers.down.backward(dy, g_down)
        swiglu_backward_(*gate_up.chunk(2, dim=1), dh)
        dgate_up, h = gate_up, dh  # the same memory by its new names: the line above overwrote all three
        if a_down is None:
            a_down = layers.down.low_rank(h)
        grads_down = layers.down.gradients(layers.down.B_gradients(dy, a_down), g_down, h)
        del dh, h
        g = layers.gate_up.low_rank_backward(dgate_up)
        dn = layers.gate_up.backward(dgate_up, g)
        dx_mid, n = rms_norm_backward(dn, x_mid, norm.weight, norm.eps, dy)
        return dx_mid, layers.gate_up.gradients(layers.gate_up.B_gradients(dgate_up, a), g, n) + grads_down


def _by_token(heads_BNTH: Tensor) -> Tensor:
    """As the products read them: [B·T, N, H]."""
    return heads_BNTH.transpose(1, 2).flatten(0, 1)


def _together(groups_TNH: Sequence[Tensor]) -> Tensor:
    """Groups of heads side by side."""
    return torch.cat(groups_TNH, dim=1) if len(groups_TNH) > 1 else groups_TNH[0]


def _groups(workspace_bytes: int, kv_heads: int) -> int:
    """Into how many groups attention's heads are split: a divisor of the key/value heads."""
    wanted = min(math.ceil(workspace_bytes / WORKSPACE_BYTES), kv_heads)
    return next(groups for groups in range(wanted, kv_heads + 1) if kv_heads % groups == 0)


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Collects what autograd keeps of the operations inside."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # a graph that held its own output would hold itself, for ever
        return saved[-1]

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
