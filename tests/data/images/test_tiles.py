"""Tiles and the marks around them against transformers' Idefics3 and SmolVLM processors."""

import copy
import json

import pytest
import torch
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from data.batches import Batches
from data.chat.templates import ChatTemplate
from data.dataset import IGNORE_INDEX, load_dataset
from data.images.files import ImageFiles, check, load_image
from data.images.load import load_image_processor
from data.images.tiles import marks
from data.rows import encode_row
from tests.data.images.test_load import MODES
from tests.data.images.test_rows import image, text, user
from tests.data.images.tiny_tiles import TOKENS, config, parts, smolvlm_processor
from tests.data.images.tiny_vision import draw
from tests.tiny import test_data

SIZES = [(1, 1), (1, 500), (500, 1), (2, 3), (333, 77), (77, 333), (16, 16), (17, 16), (48, 48), (30, 31), (49, 95)]
SMALL = dict(size={"longest_edge": 48}, max_image_size={"longest_edge": 16})
ORACLES = {
    "tiles": lambda: Idefics3ImageProcessorPil(**SMALL),
    "whole": lambda: Idefics3ImageProcessorPil(**SMALL, do_image_splitting=False),
    "size that is no multiple": lambda: Idefics3ImageProcessorPil(**SMALL | dict(size={"longest_edge": 45})),
    "smaller than a tile": lambda: SmolVLMImageProcessorPil(**SMALL | dict(size={"longest_edge": 12})),
    "not resized": lambda: SmolVLMImageProcessorPil(**SMALL, do_resize=False),
    "not resized, whole": lambda: SmolVLMImageProcessorPil(**SMALL, do_resize=False, do_image_splitting=False),
    "fixed size": lambda: Idefics3ImageProcessorPil(**SMALL | dict(size={"height": 20, "width": 40})),
    "bicubic, own mean": lambda: SmolVLMImageProcessorPil(
        **SMALL, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.4, 0.5], rescale_factor=1 / 127.5
    ),
    "not normalised": lambda: SmolVLMImageProcessorPil(**SMALL, do_normalize=False, do_pad=False),
}
LARGE = {
    "SmolVLM-256M": lambda: SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
    "Idefics3": lambda: Idefics3ImageProcessorPil(),
}


def ours(oracle, tmp_path):
    """The processor that the oracle's own files describe."""
    oracle.save_pretrained(tmp_path)
    side = oracle.max_image_size["longest_edge"]
    vision = {"image_size": side, "patch_size": side // 4}
    return load_image_processor(tmp_path, config(vision_config=vision))


def check_image(oracle, processor, image):
    """Pixel values, and rows and columns as the text has them."""
    expected = oracle(image, return_row_col_info=True, return_tensors="pt")
    (pixels,), (((rows,),), ((columns,),)) = expected["pixel_values"], (expected["rows"], expected["cols"])
    got = processor.normalize(processor.cut(image.copy()))
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == pixels.shape
    torch.testing.assert_close(got, pixels.float(), rtol=0, atol=1e-6)
    if "pixel_attention_mask" in expected:
        assert expected["pixel_attention_mask"].all()  # why there is no such mask here
    assert processor.grid(*image.size) == (rows, columns)
    assert processor.tiles(*image.size) == len(got)
    return len(got)


@pytest.mark.parametrize("name", ORACLES)
def test_pixel_values_of_all_sizes(tmp_path, name):
    oracle = ORACLES[name]()
    processor = ours(oracle, tmp_path)
    tiles = [check_image(oracle, processor, draw(*size)) for size in SIZES]
    assert (max(tiles) > 1) == (name not in ("whole", "not resized, whole", "smaller than a tile"))


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_as_in_transformers(tmp_path, name):
    oracle = ORACLES["tiles"]()
    check_image(oracle, ours(oracle, tmp_path), MODES[name]())


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ["dog.jpg", "pasta.jpeg"])
@pytest.mark.parametrize("oracle", LARGE)
def test_photos(tmp_path, name, oracle):
    oracle, photo = LARGE[oracle](), Image.open(test_data() / "images" / name)
    assert check_image(oracle, ours(oracle, tmp_path), photo) > 9


@pytest.mark.slow(2)
def test_no_side_becomes_longer_than_4096(tmp_path):
    oracle = Idefics3ImageProcessorPil(size={"longest_edge": 5000}, max_image_size={"longest_edge": 1024})
    for size in ((9, 1), (1, 9)):
        check_image(oracle, ours(oracle, tmp_path), draw(*size))


# Text


def test_marks_are_those_of_transformers():
    for rows, columns in ((0, 0), (1, 2), (3, 1), (4, 4)):
        words = dict(fake_token_around_image="<fake_token_around_image>", image_token="<image>")
        expected = get_image_prompt_string(rows, columns, 1, **words, global_image_token="<global-img>")
        assert marks(rows, columns) == expected


TEXTS = [
    "<image>",
    "hello <image> world",
    "a\n<image>\n\nb",
    "<image><image>  two",
    "x<image>y<image>\n",
    "Userr: <|im_start|><image><end_of_utterance>\nAssistant: yes",
]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_processor(text, split):
    tokenizer, _, processor = parts(split=split)
    images = [draw(40, 30), draw(20, 50, seed=1)][: text.count("<image>")]
    expected = smolvlm_processor(split)(text=text, images=images)["input_ids"][0]
    ids, places = processor.expand(tokenizer.encode(text), images, lambda image: image.size, tokenizer)
    assert ids == expected and len(places) == len(ids)
    tiles = sum(len(processor.cut(image)) for image in images)
    assert ids.count(processor.token_id) == tiles * TOKENS and (tiles > len(images)) == split


CHATS = {
    "one image": [user(image("a.png"), text("what is this?")), {"role": "assistant", "content": [text("a dog")]}],
    "two images": [
        user(text("compare"), image("a.png"), image("b.png")),
        {"role": "assistant", "content": [text("no")]},
        user(text("again: "), image("b.png"), text("?")),
        {"role": "assistant", "content": [text("yes")]},
    ],
    "no image": [user(text("hello")), {"role": "assistant", "content": [text("world")]}],
}


@pytest.fixture
def pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    draw(60, 36, seed=1).save(tmp_path / "a.png", exif=exif)
    draw(30, 60, seed=2).save(tmp_path / "b.png")
    return tmp_path


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_rows_against_the_processor(pictures, name, split):
    """Token ids and pixel values of whole chats; the answers are trained, and nothing that stands for an image."""
    tokenizer, template, processor = parts(split=split)
    files = ImageFiles(processor, "rows.jsonl", pictures)
    encoded = encode_row({"messages": CHATS[name]}, tokenizer, template, image_files=files)
    oracle = copy.deepcopy(CHATS[name])
    for part in (part for message in oracle for part in message["content"] if part["type"] == "image"):
        part["path"] = str(pictures / part["path"])
    expected = smolvlm_processor(split).apply_chat_template(
        oracle, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert encoded.input_ids == expected["input_ids"][0].tolist()
    trained = tokenizer.decode([t for t in encoded.targets if t != IGNORE_INDEX], skip_special_tokens=False)
    answers = [message["content"][0]["text"] for message in oracle if message["role"] == "assistant"]
    assert trained.split() == "".join(f" {answer}<end_of_utterance>" for answer in answers).split()
    assert not encoded.unended
    if encoded.images:
        pixels = torch.cat([load_image(pictures / file, processor) for file in encoded.images])
        torch.testing.assert_close(pixels, expected["pixel_values"][0], rtol=0, atol=1e-6)
        end = encoded.images_end
        assert encoded.input_ids[end - 1] == tokenizer.special_tokens["<fake_token_around_image>"]
        assert processor.token_id not in encoded.input_ids[end:]


def test_both_published_templates_write_the_same(pictures):
    """SmolVLM's knows only lists of parts and would lose a string; SmolVLM2's knows strings, too."""
    tokenizer, template, _ = parts()
    later = ChatTemplate(
        template.source.replace(
            "{% if message['content'][0]",
            "{% if message['content'] is string %}{{': ' + message['content']}}{% else %}{% if message['content'][0]",
        ).replace("{% endfor %}<end", "{% endfor %}{% endif %}<end"),
        "SmolVLM2",
        template.variables,
    )
    for messages in CHATS.values():
        strings = [m | ({"content": m["content"][0]["text"]} if m["role"] == "assistant" else {}) for m in messages]
        images = [m | {"content": [{"type": "image"} if "path" in p else p for p in m["content"]]} for m in messages]
        assert later.render(strings) == template.render(strings) == template.render(images)


def test_train_on_everything_leaves_all_out_that_stands_for_an_image(pictures):
    tokenizer, template, processor = parts()
    files = ImageFiles(processor, "rows.jsonl", pictures)
    row = {"messages": [user(text("hi"), image("a.png"), text("there")), {"role": "assistant", "content": "yes"}]}
    encoded = encode_row(row, tokenizer, template, train_on="all", image_files=files)
    trained = tokenizer.decode([t for t in encoded.targets if t != IGNORE_INDEX], skip_special_tokens=False)
    assert trained == "User: hithere<end_of_utterance>\nAssistant: yes<end_of_utterance>\n"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, behind the pixels", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_image_turned_upright(tmp_path, kind, orientation):
    exif, path = Image.Exif(), tmp_path / "a"
    exif[0x0112] = orientation
    draw(60, 36).save(path, kind[:4].strip(","), exif=exif)
    if "behind" in kind:
        content = path.read_bytes()
        start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    processor = parts()[2]
    size = check(path, processor)
    assert size == ((36, 60) if orientation >= 5 else (60, 36))
    tiles = len(load_image(path, processor))
    assert parts()[2].image_ids(*size, parts()[0]).count(processor.token_id) == tiles * TOKENS == 7 * TOKENS
    assert processor.grid(*size) == ((3, 2) if orientation >= 5 else (2, 3))


def test_datasets_count_tiles_and_never_cut_an_image(pictures):
    tokenizer, template, processor = parts()
    rows = [{"messages": CHATS["one image"]}, {"messages": CHATS["no image"]}, {"messages": CHATS["two images"]}]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(seq_len):
        return load_dataset(pictures / "rows.jsonl", tokenizer, template, seq_len=seq_len, image_processor=processor)

    dataset = load(None)
    assert dataset.report.lines()[1] == "4 images in 28 tiles of 4 tokens each among them"
    assert [len(dataset.pixel_values(i)) if i != 1 else dataset.pixel_values(i) for i in range(3)] == [7, None, 21]
    assert [Batches(dataset, batch_size=n).most_images for n in (1, 2, 3)] == [21, 28, 28]
    packs = dict(packing=True, seq_len=60)
    assert [Batches(dataset, batch_size=n, **packs).most_images for n in (1, 2)] == [15, 28]
    ids = dataset[0][0].tolist()
    end = len(ids) - ids[::-1].index(tokenizer.special_tokens["<fake_token_around_image>"])
    for seq_len in (end - 1, end, end + 1):
        report = load(seq_len).report
        assert (report.images_too_long, report.without_target_after_cut) == ((2, 0) if seq_len < end else (1, 1))
    for count in range(1, 4):  # a chat that is cut behind the first of its images, or the second …
        ids = dataset[2][0].tolist()
        at = [i for i, token in enumerate(ids) if token == processor.token_id][7 * TOKENS * count - 1]
        assert len(dataset.place_images(2, ids[: at + 1]).pixel_values) == 7 * count


def test_an_image_that_is_exchanged_later_is_named(pictures):
    tokenizer, _, processor = parts()
    files = ImageFiles(processor, "rows.jsonl", pictures)
    files.check("a.png")
    files.add(("a.png",), 3)
    assert len(files.decode(0)) == 7
    draw(90, 10).save(pictures / "a.png")
    with pytest.raises(ValueError, match="^rows.jsonl:3: image a.png: it is another one .* 4 tiles, expected 7"):
        files.decode(0)


# Configurations


SMOLVLM2 = {  # HuggingFaceTB/SmolVLM2-500M-Video-Instruct as published
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 512},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 2048},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
}
PUBLISHED = {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 4}
PUBLISHED |= {"vision_config": {"model_type": "smolvlm_vision", "image_size": 512, "patch_size": 16}}


def load(tmp_path, entries, processor=None, **settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    (tmp_path / "processor_config.json").write_text(json.dumps(processor or {"image_seq_len": 64}))
    return load_image_processor(tmp_path, PUBLISHED | settings)


def test_old_and_new_files(tmp_path):
    old = load(tmp_path, SMOLVLM2)
    assert (old.tokens, old.tile, old.longest, old.split, old.token_id) == (64, 512, 2048, True, 49190)
    assert load(tmp_path, {}, {"image_processor": SMOLVLM2, "image_seq_len": 64}) == old
    assert load(tmp_path, {key: value for key, value in SMOLVLM2.items() if key != "image_processor_type"}) == old
    assert load(tmp_path, SMOLVLM2 | {"image_processor_type": "Idefics3ImageProcessorFast"}) == old
    assert not load(tmp_path, SMOLVLM2 | {"do_image_splitting": False}).split
    defaults = load(tmp_path, {}, {"image_seq_len": 169}, vision_config={"patch_size": 14}, scale_factor=2)
    oracle = Idefics3ImageProcessorPil()
    assert (defaults.longest, defaults.tile) == (oracle.size["longest_edge"], oracle.max_image_size["longest_edge"])
    assert defaults.resample == oracle.resample and defaults.mean == tuple(oracle.image_mean)


@pytest.mark.parametrize(
    "entries, settings, expected",
    [
        ({"size": {"shortest_edge": 512}}, {}, 'size = {"shortest_edge": 512} is not supported'),
        ({"size": {"longest_edge": 0}}, {}, "size = "),
        ({"max_image_size": 512}, {}, "max_image_size = 512 is not supported"),
        ({"do_center_crop": True}, {}, "do_center_crop = true is not supported"),
        ({"resample": 99}, {}, "resample 99 is not a filter of Pillow's"),
        ({"max_image_size": {"longest_edge": 384}}, {}, "image_seq_len 64, but the model makes 36 features of a tile"),
        ({"max_image_size": {"longest_edge": 400}}, {}, "a tile of 400 pixels has 25 rows of patches"),
        ({}, {"model_type": "llava"}, "cuts images into tiles for idefics3, smolvlm, but the model is 'llava'"),
    ],
)
def test_what_is_not_implemented_is_named(tmp_path, entries, settings, expected):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, SMOLVLM2 | entries, **settings)
    assert expected in str(caught.value) and str(tmp_path) in str(caught.value)


def test_tokenizer_and_model_must_agree():
    tokenizer, _, processor = parts()
    processor.check_tokenizer(tokenizer)

    class Tokenizer:
        special_tokens = {"<image>": processor.token_id}

    with pytest.raises(ValueError, match="the tokenizer has no token <fake_token_around_image>"):
        processor.check_tokenizer(Tokenizer)


def test_decompression_bombs(monkeypatch):
    processor = parts()[2]
    processor.check_size(1, 200_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    processor.check_size(10, 3)
    with pytest.raises(ValueError, match="6 x 4 pixels, 48 x 32 when resized or padded: more than 1,535"):
        processor.check_size(6, 4)
