"""The matrix products of linear layers with LoRA, forward and backward, written out.

For layers that read the same input x (q, k and v; gate and up), the scaling s = α/r taken into A:

    forward     a  = s · x Aᵀ          all adapters' A stacked: x is read once, and a [T, R] is tiny
                yᵢ = aᵢ Bᵢᵀ + x Wᵢᵀ    the big product adds onto the small one: no third pass over y
    backward    gᵢ = dyᵢ Bᵢ            [T, rᵢ], side by side in g [T, R]
                dx = s · g A + Σ dyᵢ Wᵢ
                dA = s · gᵀ x,   dBᵢ = dyᵢᵀ aᵢ

In this order the adapters cost 4 T r (in + out) operations each; by way of dW = dyᵀ x it would be some hundred times
as much. W is frozen, so x is not needed to get dx: backward asks for x (for dA) and a (for dB) only after that, in a
call of its own. One frozen matrix at a time is dequantised, and dropped after its product.

T tokens, D input features, R the ranks of all adapters together.
"""

import torch
from torch import Tensor, nn

from modules.lora import LoRALinear


class Projections:
    """Linear layers, with LoRA or frozen, that read the same input.

    `AdapterCopies` fills in the adapters as the products use them: s · A of all layers [R, D], and each layer's B.
    """

    def __init__(self, *layers: nn.Linear):
        self.layers = layers
        self.adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
        self.ranks = [layer.rank if layer in self.adapted else 0 for layer in layers]
        self.parameters = [p for layer in self.adapted for p in (layer.lora_A.weight, layer.lora_B.weight)]

    def forward(
        self, x_TD: Tensor, onto: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Every layer's output, and a. A single layer can add its output to `onto`, and write the sum to `out`."""
        a_TR, outputs = self.low_rank(x_TD), []
        for i, (layer, a_Tr) in enumerate(zip(self.layers, self._columns(a_TR), strict=True)):
            W = dense_weight(layer)
            if a_Tr is None:
                y = x_TD @ W.t() if onto is None else torch.addmm(onto, x_TD, W.t(), out=out)
            else:
                B_t = self.Bs[i].t()
                y = torch.mm(a_Tr, B_t, out=out) if onto is None else torch.addmm(onto, a_Tr, B_t, out=out)
                y.addmm_(x_TD, W.t())
            outputs.append(y)
            del W
        return outputs, a_TR

    def low_rank(self, x_TD: Tensor) -> Tensor | None:
        """a = s · x Aᵀ, [T, R]."""
        return x_TD @ self.A_RD.t() if self.adapted else None

    def backward(self, dys: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """dx and g, from every layer's dy."""
        dx, g_TR = None, None
        if self.adapted:
            g_TR = dys[0].new_empty(dys[0].shape[0], sum(self.ranks))
            for i, g_Tr in enumerate(self._columns(g_TR)):
                if g_Tr is not None:
                    torch.mm(dys[i], self.Bs[i], out=g_Tr)
            dx = g_TR @ self.A_RD
        for layer, dy in zip(self.layers, dys, strict=True):
            W = dense_weight(layer)
            dx = dy @ W if dx is None else dx.addmm_(dy, W)
            del W
        return dx, g_TR

    def gradients(self, dys: list[Tensor], g_TR: Tensor | None, x_TD: Tensor, a_TR: Tensor | None) -> list[Tensor]:
        """[dA / s, dB] of one adapter after the other, in the dtype of the products; for a `GradientSum`."""
        grads = []
        if not self.adapted:
            return grads
        dA_RD = g_TR.t() @ x_TD
        for dA, dy, a_Tr in zip(dA_RD.split(self.ranks), dys, self._columns(a_TR), strict=True):
            if a_Tr is not None:
                grads += [dA, dy.t() @ a_Tr]
        return grads

    def _columns(self, stacked_TR: Tensor | None) -> list[Tensor | None]:
        """Each layer's columns of a or g, None where it has no adapter."""
        if stacked_TR is None:
            return [None] * len(self.layers)
        parts = stacked_TR.split(self.ranks, dim=1)
        return [part if rank else None for part, rank in zip(parts, self.ranks, strict=True)]


class GradientSum:
    """The sum over tiles of tokens of what `Projections.gradients` gives, in the adapters' own dtype."""

    def __init__(self, *groups: Projections):
        self.scalings = [layer.scaling for group in groups for layer in group.adapted]
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

    def __init__(self, projections: list[Projections], dtype: torch.dtype):
        self.masters, self.copies, self.scaled, self.scalings = [], [], [], []
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
            self.scalings += [layer.scaling for layer in group.adapted]

    @torch.no_grad()
    def refresh(self) -> None:
        torch._foreach_copy_(self.copies, self.masters)
        torch._foreach_mul_(self.scaled, self.scalings)


def dense_weight(layer: nn.Linear) -> Tensor:
    """W [out, in], to multiply with; of a quantised layer a dense copy, to be dropped after use."""
    kind = layer.base_class if isinstance(layer, LoRALinear) else type(layer)
    return kind.dense_weight(layer) if hasattr(kind, "dense_weight") else layer.weight.detach()
