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


class LoRAEmbedding(nn.Embedding):
    """A frozen embedding (nn.Embedding or a subclass of it, such as HostEmbedding) with a trained low-rank addition."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        """As LoRALinear's; `dropout` is not applied to what is looked up."""
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight, self.base_class = base.weight, type(base)
        self.requires_grad_(False)
        self.device = getattr(base, "device", base.weight.device)  # a HostEmbedding's is where its rows go
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, device=self.device, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, device=self.device).to(dtype))
        self.rank, self.alpha = rank, alpha
        self.train(base.training)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, ids: Tensor) -> Tensor:
        x = self.base_class.forward(self, ids)
        a = F.embedding(ids.to(x.device), self.lora_embedding_A.t()).to(x.dtype)
        return x + F.linear(a, self.lora_embedding_B.to(x.dtype)) * self.scaling

    def delta(self) -> Tensor:
        """(α/r) · (B A)ᵀ, [V, D] float32: what merging adds to the weight."""
        return (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).t() * self.scaling

    def base_layer(self) -> nn.Embedding:
        return frozen_embedding(self)

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """A plain embedding with the same outputs, added in float32 and rounded to the weight's dtype once."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        merged = (self.weight.float() + self.delta().to(self.weight.device)).to(self.weight.dtype)
        embedding.weight = nn.Parameter(merged, requires_grad=False)
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def frozen_embedding(layer: nn.Embedding) -> nn.Embedding:
    """The embedding that an adapted one (with a `base_class` and a `device`) stands for, sharing its weight."""
    base = layer.base_class(layer.num_embeddings, layer.embedding_dim, device="meta")
    base.weight, base.device = layer.weight, layer.device
    return base.train(layer.training)


def lora_embeddings(model: nn.Module) -> dict[str, LoRAEmbedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRAEmbedding)}
