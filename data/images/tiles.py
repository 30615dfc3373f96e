"""SmolVLM's and Idefics3's images (arXiv:2408.12637, Sec. 4.1): a large one is cut into tiles, and shown as a whole.

A vision tower that takes 512 × 512 pixels would not read small print in a photo of a page. So the image is enlarged or
reduced until its longest side is, say, 2,048 pixels, its sides are rounded up to multiples of 512, and it becomes up to
4 × 4 tiles and, behind them, the whole of it squeezed into one more. In the text each tile has its tokens, and
around them marks that say where it was:

    <fake_token_around_image><row_1_col_1><image>…<image><fake_token_around_image><row_1_col_2><image>…<image>
    …

    <fake_token_around_image><global-img><image>…<image><fake_token_around_image>

Without splitting, or where the image fits into one tile, there is only the last of these. Every tile is full, so the
padding and the masks that transformers' processor makes for batches of unequal images have nothing to hide here.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.chat.contents import PLACEHOLDER
from data.images.processor import ImageProcessor, check_entries, pixels_of, read_arithmetic, to_rgb, upright
from data.json_rows import read_json, shown

DEFAULTS = {
    "do_resize": True,
    "size": {"longest_edge": 4 * 364},
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
    "resample": 1,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CLASSES = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")  # and with Fast or Pil behind
MODELS = ("idefics3", "smolvlm")
PADDING, VIDEOS = {"do_pad", "return_row_col_info"}, {"video_sampling"}  # entries that change nothing here
LONGEST = 4096  # no side is ever made longer
FRAME = "<fake_token_around_image>"


@dataclass(frozen=True, kw_only=True)
class Tiles(ImageProcessor):
    """Rows and columns of tiles, and the whole image."""

    longest: int | None
    """Length of the longer side, to which an image is resized first …"""
    resize: tuple[int, int] | None
    """… or its (width, height); with neither it is left as it is."""
    tile: int
    """Height and width of a tile."""
    split: bool
    """Whether there are tiles besides the whole image."""

    def cut(self, image: Image.Image) -> Tensor:
        """[tiles, 3, tile, tile] uint8: row by row, then the whole image."""
        image, side = to_rgb(upright(image)), self.tile
        rows, columns = self.grid(*image.size)
        for size in self.sizes_on_the_way(*image.size):
            image = image.resize(size, self.resample)
        tiles = [pixels_of(image.resize((side, side), self.resample))[None]]
        if rows:
            cells = pixels_of(image).view(rows, side, columns, side, 3)
            tiles.insert(0, cells.transpose(1, 2).flatten(0, 1))
        return torch.cat(tiles).permute(0, 3, 1, 2).contiguous()

    def sizes_on_the_way(self, width: int, height: int) -> list[tuple[int, int]]:
        """(width, height) after each resizing: to the longest side, then to multiples of a tile."""
        sizes = []
        if self.longest is not None or self.resize is not None:
            width, height = self.resize or fit_longest(width, height, self.longest)
            sizes.append((width, height))
        if self.split:
            sizes.append(round_up(width, height, self.tile))
        return sizes

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles of an image of this size; 0 where there is only the whole image."""
        width, height = [(width, height), *self.sizes_on_the_way(width, height)][-1]
        large = self.split and max(width, height) > self.tile
        return (height // self.tile, width // self.tile) if large else (0, 0)

    def tiles(self, width: int, height: int) -> int:
        rows, columns = self.grid(width, height)
        return rows * columns + 1

    def image_ids(self, width: int, height: int, tokenizer) -> list[int]:
        marked = _marked_ids(tokenizer, *self.grid(width, height))
        return [token for token in marked for _ in range(self.tokens if token == self.token_id else 1)]

    def check_tokenizer(self, tokenizer) -> None:
        super().check_tokenizer(tokenizer)
        if FRAME not in tokenizer.special_tokens:
            raise ValueError(f"the tokenizer has no token {FRAME}, which stands before and behind images in the text")


@lru_cache(maxsize=64)
def _marked_ids(tokenizer, rows: int, columns: int) -> tuple[int, ...]:
    """What stands for an image of rows × columns tiles, with one <image> for each tile."""
    # A special token begins and ends it, so it may be tokenised on its own.
    return tuple(tokenizer.encode(marks(rows, columns)))


def marks(rows: int, columns: int) -> str:
    """The text that stands for an image of rows × columns tiles, with one <image> for each tile."""
    text = ""
    for row in range(1, rows + 1):
        tiles = (f"{FRAME}<row_{row}_col_{column}>{PLACEHOLDER}" for column in range(1, columns + 1))
        text += "".join(tiles) + "\n"
    whole = f"{FRAME}<global-img>{PLACEHOLDER}{FRAME}"
    return f"{text}\n{whole}" if rows else whole


def fit_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) with the longer side that long and the other one even, as transformers rounds it."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > LONGEST:
        width, height = LONGEST, int(LONGEST / aspect)
    elif height > width and height > LONGEST:
        width, height = int(LONGEST * aspect), LONGEST
    return max(width, 1), max(height, 1)


def round_up(width: int, height: int, tile: int) -> tuple[int, int]:
    """(width, height) as multiples of `tile`: first the longer side, then the other one that goes with it."""
    aspect = width / height

    def multiple(length: int) -> int:
        return math.ceil(length / tile) * tile

    if width >= height:
        width = multiple(width)
        return width, multiple(int(width / aspect))
    height = multiple(height)
    return multiple(int(height * aspect)), height


def load_tiles(given: dict, path: Path, config: dict) -> Tiles:
    """From the entries of a processor's file `path`, and config.json. Raises ValueError, naming the entry."""
    check_entries(given, DEFAULTS.keys() | PADDING | VIDEOS, path)
    use = DEFAULTS | given
    longest = resize = None
    match use["size"] if use["do_resize"] else None:
        case {"longest_edge": int(longest), **rest} if not rest and longest > 0:
            pass
        case {"height": int(height), "width": int(width), **rest} if not rest and min(height, width) > 0:
            resize = (width, height)
        case None:
            pass
        case other:
            raise ValueError(f"{path}: size = {shown(other)} is not supported")
    match use["max_image_size"]:
        case {"longest_edge": int(tile), **rest} if not rest and tile > 0:
            pass
        case other:
            raise ValueError(f"{path}: max_image_size = {shown(other)} is not supported")
    token_id, tokens = _model(config, tile, path)
    in_text = read_json(path.parent / "processor_config.json").get("image_seq_len", tokens)
    if in_text != tokens:
        raise ValueError(
            f"{path.parent / 'processor_config.json'}: image_seq_len {in_text}, but the model makes {tokens} features "
            f"of a tile of {tile} x {tile} pixels (max_image_size)"
        )
    sizes = dict(longest=longest, resize=resize, tile=tile, split=bool(use["do_image_splitting"]))
    return Tiles(token_id=token_id, tokens=tokens, **read_arithmetic(use, path), **sizes)


def _model(config: dict, tile: int, path: Path) -> tuple[int, int]:
    """(id of <image>, features of a tile) by a config.json."""
    if (kind := config.get("model_type")) not in MODELS:
        raise ValueError(f"{path} cuts images into tiles for {', '.join(MODELS)}, but the model is {kind!r}")
    scale = config.get("scale_factor", 2)
    rows = tile // (config.get("vision_config") or {}).get("patch_size", 32)
    if rows < 1 or rows % scale:
        raise ValueError(f"{path}: a tile of {tile} pixels has {rows} rows of patches, scale_factor is {scale}")
    return config.get("image_token_id", 128257), (rows // scale) ** 2
