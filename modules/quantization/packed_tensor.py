"""A matrix that is stored as codes and scales and looks like the dense one: its shape, dtype, number of weights.

What holds parameters then need not know how they are stored: a layer's `weight` is one parameter under its own name, it
counts as many numbers as it stands for, and merged weights are rounded to the dtype that it reads as. What does need to
know (memory plans, streaming) takes it apart by PyTorch's own protocol for such tensors, `__tensor_flatten__`.

It can be copied, moved and read; whoever computes with it asks for `dense()`.
"""

import torch
from torch import Tensor


class PackedTensor(torch.Tensor):
    """Subclasses say how: `encode(rows float32) → (codes, scales)` and `decode(codes, scales, dtype) → dense`."""

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
