"""LoRA for an embedding: the looked-up row gets a trained addition of rank r.

    e(i) = E[i] + (α/r) · B A[:, i]            A [r, V] zero, B [D, r] random, so training starts at the base model

An embedding is a matrix product with a one-hot vector, so this is LoRA's formula with E [V, D] = Wᵀ (arXiv:2106.09685);
A x is a column of A. It trains r · (V + D) numbers: for Llama 3 and r = 16, 2.1 million instead of 525. It reaches
tokens that training shows and, by way of B, no others. Useful where the vocabulary is used in a new way (another
language, a code); for a few new tokens train their rows (modules/adapters/token_rows.py).

PEFT calls them `lora_embedding_A` and `lora_embedding_B` (parameters, no `.weight`), starts them like this, and applies
no dropout. A tied head keeps the plain embedding as its weight, as in peft: only the lookup is adapted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.parts import FrozenEmbedding


class LoRAEmbedding(FrozenEmbedding):
    """A frozen embedding with a trained low-rank addition."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        """As LoRALinear's; `dropout` is not applied to what is looked up."""
        super().__init__(base)
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, device=self.device, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, device=self.device).to(dtype))
        self.rank, self.alpha = rank, alpha

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, ids: Tensor) -> Tensor:
        x = self.frozen(ids)
        a = F.embedding(ids.to(x.device), self.lora_embedding_A.t()).to(x.dtype)
        return x + F.linear(a, self.lora_embedding_B.to(x.dtype)) * self.scaling

    def delta(self) -> Tensor:
        """(α/r) · (B A)ᵀ, [V, D] float32: what merging adds to the weight."""
        return (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).t() * self.scaling

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """A plain embedding with the same outputs, added in float32 and rounded to the weight's dtype once."""
        return self.dense(self.weight.float() + self.delta().to(self.weight.device))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"
