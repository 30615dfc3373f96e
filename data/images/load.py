"""Images to pixel values, bit for bit as the checkpoint's own image processor makes them.

A vision tower needs images that are resized, cropped, rescaled and normalised as in its training. The settings are in
`preprocessor_config.json` or, since transformers 5, in the `image_processor` section of `processor_config.json`;
missing ones have the defaults of the class named there. Settings that are not implemented here are an error.

This file has CLIP's processor, which LLaVA shares; SmolVLM's is in data/images/tiles.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from data.images.processor import (
    ImageProcessor,
    check_entries,
    per_channel,
    pixels_of,
    read_arithmetic,
    to_rgb,
    upright,
)
from data.images.tiles import CLASSES as TILE_CLASSES
from data.images.tiles import MODELS as TILE_MODELS
from data.images.tiles import load_tiles
from data.json_rows import read_json

CLIP_DEFAULTS = {
    "do_resize": True,
    "size": 224,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_pad": False,
}
CLASSES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")  # and with Fast or Pil behind
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # what a vision tower puts before its patches


@dataclass(frozen=True, kw_only=True)
class OneTile(ImageProcessor):
    """The whole image, or what a crop leaves of it."""

    resize: int | tuple[int, int] | None
    """Length of the shorter side (the other one follows), or (height, width); None: left as it is."""
    crop: tuple[int, int] | None
    """(height, width) cut from the middle; what is missing there is black."""
    background: tuple[int, ...] | None
    """Colour around an image that is padded to a square first; None: it is not."""

    def sizes_on_the_way(self, width: int, height: int) -> list[tuple[int, int]]:
        side = max(width, height)
        padded = (side, side) if self.background else (width, height)
        return [padded, self._resized(*padded)]

    def tiles(self, width: int, height: int) -> int:
        return 1

    def image_ids(self, width: int, height: int, tokenizer) -> list[int]:
        return [self.token_id] * self.tokens

    def cut(self, image: Image.Image) -> Tensor:
        """Turned upright, made RGB, padded, resized, cropped: [1, 3, H, W] uint8 (a view of [1, H, W, 3])."""
        image = to_rgb(upright(image))
        if self.background and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), self.background)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.resize is not None:
            image = image.resize(self._resized(*image.size), self.resample)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return pixels_of(image).permute(2, 0, 1)[None]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing."""
        if self.resize is None:
            return width, height
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)


def load_image_processor(folder: str | Path, config: dict) -> ImageProcessor:
    """The preprocessing of a checkpoint's folder; `config` is its config.json.

    Raises ValueError, naming the entry, for what is not implemented or does not fit the vision tower.
    """
    path, entries = read_processor(Path(folder))
    given = {key: value for key, value in entries.items() if value is not None}
    kind = given.get("image_processor_type", given.get("feature_extractor_type"))
    kind = kind or (TILE_CLASSES[0] if config.get("model_type") in TILE_MODELS else CLASSES[0])
    if (name := kind.removesuffix("Fast").removesuffix("Pil")) in TILE_CLASSES:
        return load_tiles(given, path, config)
    if name not in CLASSES:
        supported = ", ".join((*CLASSES, *TILE_CLASSES))
        raise ValueError(f"{path}: image processor {kind} is not supported (supported: {supported})")
    return _load_one_tile(given, kind, path, config)


def read_processor(folder: Path) -> tuple[Path, dict]:
    """The file that holds a folder's image processor, and its entries. ValueError if there is none."""
    nested = read_json(folder / "processor_config.json").get("image_processor")
    path = folder / ("processor_config.json" if nested else "preprocessor_config.json")
    if not path.is_file():
        raise ValueError(
            f"no image processor in {folder}: looked for preprocessor_config.json and for image_processor in "
            "processor_config.json; copy them there from the checkpoint it was made from"
        )
    return path, nested or read_json(path)


def _load_one_tile(given: dict, kind: str, path: Path, config: dict) -> OneTile:
    token_id, tokens, image_size = _vision(config, path.parent / "config.json")

    # Checkpoints in LLaVA's own format name the padding in words; transformers' class has a switch.
    aspect = given.pop("image_aspect_ratio", config.get("image_aspect_ratio"))
    if aspect not in (None, "square", "pad"):
        raise ValueError(f"{path}: image_aspect_ratio {aspect!r} is not supported (supported: square, pad)")
    given.setdefault("do_pad", aspect == "pad")
    use = CLIP_DEFAULTS | given
    if given["do_pad"] and aspect != "pad" and not kind.startswith("Llava"):
        raise ValueError(f"{path}: do_pad of {kind} is not supported (LlavaImageProcessor's is)")
    longest_is_free = not given.pop("default_to_square", False)
    check_entries(given, CLIP_DEFAULTS.keys(), path)
    resize = _size(use["size"], "size", path, longest_is_free) if use["do_resize"] else None
    crop = _size(use["crop_size"], "crop_size", path, False) if use["do_center_crop"] else None
    arithmetic = read_arithmetic(use, path)
    mean = per_channel(use["image_mean"], "image_mean", path)

    square = resize if isinstance(resize, tuple) else (resize, resize) if resize and use["do_pad"] else None
    if (result := crop or square) != (image_size, image_size):
        size = "of different sizes" if result is None else f"{result[0]} x {result[1]} pixels large"
        expected = f"the vision tower takes {image_size} x {image_size}"
        raise ValueError(f"{path}: images would come out {size}, but {expected}")
    return OneTile(
        token_id=token_id,
        tokens=tokens,
        resize=resize,
        crop=crop,
        background=tuple(int(x * 255) for x in mean) if use["do_pad"] else None,
        **arithmetic,
    )


def _vision(config: dict, path: Path) -> tuple[int, int, int]:
    """(id of <image>, features of an image, height and width of an image) by a config.json."""
    default = 32000 if config.get("model_type") == "llava" else None
    token_id = config.get("image_token_index", config.get("image_token_id", default))
    if token_id is None:
        raise ValueError(f"{path} names no image_token_index: this model does not take images")
    # What is left out has the default of its class; that is LLaVA's own where the whole section is missing.
    vision = config.get("vision_config") or {"image_size": 336, "patch_size": 14}
    kind = vision.get("model_type", "clip_vision_model")
    strategy = config.get("vision_feature_select_strategy", "default")
    if kind not in CLASS_TOKENS or strategy not in ("default", "full"):
        raise ValueError(
            f"{path}: vision tower {kind!r} with vision_feature_select_strategy {strategy!r} is not supported "
            f"(supported: {', '.join(CLASS_TOKENS)}; default, full)"
        )
    image_size, patch_size = vision.get("image_size", 224), vision.get("patch_size", 32)
    features = (image_size // patch_size) ** 2 + CLASS_TOKENS[kind]
    return token_id, features - (strategy == "default"), image_size  # "default" leaves the first one out


def _size(found: object, key: str, path: Path, longest_is_free: bool) -> int | tuple[int, int]:
    """The shorter side, or (height, width), from any spelling: 336, {"shortest_edge": …}, {"height", "width"}."""
    match found:
        case int():
            size = found if longest_is_free else (found, found)
        case {"height": int(height), "width": int(width), **rest} if not rest:
            size = (height, width)
        case {"shortest_edge": int(size), **rest} if not rest and key == "size":
            pass
        case _:
            raise ValueError(f"{path}: {key} = {json.dumps(found)} is not supported")
    if min(size if isinstance(size, tuple) else (size,)) < 1:
        raise ValueError(f"{path}: {key} = {json.dumps(found)} must be positive")
    return size
