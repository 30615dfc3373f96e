"""SigLIP's vision transformer (arXiv:2303.15343) for images of any size (arXiv:2307.06304): SmolVLM's vision tower.

Blocks and names are CLIP's (models/clip_vit.py). There is no class token, and the only norm outside the blocks is after
the last. An image need not be square: positions that were learnt on a square of patches are spread over the patches
that it has, and in a batch of unequal sizes each image sees only its own patches.

I images, C channels, S × S' pixels, P patches (H rows, W columns), D model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.clip_vit import CLIPVisionConfig, VisionTransformer


@dataclass(frozen=True)
class SiglipVisionConfig(CLIPVisionConfig):
    """What a config.json leaves out is as in transformers' Idefics3VisionConfig."""

    kinds: ClassVar[tuple[str, ...]] = ("idefics3_vision", "idefics3", "smolvlm_vision", "smolvlm")
    hidden_size: int = 1152
    num_attention_heads: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Rows and columns of the square of patches that positions were learnt for."""
        return self.image_size // self.patch_size


def position_ids(patch_mask: Tensor, side: int) -> Tensor:
    """Where the patches of images lie in a square of side × side learnt positions: [I, H, W] bool → [I, H, W].

    `patch_mask`: an image's own patches, from the upper left corner on, spread evenly; rounded as in transformers.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=patch_mask.device)

    def places(count: Tensor, length: int) -> Tensor:
        fractions = torch.arange(length, dtype=torch.float32, device=count.device) * (1.0 / count)[:, None]
        return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)

    _, H, W = patch_mask.shape
    rows_IH, columns_IW = places(patch_mask[:, :, 0].sum(1), H), places(patch_mask[:, 0].sum(1), W)
    return torch.where(patch_mask, rows_IH[:, :, None] * side + columns_IW[:, None], 0)


class SiglipEmbeddings(nn.Module):
    """Patches row by row, each with its position added: [I, C, S, S'] → [I, P, D]."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        patch = config.patch_size
        self.side = config.side
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.patches, config.hidden_size)

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        patches_IDHW = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        if patch_mask is None:  # full images are alike
            patch_mask = torch.ones(1, *patches_IDHW.shape[2:], dtype=torch.bool)
        positions = position_ids(patch_mask, self.side).flatten(1).to(pixel_values.device, non_blocking=True)
        return patches_IDHW.flatten(2).transpose(1, 2) + self.position_embedding(positions)


class SiglipVisionModel(VisionTransformer):
    """Embedding, the blocks, a norm."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config, SiglipEmbeddings(config))

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Pixel values [I, C, S, S'] → [I, P, D]. `patch_mask` [I, H, W] bool: the patches that show an image."""
        hidden = self.embeddings(pixel_values, patch_mask)
        masks = () if patch_mask is None else (patch_mask.flatten(1)[:, None, None],)
        for block in self.blocks:
            hidden = self.run_block(block, hidden, *masks)
        return self.post_layernorm(hidden)
