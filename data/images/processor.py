"""What any vision-language model makes of an image: tiles for its vision tower, tokens in its text.

A tile is a square picture as large as the vision tower takes them. CLIP's processor makes one tile of an image
(load.py), SmolVLM's cuts a large one into several (data/images/tiles.py). Every tile has as many <image> tokens
in the text as the model makes features of it; around them a model may have marks of its own.

The work on pixels has two parts: `cut` runs Pillow on 8-bit pixels in background threads, without the GIL; `normalize`
is arithmetic on the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.chat.contents import PLACEHOLDER
from data.json_rows import shown

WITHOUT_EFFECT = {  # entries of a processor's file that change nothing for RGB images, which all are by then
    *("image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"),
    *("do_convert_rgb", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
}
ARITHMETIC = {"resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
Named = TypeVar("Named")


class BadImage(ValueError):
    """A file that is missing or cannot be used: its row may be skipped, if the user wants that."""


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Turns images into tiles and tokens. Build one with `data.images.load.load_image_processor`."""

    token_id: int
    """The id of <image>."""
    tokens: int
    """How many of them a tile becomes: one for each of its features."""
    resample: int
    """Pillow's number of the filter; 3: bicubic."""
    rescale: float | None
    mean: tuple[float, ...] | None
    """Subtracted from each channel …"""
    std: tuple[float, ...] | None
    """… which is then divided by this."""

    def cut(self, image: Image.Image) -> Tensor:
        """The tiles of an image, not yet normalised: [tiles, 3, H, W] uint8."""
        raise NotImplementedError

    def sizes_on_the_way(self, width: int, height: int) -> list[tuple[int, int]]:
        """(width, height) of all that `cut` makes of an image of this size before the tiles."""
        raise NotImplementedError

    def tiles(self, width: int, height: int) -> int:
        """How many tiles `cut` makes of an image of this size."""
        raise NotImplementedError

    def image_ids(self, width: int, height: int, tokenizer) -> list[int]:
        """What stands in the text for an image of this size."""
        raise NotImplementedError

    def check_size(self, width: int, height: int) -> None:
        """Raise BadImage for a decompression bomb: an image with too many pixels now or on its way."""
        for w, h in ((width, height), *self.sizes_on_the_way(width, height)):
            if Image.MAX_IMAGE_PIXELS and w * h > Image.MAX_IMAGE_PIXELS:
                on_its_way = "" if (w, h) == (width, height) else f", {w} x {h} when resized or padded"
                raise BadImage(
                    f"{width} x {height} pixels{on_its_way}: more than {Image.MAX_IMAGE_PIXELS:,}, "
                    "as a decompression bomb has (PIL.Image.MAX_IMAGE_PIXELS)"
                )

    def normalize(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, H, W] uint8 -> float32, rounded where transformers rounds."""
        values = torch.empty(pixels.shape)
        for tile, value in zip(pixels, values, strict=True):  # each in the processor's cache, 4 times as fast as all
            tile = tile.contiguous()
            value.copy_(tile if self.rescale is None else tile.double().mul_(self.rescale))
            if self.mean is not None:
                value.sub_(torch.tensor(self.mean).view(3, 1, 1)).div_(torch.tensor(self.std).view(3, 1, 1))
        return values

    def expand(
        self, ids: list[int], images: Sequence[Named], size_of: Callable[[Named], tuple[int, int]], tokenizer
    ) -> tuple[list[int], list[int]]:
        """A text's ids with every <image> replaced by what stands for the image, and the position each came from.

        `size_of(image)` is its (width, height), upright. Raises ValueError if there are more or fewer <image> tokens
        than images.
        """
        if (found := ids.count(self.token_id)) != len(images):
            named = f"{len(images)} image{'s' * (len(images) != 1)}"
            raise ValueError(f"{named}, but {found} {PLACEHOLDER} in the text to stand for them")
        expanded, places, left = [], [], iter(images)
        for i, token in enumerate(ids):
            new = self.image_ids(*size_of(next(left)), tokenizer) if token == self.token_id else [token]
            expanded += new
            places += [i] * len(new)
        return expanded, places

    def check_tokenizer(self, tokenizer) -> None:
        """Raise ValueError if <image> is not, in this tokenizer, the token that the model takes for an image."""
        if (found := tokenizer.special_tokens.get(PLACEHOLDER)) != self.token_id:
            raise ValueError(
                f"config.json takes token {self.token_id} for an image, but in the tokenizer {PLACEHOLDER} is "
                f"{'no added token' if found is None else f'token {found}'}: tokenizer and model do not match"
            )


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says: cameras store what the sensor saw."""
    return ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image


def to_rgb(image: Image.Image) -> Image.Image:
    """As transformers 5 and vLLM do: what is transparent shows white, everything else is Pillow's conversion."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels_of(image: Image.Image) -> Tensor:
    """[H, W, 3] uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def read_arithmetic(use: dict, path: Path) -> dict:
    """The fields `resample`, `rescale`, `mean` and `std` of a processor, from its file's entries (`ARITHMETIC`)."""
    if use["resample"] not in list(Image.Resampling):
        raise ValueError(f"{path}: resample {shown(use['resample'])} is not a filter of Pillow's")
    mean, std = (per_channel(use[key], key, path) for key in ("image_mean", "image_std"))
    return {
        "resample": use["resample"],
        "rescale": use["rescale_factor"] if use["do_rescale"] else None,
        "mean": mean if use["do_normalize"] else None,
        "std": std if use["do_normalize"] else None,
    }


def check_entries(given: dict, known: set[str], path: Path) -> None:
    """Raise ValueError for an entry of a processor's file that is not known here."""
    for key in given.keys() - known - ARITHMETIC - WITHOUT_EFFECT:
        raise ValueError(f"{path}: {key} = {shown(given[key])} is not supported")


def per_channel(found: object, key: str, path: Path) -> tuple[float, ...]:
    """Three numbers, from one for all channels or one for each."""
    values = tuple(found) if isinstance(found, list) else (found,) * 3
    if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{path}: {key} = {shown(found)} must be one number or three")
    return values
