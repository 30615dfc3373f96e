"""RMSNorm: scale every token to unit root mean square, then by a learned weight (arXiv:1910.07467)."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps), the statistics in float32 whatever the input's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # At least float32: bfloat16 squares lose the small entries. Never *down* to it: gradcheck runs in float64.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)  # a trained weight may be kept in float32

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
