"""A Llama block with LoRA, forward and backward, as one would write it down: the formulas and nothing else.

Read this before lora_block.py, which computes the same with tiles, kept and recomputed values and memory used twice.
Nothing runs this in training; the tests hold lora_block.py to it.

B batch, T tokens, D model, N heads, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import attention
from modules.adapters.lora import LoRALinear
from modules.attention import SequenceLayout, apply_rotary
from modules.fused.pointwise import rms_norm, rms_norm_backward


def block_by_formula(
    block: nn.Module, x_BTD: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout, dy_BTD: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y and, for the gradient dy, dx and [dA, dB] of q, k, v, o, gate, up and down, those that have an adapter."""
    attn, mlp, norm, norm2 = block.self_attn, block.mlp, block.input_layernorm, block.post_attention_layernorm

    # x' = x + attention(q, k, v) W_oᵀ
    n = rms_norm(x_BTD, norm.weight, norm.eps)
    q, k, v = (heads(linear(layer, n), attn.head_dim) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k, v = (t.detach().requires_grad_() for t in (apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v))
    with torch.enable_grad():  # the kernel brings its own backward
        out = attention.attend(q, k, v, layout)
    o = by_token(out.detach())
    x_mid = x_BTD + linear(attn.o_proj, o)

    # y = x' + (silu(gate) · up) W_dᵀ
    n2 = rms_norm(x_mid, norm2.weight, norm2.eps)
    gate, up = linear(mlp.gate_proj, n2), linear(mlp.up_proj, n2)
    h = F.silu(gate) * up
    y = x_mid + linear(mlp.down_proj, h)

    # dx' = dy + through the feed-forward
    dh, grads_down = linear_backward(mlp.down_proj, h, dy_BTD)
    sigmoid = torch.sigmoid(gate)
    dn_gate, grads_gate = linear_backward(mlp.gate_proj, n2, dh * up * sigmoid * (1 + gate * (1 - sigmoid)))
    dn_up, grads_up = linear_backward(mlp.up_proj, n2, dh * F.silu(gate))
    dx_mid, _ = rms_norm_backward(dn_gate + dn_up, x_mid, norm2.weight, norm2.eps, dy_BTD)

    # dx = dx' + through attention; the transpose of a rotation is the one by the negative angle
    do, grads_o = linear_backward(attn.o_proj, o, dx_mid)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), heads(do, attn.head_dim))
    dn_q, grads_q = linear_backward(attn.q_proj, n, by_token(apply_rotary(dq, cos, -sin)))
    dn_k, grads_k = linear_backward(attn.k_proj, n, by_token(apply_rotary(dk, cos, -sin)))
    dn_v, grads_v = linear_backward(attn.v_proj, n, by_token(dv))
    dx, _ = rms_norm_backward(dn_q + dn_k + dn_v, x_BTD, norm.weight, norm.eps, dx_mid)
    return y, dx, grads_q + grads_k + grads_v + grads_o + grads_gate + grads_up + grads_down


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ."""
    y = F.linear(x, frozen_weight(layer), layer.bias)
    if isinstance(layer, LoRALinear):
        y = y + layer.scaling * (x @ layer.lora_A.weight.t()) @ layer.lora_B.weight.t()
    return y


def linear_backward(layer: nn.Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """dx = dy W + s · (dy B) A, and [dA = s · (dy B)ᵀ x, dB = s · dyᵀ (x Aᵀ)]."""
    dx = dy @ frozen_weight(layer)
    if not isinstance(layer, LoRALinear):
        return dx, []
    A, B, s = layer.lora_A.weight, layer.lora_B.weight, layer.scaling
    x_flat, dy_flat = x.flatten(0, 1), dy.flatten(0, 1)
    g = dy_flat @ B
    return dx + s * (dy @ B) @ A, [s * g.t() @ x_flat, s * dy_flat.t() @ (x_flat @ A.t())]


def frozen_weight(layer: nn.Linear) -> Tensor:
    """W, whatever form it is stored in."""
    return layer.dense_weight() if hasattr(layer, "dense_weight") else layer.weight


def heads(x_BTD: Tensor, head_dim: int) -> Tensor:
    return x_BTD.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, N, T, H]


def by_token(x_BNTH: Tensor) -> Tensor:
    return x_BNTH.transpose(1, 2).flatten(2)
