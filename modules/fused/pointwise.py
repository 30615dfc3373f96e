"""The memory-bound steps between the matrix products of a Llama block, and their derivatives, written out.

Each reads and writes every number once: on a GPU the compiler makes one kernel of each (`modules/compile.py`), on the
CPU they run as they stand. Statistics and derivatives are formed in float32 (float64 for float64 input).

T tokens, D model, N heads, H head dim, F feed-forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.compile import compiled


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@compiled
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean x² + eps), as modules/norm.py."""
    wide = _wide(x_TD)
    return weight_D * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)


@compiled
def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, onto_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """`onto` + ∂/∂x of the norm, and the norm's output once more.

    With x̂ = x · r, r = 1/√(mean x² + eps):  dx = r · (w dy − x̂ · mean(w dy · x̂)).
    """
    x, dy = _wide(x_TD), _wide(dy_TD) * _wide(weight_D)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x_hat = x * r
    dx = r * (dy - x_hat * (dy * x_hat).mean(-1, keepdim=True))
    return (_wide(onto_TD) + dx).to(x_TD.dtype), weight_D * x_hat.to(x_TD.dtype)


@compiled
def split_and_rotate(
    qkv_TO: Tensor, cos_TH: Tensor, sin_TH: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, N, H], k and v [T, K, H] from one row per token; q and k rotated as in modules/rotary_embedding.py."""
    q, k, v = qkv_TO.unflatten(1, (-1, cos_TH.shape[1])).split((heads, kv_heads, kv_heads), dim=1)
    return _rotate(q, cos_TH, sin_TH), _rotate(k, cos_TH, sin_TH), v.clone()


@compiled
def split_and_rotate_backward(dq_TNH: Tensor, dk_TKH: Tensor, dv_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """∂qkv, [T, O]: the transpose of a rotation is the one by the negative angle."""
    dq, dk = _rotate(dq_TNH, cos_TH, -sin_TH), _rotate(dk_TKH, cos_TH, -sin_TH)
    return torch.cat((dq, dk, dv_TKH), dim=1).flatten(1)


def _rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos_TH[:, None] + torch.cat((-second, first), dim=-1) * sin_TH[:, None]


@compiled
def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate_TF) * up_TF


@compiled
def swiglu_backward_(gate_TF: Tensor, up_TF: Tensor, dh_TF: Tensor) -> None:
    """Overwrites gate by ∂gate, up by ∂up and dh by h = silu(gate) · up, which the layer behind needs once more."""
    gate, up, dh = _wide(gate_TF), _wide(up_TF), _wide(dh_TF)
    sigmoid = torch.sigmoid(gate)
    silu = F.silu(gate)  # to the bit what forward had
    dgate = dh * up * (sigmoid + silu * (1 - sigmoid))
    dup, h = dh * silu, silu * up
    for target, value in ((gate_TF, dgate), (up_TF, dup), (dh_TF, h)):
        target.copy_(value)
