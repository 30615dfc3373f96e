"""Which image files are opened, and what is said about the others."""

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.images.files import BadImage, ImageFiles, check, load_image, resolve
from tests.data.images.tiny_vision import draw, parts

_, _, PROCESSOR = parts()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    draw(300, 200).save(file, kind, **options)
    return file.getvalue()


# Paths


@pytest.fixture
def tree(tmp_path):
    """inside/ with pictures and links; outside/ with a picture that no row may open."""
    (tmp_path / "inside" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    draw().save(tmp_path / "inside" / "sub" / "a.png")
    draw().save(tmp_path / "outside" / "secret.png")
    (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tmp_path / "inside" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "good.png").symlink_to("sub/a.png")
    (tmp_path / "inside" / "loop.png").symlink_to("loop.png")
    (tmp_path / "linked").symlink_to(tmp_path / "inside")
    return tmp_path


def test_paths_inside(tree, monkeypatch):
    a = (tree / "inside" / "sub" / "a.png").resolve()
    for name in ("sub/a.png", "./sub//a.png", "good.png", str(tree / "inside" / "sub" / "a.png"), str(a)):
        assert resolve(name, tree / "inside") == a
        assert resolve(name, tree / "linked") == a  # the folder itself may be a link
    monkeypatch.chdir(tree / "inside" / "sub")
    assert resolve("a.png", Path()) == a


@pytest.mark.parametrize(
    "name, expected",
    [
        ("../outside/secret.png", "'..' may lead out of"),
        ("sub/../sub/a.png", "'..' may lead out of"),
        ("/etc/passwd", "it lies outside of"),
        ("{tree}/outside/secret.png", "it lies outside of"),
        ("link.png", "it lies outside of"),
        ("folder/secret.png", "it lies outside of"),
        ("http://example.com/a.png", "it is a URL; only files are read"),
        ("https://example.com/a.png", "it is a URL; only files are read"),
        ("ftp://example.com/a.png", "it is a URL"),
        ("data:image/png;base64,aGk=", "it is a URL"),
    ],
)
def test_hostile_paths_are_an_error_that_nobody_skips(tree, name, expected):
    files = ImageFiles(PROCESSOR, "rows.jsonl", tree / "inside")
    name = name.format(tree=tree)
    with pytest.raises(ValueError, match=expected) as caught:
        files.check(name)
    assert not isinstance(caught.value, BadImage) and name in str(caught.value)


def test_a_link_that_is_turned_outwards_later_is_not_followed(tree):
    files = ImageFiles(PROCESSOR, "rows.jsonl", tree / "inside")
    files.check("good.png")
    files.add(("good.png",), 7)
    assert files.decode(0).shape == (1, 3, 28, 28)
    (tree / "inside" / "good.png").unlink()
    (tree / "inside" / "good.png").symlink_to(tree / "outside" / "secret.png")
    with pytest.raises(ValueError, match="^rows.jsonl:7: image good.png: it lies outside of"):
        files.decode(0)


def test_a_long_or_unprintable_name_is_shortened(tree):
    files = ImageFiles(PROCESSOR, "rows.jsonl", tree / "inside")
    for name in ("x" * 5000 + ".png", "data:" + "A" * 100_000, "a\nb.png", "a\0b.png", "\ud83d.png"):
        with pytest.raises(ValueError) as caught:
            files.check(name)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


# Contents


def bad(tmp_path, content: bytes | None, expected: str, name: str = "a.jpg"):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        check(path, PROCESSOR)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_unreadable(tmp_path):
    bad(tmp_path, None, "there is no such file")
    bad(tmp_path, b"", "it is not an image (known are JPEG, PNG")
    bad(tmp_path, b"<svg></svg>", "it is not an image")
    (tmp_path / "folder.png").mkdir()
    bad(tmp_path, None, "it is not a file", "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    bad(tmp_path, None, "it is not a file", "pipe.png")  # opening it would wait for ever


def test_programs_are_not_started(tmp_path):
    """Pillow hands EPS to Ghostscript."""
    eps = io.BytesIO()
    draw().save(eps, "EPS")
    assert Image.open(io.BytesIO(eps.getvalue())).format == "EPS"
    bad(tmp_path, eps.getvalue(), "it is not an image", "a.eps")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_found_without_training(tmp_path, kind):
    content = encoded(kind)
    (tmp_path / "whole").write_bytes(content)
    check(tmp_path / "whole", PROCESSOR)
    assert load_image(tmp_path / "whole", PROCESSOR).shape == (1, 3, 28, 28)
    for share in (0.2, 0.5, 0.98):
        bad(tmp_path, content[: int(len(content) * share)], "", "cut")
        with pytest.raises(ValueError, match="image .*cut: "):
            load_image(tmp_path / "cut", PROCESSOR)


def test_a_truncated_photo_with_a_thumbnail(tmp_path):
    """A thumbnail ends as its photo does, only earlier."""
    exif = Image.Exif()
    exif[0x010E] = "\u00ff"
    thumbnail = encoded("JPEG", quality=5)
    content = encoded("JPEG", exif=b"Exif\0\0" + thumbnail)
    assert content.count(b"\xff\xd9") == 2
    bad(tmp_path, content[: int(len(content) * 0.9)], "broken: ")
    (tmp_path / "trailer.jpg").write_bytes(content + b"a film" * 1000)  # what phones append
    check(tmp_path / "trailer.jpg", PROCESSOR)


def test_whole_jpegs_and_pngs_are_not_decoded(tmp_path, monkeypatch):
    for kind in ("JPEG", "PNG"):
        (tmp_path / kind).write_bytes(encoded(kind))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for kind in ("JPEG", "PNG"):
        check(tmp_path / kind, PROCESSOR)


def test_a_flipped_bit_in_a_png(tmp_path):
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 1
    bad(tmp_path, bytes(content), "broken: ", "a.png")


def test_decompression_bombs(tmp_path, monkeypatch, recwarn):
    bad(tmp_path, png_header(60_000, 60_000), "decompression bomb", "bomb.png")
    bad(tmp_path, png_header(10_000, 10_000), "10000 x 10000 pixels: more than 89,478,485, as a decompression bomb has")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    bad(tmp_path, encoded("PNG"), "decompression bomb", "a.png")
    draw(50, 41).save(tmp_path / "b.png")  # between once and twice the limit, where Pillow only warns
    bad(tmp_path, None, "50 x 41 pixels: more than 2,000", "b.png")
    with pytest.raises(ValueError, match="b.png: 50 x 41 pixels: more than 2,000"):
        load_image(tmp_path / "b.png", PROCESSOR)
    draw(50, 40).save(tmp_path / "b.png")
    check(tmp_path / "b.png", PROCESSOR)


def test_bombs_that_go_off_when_resized_or_padded(tmp_path):
    draw(1, 200_000).save(tmp_path / "thread.png")
    bad(tmp_path, None, "1 x 200000 pixels, 28 x 5600000 when resized or padded: more than", "thread.png")
    padded = replace(PROCESSOR, background=(1, 2, 3))
    draw(1, 20_000).save(tmp_path / "thread.png")
    check(tmp_path / "thread.png", PROCESSOR)
    with pytest.raises(BadImage, match="20000 x 20000 when resized or padded"):
        check(tmp_path / "thread.png", padded)


def test_what_breaks_only_in_decoding_says_where(tmp_path):
    draw().save(tmp_path / "a.png")
    files = ImageFiles(PROCESSOR, "rows.jsonl", tmp_path)
    files.check("a.png")
    files.add((), 3)
    files.add(("a.png", "a.png"), 4)
    assert list(files.of(0)) == [] and list(files.of(1)) == [0, 1]
    assert files.decode(1).dtype == torch.uint8
    (tmp_path / "a.png").write_bytes(encoded("JPEG")[:3000])
    with pytest.raises(ValueError, match="^rows.jsonl:4: image a.png: broken: image file is truncated"):
        files.decode(1)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="^rows.jsonl:4: image a.png: there is no such file"):
        files.decode(0)
