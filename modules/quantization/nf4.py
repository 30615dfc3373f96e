"""4-bit NormalFloat weights, the "Q" of QLoRA (arXiv:2305.14314), stored in torchao's NF4Tensor.

Each weight becomes one of 16 values, the quantiles of a normal distribution scaled to [-1, 1], times the largest
magnitude of its block of 64. Those block scales are quantised once more, to 8 bits per scale with one float per 256
of them ("double quantisation", Sec. 3), which brings the cost to 4.13 bits per weight; the root mean square error is
9.2 % of that of normally distributed weights. The weights are frozen: forward and backward both need W only as a
factor, so a matrix is dequantised where it is used and dropped again.

Storage and subclass behaviour are torchao's; quantising and dequantising are written out here, because torchao's
index with int64 and need 8 to 64 bytes per weight on the way. The scale statistics are kept in float32 whatever
the weight's dtype, so that dequantising rounds once; for float32 weights the result is torchao's, bit for bit.
"""

import functools

import torch
from torch import Tensor, nn

from modules.compile import compiled
from modules.quantization.quantize import quantize_blocks
from modules.quantization.quantized import CHUNK, QuantizedLinear
from modules.quantization.torchao_parts import NF4Tensor, SubclassTensorArgs

BLOCK = 64  # weights per scale
SCALE_BLOCK = 256  # scales per float32 factor
# The 16 levels (arXiv:2305.14314, App. E), as torchao rounds them.
LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
LEVELS += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
ZERO_CODE = 7


@torch.no_grad()
def quantize_nf4_tensor(weight: Tensor, dtype: torch.dtype | None = None) -> NF4Tensor:
    """Quantise a matrix on its own device; the result reads as `dtype` (default: the weight's own).

    Raises ValueError if the weight holds NaN or infinities: one of them would spoil every scale of the matrix.
    """
    dtype = dtype or weight.dtype
    flat = weight.reshape(-1)
    block = _largest_divisor(flat.numel(), BLOCK)
    if block < 2:
        raise ValueError(f"cannot quantise a weight of shape {tuple(weight.shape)} to NF4: its size is odd")
    chunk = CHUNK // block * block
    scales = torch.cat([part.view(-1, block).abs().amax(1).float() for part in flat.split(chunk)])
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("cannot quantise to NF4: the weight holds NaN or infinite values")
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk].view(-1, block).float()
        scale = scales[start // block : start // block + part.shape[0], None]
        codes = torch.bucketize(part / scale, midpoints, out_int32=True)  # 0 / 0 in a block of zeros: any code, as …
        codes = codes.masked_fill_(scale == 0, ZERO_CODE).to(torch.uint8).view(-1, 2)  # … its weights are set here
        packed[start // 2 : start // 2 + codes.shape[0]] = codes[:, 0] << 4 | codes[:, 1]

    mean = scales.mean()
    scale_block = _largest_divisor(scales.numel(), SCALE_BLOCK)
    centred = (scales - mean).view(-1, scale_block)
    factor = 256 / (2 * centred.abs().amax(1))  # as torchao: the largest becomes ±128, and +128 is cut to 127 below
    factor = torch.where(torch.isfinite(factor), factor, 1.0)  # infinite where all scales are alike
    scales_int8 = (centred * factor[:, None]).round().clamp(-128, 127).to(torch.int8).view(-1)
    strides = (weight.shape[1], 1) if weight.ndim == 2 else (1,)
    meta = SubclassTensorArgs(weight.shape, strides, 0, dtype, weight.device, False)
    return NF4Tensor(meta, block, scales.numel(), scale_block, scales_int8, factor, mean, packed, levels)


def dequantize_nf4(weight: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense matrix, in `dtype` (default: the dtype that the weight reads as).

    On CUDA the arithmetic is compiled into one kernel that reads half a byte and writes one value per weight.
    """
    with torch._C.DisableTorchFunctionSubclass():  # asking a subclass for its dtype takes the host 10 µs
        inner = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean)
        return _dequantize(*inner, weight.nf4, dtype or weight.dtype).view(weight.shape)


@functools.partial(compiled, any_length=False)
def _dequantize(
    packed: Tensor, scales_int8: Tensor, factor: Tensor, mean: Tensor, levels: Tensor, dtype: torch.dtype
) -> Tensor:
    scales = (scales_int8.view(factor.numel(), -1) / factor[:, None]).view(-1) + mean  # [blocks]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(scales.numel(), -1)
    return (levels[codes.int()] * scales[:, None]).to(dtype)  # [blocks, block]


class _FrozenNF4Linear(torch.autograd.Function):
    """y = x Wᵀ, dx = dy W. Only the 4-bit weight is kept for backward, never its dense copy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: NF4Tensor) -> Tensor:
        ctx.weight = weight
        return x @ dequantize_nf4(weight, x.dtype).t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ dequantize_nf4(ctx.weight, grad.dtype)) if ctx.needs_input_grad[0] else None, None


class NF4Linear(QuantizedLinear):
    """A linear layer whose frozen weight is stored in NF4."""

    @staticmethod
    def pack_weight(dense: Tensor) -> NF4Tensor:
        return quantize_nf4_tensor(dense)

    def dense_weight(self) -> Tensor:
        return dequantize_nf4(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenNF4Linear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def quantize_nf4(model: nn.Module, *, head: bool = False) -> list[str]:
    """Replace every linear layer of the model's blocks, and its head if wanted, by an NF4Linear (`quantize_blocks`)."""
    return quantize_blocks(model, NF4Linear, head=head)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `number` (small or odd matrices get smaller blocks)."""
    return min(limit, number & -number)
