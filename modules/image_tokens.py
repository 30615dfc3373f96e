"""Where a batch's images go among its tokens.

An image takes one place in a row, an image token, for each of its features. Each tile of a large image is an image
here. The places are found on the CPU in collation, so that nothing in the step has to look at token ids.

B batch, T tokens, D model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """The images of a batch, in the order in which they appear in it, row by row. Made by `place_images`."""

    pixel_values: Tensor  # [images (tiles), C, S, S] float32, in the order of their tokens
    positions: Tensor  # [2, image tokens] int64, row and column: the same whatever length the rows are padded to

    def prepare(self, device: torch.device, dtype: torch.dtype) -> "Images":
        """On the device, ready for a model that computes in `dtype`."""
        pixel_values, positions = self.pixel_values, self.positions
        if device.type == "cuda":
            pixel_values, positions = pixel_values.pin_memory(), positions.pin_memory()
        moved = pixel_values.to(device, non_blocking=True).to(dtype)
        return Images(moved, positions.to(device, non_blocking=True))


def place_images(
    rows: Tensor | Sequence[Sequence[int]], pixel_values: Tensor | None, *, image_token: int, tokens_per_image: int
) -> Images | None:
    """Find the image tokens in rows of token ids ([B, T], or of unequal length); None if the batch has no image.

    Raises ValueError unless there are `tokens_per_image` of them for each image.
    """
    columns = [(torch.as_tensor(row) == image_token).nonzero().squeeze(1) for row in rows]
    counts = torch.tensor([len(found) for found in columns])
    positions = torch.stack([torch.repeat_interleave(torch.arange(len(counts)), counts), torch.cat(columns)])
    images = 0 if pixel_values is None else len(pixel_values)
    if positions.shape[1] != images * tokens_per_image:
        raise ValueError(
            f"the batch has {positions.shape[1]} image tokens (id {image_token}), but {images} images make "
            f"{images * tokens_per_image} features: write the image token {tokens_per_image} times for each image"
        )
    return Images(pixel_values, positions) if images else None


def put_features(hidden_BTD: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """`hidden` with `features` [images, tokens per image, D] in the places `positions`; [B, T, D]."""
    if features.shape[0] * features.shape[1] != positions.shape[1]:
        images, each, _ = features.shape
        raise ValueError(
            f"{images} images make {images * each} features, expected {positions.shape[1]}, one per image token"
        )
    return hidden_BTD.index_put(tuple(positions), features.flatten(0, 1).to(hidden_BTD.dtype))
