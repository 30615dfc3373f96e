"""Frozen weights stored small: int8, int4 in groups, float8. Each is codes and scales, W ≈ scale · code.

    --quantize   codes                                                scale                          bits   error
    int8         -128 … 127                                           max|W| / 127.5 of each row     8.01   0.9 %
    float8       e4m3: 4 exponent bits, 3 mantissa bits, to ±448      max|W| / 448 of each row       8.01   2.6 %
    int4         -8 … 7, two to a byte                                extreme / -8 of 32 in a row    4.50   8.6 %
    nf4          16 quantiles of a normal distribution (nf4.py)  max|W| of 64, in 8 bits     4.13   9.2 %

Bits per weight and root-mean-square error relative to the weights, both on normally distributed numbers in a matrix
4096 wide; recipes/benchmarks/README.md has a real model's, too. In float8 an error is relative to each weight, in int8
to the row's largest: int8 is better for plain weights, float8 for rows with outliers. The scale of int4 has the sign
that puts the group's number of largest magnitude on -8, so that all 16 codes are used (8.6 % instead of 9.5 %).

Only storage is small: a matrix is dequantised where it is multiplied with, one at a time, and dropped; the products
run in the activations' dtype. So this works on any device and with anything that trains next to a frozen weight: LoRA
and its relatives, recomputation, the fused blocks, streaming. Merged or saved, what counts is the dequantised
weight.
"""

import functools

import torch
from torch import Tensor, nn

from modules.compile import compiled

GROUP = 32  # int4 weights per scale
CHUNK = 1 << 24  # weights quantised at a time: bounds the transient memory to ~0.3 GB


class PackedTensor(torch.Tensor):
    """A matrix that is stored as codes and scales and looks like the dense one: its shape, dtype, number of weights.

    Code that holds parameters need not know how they are stored: a layer's `weight` is one parameter under its own
    name, and merged weights are rounded to the dtype that it reads as. Memory plans and streaming do need to know: they
    take it apart by PyTorch's protocol for tensor subclasses, `__tensor_flatten__`. It can be copied, moved and read;
    to compute with it, ask for `dense()`.

    Subclasses define `encode(rows float32) → (codes, scales)` and `decode(codes, scales, dtype) → dense`.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype):
        self.codes, self.scales = codes, scales

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, in `dtype` (default: the dtype that it reads as)."""
        with torch._C.DisableTorchFunctionSubclass():  # asking a subclass for its dtype takes the host 10 µs
            return self.decode(self.codes, self.scales, dtype or self.dtype)

    def __tensor_flatten__(self):
        return ["codes", "scales"], {"dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(cls, inner, context, shape, stride):
        return cls(inner["codes"], inner["scales"], shape, context["dtype"])

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        self, kwargs = args[0], dict(kwargs or {})
        if operation in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(operation(self.codes), operation(self.scales), self.shape, self.dtype)
        if operation is torch.ops.aten._to_copy.default:
            dtype = kwargs.pop("dtype", None) or self.dtype  # changes what it reads as
            return cls(operation(self.codes, **kwargs), operation(self.scales, **kwargs), self.shape, dtype)
        raise NotImplementedError(f"{operation} of a {cls.__name__}: compute with its dense()")


class Int8Tensor(PackedTensor):
    """codes int8 [out, in], scales float32 [out]; what torchao's Int8WeightOnlyConfig makes, code for code."""

    @staticmethod
    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        scales = _positive(rows.abs().amax(1) / 127.5)
        return (rows * (1 / scales[:, None])).round().clamp(-128, 127).to(torch.int8), scales

    @staticmethod
    @functools.partial(compiled, any_length=False)
    def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return (codes.float() * scales[:, None]).to(dtype)


class Float8Tensor(PackedTensor):
    """codes int8 [out, in], the bits of float8_e4m3fn; scales float32 [out]: torchao's Float8WeightOnlyConfig."""

    @staticmethod
    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        scales = _positive(rows.abs().amax(1) / 448)
        return (rows / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8), scales

    @staticmethod
    @functools.partial(compiled, any_length=False)
    def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        # Compiled kernels know no float8 on cards before 2022. Its bits, s eeee mmm, make a float16 in the places
        # s 0eeee mmm0000000, whose exponent counts from 15, not from 7: 2⁸ too small.
        half = ((codes.to(torch.int16) << 7) & ~0x4000).view(torch.float16)
        return (half.float() * (256 * scales[:, None])).to(dtype)


class Int4Tensor(PackedTensor):
    """codes uint8 [out, in / 2], two of them, 8 added, in a byte; scales bfloat16 [out, in / 32]: GGUF's Q4_0."""

    @staticmethod
    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        group = min(GROUP, rows.shape[1] & -rows.shape[1])  # a power of two that divides the row
        if group < 2:
            raise ValueError(f"cannot quantise rows of {rows.shape[1]} weights to int4: the number is odd")
        groups = rows.view(len(rows), -1, group)
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
        scales = (extreme / -8).bfloat16()  # rounded first: the codes make up for it
        scales = torch.where(scales == 0, 1, scales)
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
        low, high = codes.to(torch.uint8).view(len(rows), -1, 2).unbind(2)
        return low | high << 4, scales

    @staticmethod
    @functools.partial(compiled, any_length=False)
    def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).view(*scales.shape, -1)
        return ((pairs.float() - 8) * scales.float()[..., None]).to(dtype).view(codes.shape[0], -1)


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is stored small. Its parameter keeps the dense layer's name.

    Subclasses name the `kind` of PackedTensor that it is stored in.
    """

    kind: type[PackedTensor]

    @classmethod
    def from_linear(cls, dense: nn.Linear) -> "QuantizedLinear":
        """Take over `dense`'s parameters; a weight still on the meta device is quantised when it is loaded."""
        layer = cls(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        weight = dense.weight if dense.weight.is_meta else cls.pack_weight(dense.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = dense.bias
        return layer.requires_grad_(False).train(dense.training)

    @classmethod
    def pack_weight(cls, dense: Tensor) -> PackedTensor:
        """How a checkpoint's dense weight is stored in this layer (`load_weights` asks every module for this)."""
        return quantize_tensor(dense, cls.kind)

    def dense_weight(self) -> Tensor:
        return self.weight.dense()

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenLinear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    kind = Int8Tensor


class Float8Linear(QuantizedLinear):
    kind = Float8Tensor


class Int4Linear(QuantizedLinear):
    kind = Int4Tensor


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ, dx = dy W. Only codes and scales are kept for backward, never the dense weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedTensor) -> Tensor:
        ctx.weight = weight
        return x @ weight.dense(x.dtype).t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None]:
        return grad @ ctx.weight.dense(grad.dtype) if ctx.needs_input_grad[0] else None, None


@torch.no_grad()
def quantize_tensor(weight: Tensor, kind: type[PackedTensor]) -> PackedTensor:
    """Quantise a matrix on its own device; the result reads as the weight's dtype.

    Raises ValueError if the weight holds NaN or infinities, which would spoil a whole row.
    """
    parts = [kind.encode(rows.float()) for rows in weight.split(max(1, CHUNK // weight.shape[1]))]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("cannot quantise: the weight holds NaN or infinite values")
    return kind(codes, scales, weight.shape, weight.dtype)


def _positive(scales: Tensor) -> Tensor:
    """Scales above 0, for rows of zeros too."""
    return scales.clamp(min=torch.finfo(torch.float32).tiny)
