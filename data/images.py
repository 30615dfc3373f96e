"""Images to pixel values, bit for bit as the checkpoint's own image processor makes them.

A vision tower knows pictures only as its preprocessing showed them: resized by one filter, cropped, rescaled and
normalised. The numbers stand in `preprocessor_config.json` or, since transformers 5, in the `image_processor` section
of `processor_config.json`; what is missing there is the default of the class named there. What is said there and not
done here is an error.

The work is cut in two: `cut` is Pillow's and is done on 8-bit pixels in background threads, without the GIL;
`normalize` is arithmetic on the batch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.added_tokens import read_json
from data.chat_contents import PLACEHOLDER
from data.json_rows import shown

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
WITHOUT_EFFECT = {  # on the pixel values of RGB images, which all are by then
    *("image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"),
    *("do_convert_rgb", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
}
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # what a vision tower puts before its patches


@dataclass(frozen=True)
class ImageProcessor:
    """What becomes of an image. Build one with `load_image_processor`."""

    resize: int | tuple[int, int] | None
    """Length of the shorter side (the other one follows), or (height, width); None: left as it is."""
    resample: int
    """Pillow's number of the filter; 3: bicubic."""
    crop: tuple[int, int] | None
    """(height, width) cut from the middle; what is missing there is black."""
    rescale: float | None
    mean: tuple[float, ...] | None
    """Subtracted from each channel …"""
    std: tuple[float, ...] | None
    """… which is then divided by this."""
    background: tuple[int, ...] | None
    """Colour around an image that is padded to a square first; None: it is not."""
    token_id: int
    """The id of <image>."""
    tokens: int
    """How many of them an image becomes: one for each of its features."""

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError for a decompression bomb: an image with too many pixels now or on its way."""
        side = max(width, height)
        padded = (side, side) if self.background else (width, height)
        for w, h in ((width, height), padded, self._resized(*padded)):
            if Image.MAX_IMAGE_PIXELS and w * h > Image.MAX_IMAGE_PIXELS:
                on_its_way = "" if (w, h) == (width, height) else f", {w} x {h} when resized or padded"
                raise ValueError(
                    f"{width} x {height} pixels{on_its_way}: more than {Image.MAX_IMAGE_PIXELS:,}, "
                    "as a decompression bomb has (PIL.Image.MAX_IMAGE_PIXELS)"
                )

    def cut(self, image: Image.Image) -> Tensor:
        """Turned upright, made RGB, padded, resized, cropped: [3, H, W] uint8 (a view of [H, W, 3])."""
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
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """[…, 3, H, W] uint8 -> float32, rounded where transformers rounds."""
        values = pixels.float() if self.rescale is None else (pixels.double() * self.rescale).float()
        if self.mean is not None:
            values.sub_(torch.tensor(self.mean).view(3, 1, 1)).div_(torch.tensor(self.std).view(3, 1, 1))
        return values.contiguous()

    def places(self, ids: list[int], images: int) -> list[int]:
        """The token that each position of a text comes from once its `images` <image> tokens have been expanded.

        Raises ValueError if there are more or fewer of these tokens than images.
        """
        if (found := ids.count(self.token_id)) != images:
            named = f"{images} image{'s' * (images != 1)}"
            raise ValueError(f"{named}, but {found} {PLACEHOLDER} in the text to stand for them")
        return [i for i, token in enumerate(ids) for _ in range(self.tokens if token == self.token_id else 1)]

    def expand(self, ids: list[int], images: int) -> list[int]:
        """The ids of a text with each <image> token as often as its image has features."""
        return [ids[i] for i in self.places(ids, images)]

    def check_tokenizer(self, tokenizer) -> None:
        """Raise ValueError if <image> is not, in this tokenizer, the token that the model takes for an image."""
        if (found := tokenizer.special_tokens.get(PLACEHOLDER)) != self.token_id:
            raise ValueError(
                f"config.json takes token {self.token_id} for an image, but in the tokenizer {PLACEHOLDER} is "
                f"{'no added token' if found is None else f'token {found}'}: tokenizer and model do not match"
            )

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
    folder = Path(folder)
    nested = read_json(folder / "processor_config.json").get("image_processor")
    path = folder / ("processor_config.json" if nested else "preprocessor_config.json")
    if not path.is_file():
        raise ValueError(
            f"no image processor in {folder}: looked for preprocessor_config.json and for image_processor in "
            "processor_config.json; copy them there from the checkpoint it was made from"
        )
    given = {key: value for key, value in (nested or read_json(path)).items() if value is not None}
    token_id, tokens, image_size = _vision(config, folder / "config.json")
    kind = given.get("image_processor_type", given.get("feature_extractor_type", CLASSES[0]))
    if kind.removesuffix("Fast").removesuffix("Pil") not in CLASSES:
        raise ValueError(f"{path}: image processor {kind} is not supported (supported: {', '.join(CLASSES)})")

    # Checkpoints in LLaVA's own format name the padding in words; transformers' class has a switch.
    aspect = given.pop("image_aspect_ratio", config.get("image_aspect_ratio"))
    if aspect not in (None, "square", "pad"):
        raise ValueError(f"{path}: image_aspect_ratio {aspect!r} is not supported (supported: square, pad)")
    given.setdefault("do_pad", aspect == "pad")
    use = CLIP_DEFAULTS | given
    if given["do_pad"] and aspect != "pad" and not kind.startswith("Llava"):
        raise ValueError(f"{path}: do_pad of {kind} is not supported (LlavaImageProcessor's is)")
    longest_is_free = not given.pop("default_to_square", False)
    for key in given.keys() - CLIP_DEFAULTS.keys() - WITHOUT_EFFECT:
        raise ValueError(f"{path}: {key} = {shown(given[key])} is not supported")
    resize = _size(use["size"], "size", path, longest_is_free) if use["do_resize"] else None
    crop = _size(use["crop_size"], "crop_size", path, False) if use["do_center_crop"] else None
    if use["resample"] not in list(Image.Resampling):
        raise ValueError(f"{path}: resample {shown(use['resample'])} is not a filter of Pillow's")
    mean, std = (_per_channel(use[key], key, path) for key in ("image_mean", "image_std"))

    square = resize if isinstance(resize, tuple) else (resize, resize) if resize and use["do_pad"] else None
    if (result := crop or square) != (image_size, image_size):
        size = "of different sizes" if result is None else f"{result[0]} x {result[1]} pixels large"
        expected = f"the vision tower takes {image_size} x {image_size}"
        raise ValueError(f"{path}: images would come out {size}, but {expected}")
    return ImageProcessor(
        resize=resize,
        resample=use["resample"],
        crop=crop,
        rescale=use["rescale_factor"] if use["do_rescale"] else None,
        mean=mean if use["do_normalize"] else None,
        std=std if use["do_normalize"] else None,
        background=tuple(int(x * 255) for x in mean) if use["do_pad"] else None,
        token_id=token_id,
        tokens=tokens,
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


def _per_channel(found: object, key: str, path: Path) -> tuple[float, ...]:
    values = tuple(found) if isinstance(found, list) else (found,) * 3
    if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{path}: {key} = {shown(found)} must be one number or three")
    return values
