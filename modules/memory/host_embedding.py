"""The input embedding in host memory: 1 GB of an 8B Llama of which a batch reads one row per token.

The rows that a batch needs are gathered on the host and copied: T · D numbers instead of V · D on the card.
"""

import torch
from torch import Tensor, nn


def keep_embedding_on_host(model: nn.Module, device: torch.device) -> None:
    """Replace the model's embedding; before `load_weights` or after it. ValueError if the head shares its weight."""
    if model.lm_head.weight is model.model.embed_tokens.weight:
        raise ValueError("--embedding host: this model's head shares the embedding's weight, which the card needs")
    model.model.embed_tokens = HostEmbedding.from_embedding(model.model.embed_tokens, device)


class HostEmbedding(nn.Embedding):
    """A frozen embedding in host memory.

    Token ids may be on the CPU. To fetch them from the card, the host waits for the card once per micro-batch.
    """

    @classmethod
    def from_embedding(cls, dense: nn.Embedding, device: torch.device) -> "HostEmbedding":
        """Take over `dense`'s weight; one that is still on the meta device goes to the host when it is loaded."""
        layer = cls(dense.num_embeddings, dense.embedding_dim, device="meta")
        weight = dense.weight if dense.weight.is_meta else cls.pack_weight(dense.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.device = device
        return layer.train(dense.training)

    @staticmethod
    def pack_weight(dense: Tensor) -> Tensor:
        """How a checkpoint's weight is stored in this layer; `load_weights` calls it."""
        return dense.cpu()

    def forward(self, ids: Tensor) -> Tensor:
        if self.weight.requires_grad:
            raise ValueError("an embedding in host memory is frozen; keep the weights on the card to train it")
        # The pinned allocator keeps these rows from reuse until their copy has ended.
        shape, pinned = (ids.numel(), self.embedding_dim), self.device.type == "cuda"
        rows = torch.empty(shape, dtype=self.weight.dtype, device="cpu", pin_memory=pinned)
        torch.index_select(self.weight, 0, ids.flatten().cpu(), out=rows)
        return rows.to(self.device, non_blocking=True).view(*ids.shape, self.embedding_dim)
