"""The matrix products of linear layers with LoRA, forward and backward, written out.

For layers that read the same input x (q, k and v; gate and up), whose outputs stand side by side in y [T, O], with the
scaling s = α/r taken into A:

    forward     a  = s · x Aᵀ          all adapters' A stacked: x is read once, and a [T, R] is tiny
                yᵢ = aᵢ Bᵢᵀ + biasᵢ    each layer's columns
                y += x Wᵀ              the big product adds onto the small ones: no third pass over y
    backward    gᵢ = dyᵢ Bᵢ            [T, rᵢ], side by side in g [T, R]
                dx = s · g A + dy W
                dA = s · gᵀ x,   dBᵢ = dyᵢᵀ aᵢ

In this order the adapters cost 4 T r (in + out) operations each; by way of dW = dyᵀ x it would be some hundred times
as much. W is frozen, so x is not needed to get dx. `B_gradients` asks for a, and after it dy is needed no more;
`gradients` asks for x.

Dense weights that lie one behind the other in memory are one W, and one product; `put_side_by_side` moves them there.
Quantised ones are taken one at a time: dequantised, and dropped after their product.

T tokens, D input features, O output features and R ranks of all layers together.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modules.adapters.lora import LoRALinear


class Projections:
    """Linear layers, with LoRA or frozen, that read the same input.

    `AdapterCopies` fills in the adapters as the products use them: s · A of all layers [R, D], and each layer's B.
    """

    def __init__(self, *layers: nn.Linear):
        self.layers = layers
        self.adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
        self.sizes = [layer.out_features for layer in layers]
        self.ranks = [layer.rank if layer in self.adapted else 0 for layer in layers]
        self.parameters = [p for layer in self.adapted for p in (layer.lora_A.weight, layer.lora_B.weight)]
        kinds = [layer.base_class if layer in self.adapted else type(layer) for layer in layers]
        self.dequantize = [getattr(kind, "dense_weight", None) for kind in kinds]
        self.no_biases = [None] * len(layers)
        self.biased = any(layer.bias is not None for layer in layers)
        self.whole: Tensor | None = None  # dense weights side by side, as one
        self.rows: list[int] = []  # and the address of each in it

    @property
    def scalings(self) -> list[float]:
        return [layer.scaling for layer in self.adapted]  # asked each time: someone may change `alpha` on the way

    def forward(
        self, *x_TD: Tensor, onto: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y [T, O], and a. A single layer can add its output to `onto`, and write the sum to `out`.

        x: whole, or in several tensors of some of its columns each; here, and where else it says `*x_TD`.
        """
        a_TR = self.low_rank(*x_TD)
        y_TO = x_TD[0].new_empty(len(x_TD[0]), sum(self.sizes)) if out is None else out
        biases = [layer.bias for layer in self.layers] if self.biased else self.no_biases
        if onto is None:
            for y, a, B, bias in self._adapters(y_TO, a_TR, biases):
                torch.mm(a, B.t(), out=y) if bias is None else torch.addmm(bias, a, B.t(), out=y)
        elif self.adapted:
            torch.addmm(onto, a_TR, self.Bs[0].t(), out=y_TO)
        for columns, begun, W in self._frozen():
            y = y_TO if columns is None else y_TO[:, columns]
            for x, W_x in zip(x_TD, _beside(W, x_TD), strict=True):
                if begun:
                    y.addmm_(x, W_x.t())
                elif onto is None:
                    torch.mm(x, W_x.t(), out=y)
                else:
                    torch.addmm(onto, x, W_x.t(), out=y)
                begun = True
            del W, W_x
        if self.biased:  # of layers whose first product could not begin with it
            for y, bias, rank in zip(y_TO.split_with_sizes(self.sizes, dim=1), biases, self.ranks, strict=True):
                if bias is not None and not (rank and onto is None):
                    y.add_(bias)
        return y_TO, a_TR

    def low_rank(self, *x_TD: Tensor) -> Tensor | None:
        """a = s · x Aᵀ, [T, R]."""
        if not self.adapted:
            return None
        first, *others = zip(x_TD, _beside(self.A_RD, x_TD), strict=True)
        a_TR = first[0] @ first[1].t()
        for x, A in others:
            a_TR.addmm_(x, A.t())
        return a_TR

    def low_rank_backward(self, dy_TO: Tensor) -> Tensor | None:
        """g = dy B, [T, R]."""
        if not self.adapted:
            return None
        g_TR = dy_TO.new_empty(len(dy_TO), sum(self.ranks))
        for dy, g, B, _ in self._adapters(dy_TO, g_TR):
            torch.mm(dy, B, out=g)
        return g_TR

    def backward(self, dy_TO: Tensor, g_TR: Tensor | None, only: slice | None = None) -> Tensor:
        """dx, or `only` these columns of it."""
        dx = None if g_TR is None else g_TR @ (self.A_RD if only is None else self.A_RD[:, only])
        for columns, _, W in self._frozen():
            dy = dy_TO if columns is None else dy_TO[:, columns]
            W = W if only is None else W[:, only]
            dx = dy @ W if dx is None else dx.addmm_(dy, W)
            del W
        return dx

    def B_gradients(self, dy_TO: Tensor, a_TR: Tensor | None) -> list[Tensor]:
        """dB of one adapter after the other, in the dtype of the products. After this dy is needed no more."""
        return [dy.t() @ a for dy, a, _, _ in self._adapters(dy_TO, a_TR)]

    def gradients(self, dBs: list[Tensor], g_TR: Tensor | None, *x_TD: Tensor) -> list[Tensor]:
        """[dA / s, dB] of one adapter after the other, for a `GradientSum`."""
        if not self.adapted:
            return []
        dA_RD = torch.cat([g_TR.t() @ x for x in x_TD], dim=1) if len(x_TD) > 1 else g_TR.t() @ x_TD[0]
        dAs = dA_RD.split_with_sizes([rank for rank in self.ranks if rank]) if len(dBs) > 1 else [dA_RD]
        return [grad for pair in zip(dAs, dBs, strict=True) for grad in pair]

    def _adapters(
        self, y_TO: Tensor, a_TR: Tensor | None, biases: Sequence[Tensor | None] | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Each adapted layer's columns of y and of a, its B and its bias."""
        if not self.adapted:
            return []
        biases = biases or self.no_biases
        if len(self.layers) == 1:
            return [(y_TO, a_TR, self.Bs[0], biases[0])]
        ys, low = y_TO.split_with_sizes(self.sizes, dim=1), a_TR.split_with_sizes(self.ranks, dim=1)
        return [part for part in zip(ys, low, self.Bs, biases, strict=True) if part[2] is not None]

    def _frozen(self) -> Iterator[tuple[slice | None, bool, Tensor]]:
        """Columns of y (None: all), whether an adapter has written to them before, and W."""
        weights = [layer.weight for layer in self.layers]
        if self.whole is not None and [weight.data_ptr() for weight in weights] == self.rows:
            yield None, bool(self.adapted), self.whole
            return
        end = 0
        for layer, weight, size, rank, dequantize in zip(
            self.layers, weights, self.sizes, self.ranks, self.dequantize, strict=True
        ):
            start, end = end, end + size
            columns = slice(start, end) if len(weights) > 1 else None
            yield columns, rank > 0, dequantize(layer) if dequantize else weight.detach()


class BlockLayers:
    """A block's layers, grouped by the input that they read."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.head_dim = attention.head_dim
        self.heads, self.kv_heads = (p.out_features // self.head_dim for p in (attention.q_proj, attention.k_proj))
        self.norm, self.norm2 = block.input_layernorm, block.post_attention_layernorm
        self.qkv = Projections(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = Projections(attention.o_proj)
        self.gate_up = Projections(mlp.gate_proj, mlp.up_proj)
        self.down = Projections(mlp.down_proj)
        self.groups = (self.qkv, self.o, self.gate_up, self.down)
        self.parameters = [p for group in self.groups for p in group.parameters]
        self.copies: AdapterCopies | None = None
        matrices = [m for group in self.groups for layer in group.adapted for m in (layer.lora_A, layer.lora_B)]
        self.places = [(m._modules, name, m._modules[name]) for m in (block, attention, mlp) for name in m._modules]
        self.places += [(m._parameters, "weight", m.weight) for m in matrices]

    def are_in_place(self) -> bool:
        """Whether the block still has the layers and the adapters that it had."""
        return all(container[name] is thing for container, name, thing in self.places)


class GradientSum:
    """The sum over tiles of tokens of what `Projections.gradients` gives, in the adapters' own dtype."""

    def __init__(self, *groups: Projections):
        self.scalings = [scaling for group in groups for scaling in group.scalings]
        self.sums = [torch.empty_like(p, requires_grad=False) for group in groups for p in group.parameters]
        self.empty = True

    def add(self, grads: list[Tensor]) -> None:
        if not self.sums:
            return
        new = [torch.empty_like(total) for total in self.sums] if not self.empty else self.sums
        torch._foreach_copy_(new, grads)  # one kernel casts them all
        torch._foreach_mul_(new[::2], self.scalings)
        if not self.empty:
            torch._foreach_add_(self.sums, new)
        self.empty = False


class AdapterCopies:
    """The adapters, float32 as they are trained, in the `dtype` of the products: copied all at once, by two kernels."""

    def __init__(self, projections: Sequence[Projections], dtype: torch.dtype):
        self.masters, self.copies, self.scaled, self.groups = [], [], [], projections
        for group in projections:
            As, Bs = group.parameters[::2], group.parameters[1::2]
            if not As:
                continue
            group.A_RD = As[0].new_empty(sum(group.ranks), As[0].shape[1], dtype=dtype)
            new_Bs = [torch.empty_like(B, dtype=dtype, requires_grad=False) for B in Bs]
            waiting = iter(new_Bs)
            group.Bs = [next(waiting) if rank else None for rank in group.ranks]
            new_As = list(group.A_RD.split([A.shape[0] for A in As]))
            self.masters += As + Bs
            self.copies += new_As + new_Bs
            self.scaled += new_As

    @torch.no_grad()
    def refresh(self) -> None:
        if not self.masters:
            return
        torch._foreach_copy_(self.copies, self.masters)
        torch._foreach_mul_(self.scaled, [scaling for group in self.groups for scaling in group.scalings])


def put_side_by_side(groups: Sequence[Projections]) -> None:
    """Make each group's dense weights the rows of one matrix, for one product; they stay parameters of their own."""
    for group in groups:
        # Where not all or none of the layers have adapters, the first product cannot write or add to all of y.
        if len(group.layers) > 1 and not any(group.dequantize) and len(group.adapted) in (0, len(group.layers)):
            group.whole = torch.cat([layer.weight.detach() for layer in group.layers])
            for layer, rows in zip(group.layers, group.whole.split(group.sizes), strict=True):
                layer.weight.data = rows
            group.rows = [layer.weight.data_ptr() for layer in group.layers]


def _beside(matrix: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """A matrix's columns, divided as those of `parts`."""
    return matrix.split_with_sizes([part.shape[1] for part in parts], dim=1) if len(parts) > 1 else (matrix,)
