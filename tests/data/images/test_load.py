"""Pixel values against transformers' Pillow image processors, and what a folder's configuration may say."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import load_image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from data.images.load import load_image_processor
from data.images.processor import to_rgb, upright
from tests.data.images.tiny_vision import config, draw, folder, llava_processor
from tests.tiny import test_data

SIZES = [(1, 1), (1, 500), (500, 1), (2, 3), (333, 77), (77, 333), (224, 224), (225, 224), (300, 451), (30, 30)]


def ours(oracle, tmp_path, side: int, **settings):
    """The processor that the oracle's own files describe."""
    oracle.save_pretrained(tmp_path)
    vision = {"image_size": side, "patch_size": 14}
    return load_image_processor(tmp_path, config(vision_config=vision, **settings))


def pixel_values(processor, image):
    values = processor.normalize(processor.cut(image))
    assert values.dtype == torch.float32 and values.is_contiguous() and len(values) == 1
    return values[0]


def theirs(oracle, image):
    return torch.from_numpy(np.asarray(oracle(image)["pixel_values"][0]))


ORACLES = {
    "clip 224": (224, lambda: CLIPImageProcessorPil()),
    "clip 336": (336, lambda: CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)),
    "fixed size": (56, lambda: CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)),
    "crop is larger": (224, lambda: CLIPImageProcessorPil(size={"shortest_edge": 97})),
    "crop is smaller": (33, lambda: CLIPImageProcessorPil(crop_size=33, resample=2)),
    "only crop": (64, lambda: CLIPImageProcessorPil(crop_size=64, do_resize=False)),
    "lanczos, half": (28, lambda: CLIPImageProcessorPil(size=40, crop_size=28, resample=1, rescale_factor=1 / 127.5)),
    "own mean": (
        28,
        lambda: CLIPImageProcessorPil(size=28, crop_size=28, image_mean=[0.5] * 3, image_std=[0.3, 0.4, 0.5]),
    ),
    "not normalised": (28, lambda: CLIPImageProcessorPil(size=28, crop_size=28, do_normalize=False)),
    "not rescaled": (28, lambda: CLIPImageProcessorPil(size=28, crop_size=28, do_rescale=False)),
    "llava": (224, lambda: LlavaImageProcessorPil()),
    "llava, padded": (224, lambda: LlavaImageProcessorPil(do_pad=True)),
    "padded, no crop": (
        42,
        lambda: LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 42}, do_center_crop=False),
    ),
}


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ORACLES)
def test_pixel_values_of_all_sizes(tmp_path, name):
    side, make = ORACLES[name]
    oracle = make()
    processor = ours(oracle, tmp_path, side)
    for size in SIZES if "padded" not in name else [*SIZES[:1], *SIZES[3:]]:
        expected = theirs(oracle, draw(*size))
        got = pixel_values(processor, draw(*size))
        assert got.shape == (3, side, side)
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    """As it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def palette(**options) -> Image.Image:
    return saved(draw(50, 40).quantize(16), "PNG", **options)


MODES = {
    "grey": lambda: saved(draw(50, 40, "L"), "PNG"),
    "black and white": lambda: saved(draw(50, 40, "L").convert("1"), "PNG"),
    "grey with alpha": lambda: saved(draw(50, 40, "LA"), "PNG"),
    "alpha": lambda: saved(draw(50, 40, "RGBA"), "PNG"),
    "palette": palette,
    "palette with a clear colour": lambda: palette(transparency=3),
    "palette with alphas": lambda: palette(transparency=bytes(range(0, 160, 10))),
    "one clear colour": lambda: saved(draw(50, 40), "PNG", transparency=draw(50, 40).getpixel((3, 3))),
    "16 bits": lambda: saved(Image.frombytes("I;16", (50, 40), draw(100, 40, "L").tobytes()), "PNG"),
    "32 bits": lambda: saved(draw(50, 40, "L").convert("I"), "TIFF"),
    "float": lambda: saved(draw(50, 40, "L").convert("F"), "TIFF"),
    "CMYK": lambda: saved(draw(50, 40, "CMYK"), "JPEG"),
    "YCbCr": lambda: draw(50, 40, "YCbCr"),
    "JPEG": lambda: saved(draw(50, 40), "JPEG"),
    "WebP": lambda: saved(draw(50, 40, "RGBA"), "WEBP", lossless=True),
    "GIF": lambda: saved(
        draw(50, 40).quantize(), "GIF", save_all=True, append_images=[draw(50, 40, seed=1).quantize()]
    ),
    "BMP": lambda: saved(draw(50, 40), "BMP"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_as_in_transformers(tmp_path, name):
    oracle = CLIPImageProcessorPil(size=28, crop_size=28)
    processor = ours(oracle, tmp_path, 28)
    expected = theirs(oracle, MODES[name]())
    torch.testing.assert_close(pixel_values(processor, MODES[name]()), expected, rtol=0, atol=1e-6)


def test_transparency_shows_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert list(to_rgb(image).get_flattened_data()) == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    draw(60, 36).save(path, exif=exif)
    found = Image.open(path)
    assert upright(found).size == ((36, 60) if 5 <= orientation <= 8 else (60, 36))
    oracle = CLIPImageProcessorPil(size=28, crop_size=28)
    processor = ours(oracle, tmp_path, 28)
    expected = theirs(oracle, load_image(str(path)))  # where transformers, too, looks at the orientation
    torch.testing.assert_close(pixel_values(processor, Image.open(path)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dog.jpg", "pasta.jpeg"])
@pytest.mark.parametrize("oracle", ["clip 224", "clip 336", "llava, padded"])
def test_photos(tmp_path, name, oracle):
    side, make = ORACLES[oracle]
    oracle = make()
    photo = test_data() / "images" / name
    got = pixel_values(ours(oracle, tmp_path, side), Image.open(photo))
    torch.testing.assert_close(got, theirs(oracle, Image.open(photo)), rtol=0, atol=1e-6)


# Configurations


def load(tmp_path, preprocessor: dict, nested: bool = False, **settings):
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": preprocessor} if nested else preprocessor))
    return load_image_processor(tmp_path, config(vision_config={"image_size": 336, "patch_size": 14}, **settings))


OPENAI = {  # openai/clip-vit-large-patch14-336 as published
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}


def test_old_and_new_files(tmp_path):
    old = load(tmp_path, OPENAI)
    (tmp_path / "preprocessor_config.json").unlink()
    new = OPENAI | {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_rescale": True}
    assert load(tmp_path, new, nested=True) == old
    # transformers takes the nested one where there are both
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert load(tmp_path, new, nested=True) == old
    assert load(tmp_path, OPENAI | {"crop_size": None, "resample": None} | new, nested=True) == old
    square = load(tmp_path, new | {"size": 336, "default_to_square": True}, nested=True)
    assert square.resize == (336, 336)


def test_padding_as_llava_names_it(tmp_path):
    padded = load(tmp_path, OPENAI, image_aspect_ratio="pad")
    oracle = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size=336)
    image = draw(90, 200)
    torch.testing.assert_close(pixel_values(padded, image), theirs(oracle, image), rtol=0, atol=1e-6)
    assert load(tmp_path, OPENAI | {"image_aspect_ratio": "pad"}) == padded
    assert load(tmp_path, OPENAI | {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}) == padded
    off = {"image_processor_type": "LlavaImageProcessor", "do_pad": False}
    assert load(tmp_path, OPENAI | off, image_aspect_ratio="pad") == load(tmp_path, OPENAI)


@pytest.mark.parametrize(
    "entries, expected",
    [
        ({"image_processor_type": "ViTImageProcessor"}, "image processor ViTImageProcessor is not supported"),
        ({"size": {"longest_edge": 336}}, 'size = {"longest_edge": 336} is not supported'),
        ({"size": {"shortest_edge": 336, "longest_edge": 500}}, "size = "),
        ({"size": [336, 336]}, "size = [336, 336] is not supported"),
        ({"size": 0}, "size = 0 must be positive"),
        ({"crop_size": {"shortest_edge": 336}}, 'crop_size = {"shortest_edge": 336} is not supported'),
        ({"resample": 99}, "resample 99 is not a filter of Pillow's"),
        ({"image_mean": [0.5, 0.5]}, "image_mean = [0.5, 0.5] must be one number or three"),
        ({"do_pad": True}, "do_pad of CLIPFeatureExtractor is not supported"),
        ({"pad_size": {"height": 400, "width": 400}}, "pad_size = "),
        ({"do_image_splitting": True}, "do_image_splitting = true is not supported"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported (supported: square, pad)"),
        ({"crop_size": 224}, "images would come out 224 x 224 pixels large, but the vision tower takes 336 x 336"),
        ({"do_center_crop": False}, "images would come out of different sizes"),
        ({"do_center_crop": False, "do_resize": False}, "images would come out of different sizes"),
    ],
)
def test_what_is_not_implemented_is_named(tmp_path, entries, expected):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, OPENAI | entries)
    assert expected in str(caught.value) and str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_a_folder_without_processor(tmp_path):
    with pytest.raises(ValueError, match="no image processor in .*looked for preprocessor_config.json and for"):
        load_image_processor(tmp_path, config())
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(ValueError, match="no image processor in"):
        load_image_processor(tmp_path, config())
    with pytest.raises(ValueError, match="names no image_token_index: this model does not take images"):
        load_image_processor(folder(), {"model_type": "llama"})


# Image tokens


def test_number_of_image_tokens(tmp_path):
    def tokens(side, **settings):
        size = {"size": side, "crop_size": side}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(OPENAI | size))
        return load_image_processor(tmp_path, {"model_type": "llava", **settings}).tokens

    large = {"vision_config": {"image_size": 336, "patch_size": 14}}
    assert tokens(336, **large) == 576  # LLaVA 1.5
    assert tokens(336) == 576 and tokens(224, vision_config={"model_type": "clip_vision_model"}) == 49
    assert tokens(336, **large, vision_feature_select_strategy="full") == 577
    siglip = {"model_type": "siglip_vision_model", "image_size": 336, "patch_size": 14}
    assert tokens(336, vision_config=siglip, vision_feature_select_strategy="full") == 576
    for wrong in ({"vision_config": {"model_type": "pixtral"}}, {"vision_feature_select_strategy": "cls"}):
        with pytest.raises(ValueError, match="is not supported .supported: clip_vision_model, siglip_vision_model;"):
            tokens(336, **wrong)


def test_expansion():
    processor = load_image_processor(folder(), config())
    image = processor.token_id
    assert image == llava_processor().image_token_id and processor.tokens == 4

    def expand(ids, *images):
        return processor.expand(ids, images, lambda name: (30, 40), tokenizer=None)

    expanded = [1, *[image] * 4, 2, *[image] * 4]
    assert expand([1, image, 2, image], "a.png", "b.png") == (expanded, [0, 1, 1, 1, 1, 2, 3, 3, 3, 3])
    assert expand([1, 2]) == ([1, 2], [0, 1])
    with pytest.raises(ValueError, match="1 image, but 0 <image>"):
        expand([1], "a.png")
    with pytest.raises(ValueError, match="0 images, but 2 <image>"):
        expand([image, image])


def test_tokenizer_and_model_must_agree():
    processor = load_image_processor(folder(), config())

    class Tokenizer:
        special_tokens = {"<image>": processor.token_id}

    processor.check_tokenizer(Tokenizer)
    for other, expected in (
        ({}, "is no added token"),
        ({"<image>": 7}, "is token 7: tokenizer and model do not match"),
    ):
        Tokenizer.special_tokens = other
        with pytest.raises(ValueError, match=f"takes token {processor.token_id} for an image.*{expected}"):
            processor.check_tokenizer(Tokenizer)
