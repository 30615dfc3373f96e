"""The image files that the rows of a data file name: which of them are opened, and what is wrong with the others.

Rows are untrusted. So only files under one folder are opened, the data file's own or the one the user names; no
`..`, no link and no absolute path leads out of it, and nothing is downloaded. Only formats that Pillow decodes
by itself are read (for EPS it would start Ghostscript).
"""

import hashlib
import os
import struct
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.images.processor import BadImage, ImageProcessor
from data.json_rows import shown

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
TAIL = 64  # bytes at the end of a JPEG that are searched for the marker after the last scan

# Twice as many pixels are an error in Pillow anyway; `ImageProcessor.check_size` makes this one, too.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@dataclass
class ImageFiles:
    """The images of a dataset's examples, in order: example i has numbers [offsets[i], offsets[i + 1])."""

    processor: ImageProcessor
    data_file: str
    root: Path
    names: list[str] = field(default_factory=list)
    """As the rows have them."""
    lines: list[int] = field(default_factory=list)
    """Of the data file, for the error messages."""
    offsets: list[int] = field(default_factory=lambda: [0])
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of every file that has been looked at."""
    pixels: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Its (width, height), upright."""

    def check(self, name: str) -> tuple[int, int]:
        """Width and height of an image, upright. Raises BadImage if the file is missing or broken, ValueError if it
        may not be opened."""
        if name not in self.sizes:
            try:
                path = resolve(name, self.root)
                self.pixels[name] = check(path, self.processor)
            except ValueError as error:
                raise type(error)(f"image {_shown(name)}: {error}") from None
            self.sizes[name] = path.stat().st_size
        return self.pixels[name]

    def add(self, names: tuple[str, ...], line: int) -> None:
        """The images of one more example, which may be none."""
        self.names += names
        self.lines += [line] * len(names)
        self.offsets.append(len(self.names))

    def of(self, example: int) -> range:
        return range(self.offsets[example], self.offsets[example + 1])

    def tiles_of(self, example: int) -> int:
        return sum(self.processor.tiles(*self.pixels[self.names[number]]) for number in self.of(example))

    def decode(self, number: int) -> Tensor:
        """[tiles, 3, H, W] uint8, not yet normalised. Raises ValueError with FILE:LINE."""
        name = self.names[number]
        try:
            tiles = decode(resolve(name, self.root), self.processor)
            if len(tiles) != (expected := self.processor.tiles(*self.pixels[name])):
                raise BadImage(f"it is another one than when the run began: {len(tiles)} tiles, expected {expected}")
            return tiles
        except ValueError as error:
            place = f"{self.data_file}:{self.lines[number]}"
            raise ValueError(f"{place}: image {_shown(name)}: {error}") from None

    def digest(self) -> bytes:
        """A hash of what determines the pixel values; files are represented by their names and sizes."""
        files = [(name, self.sizes[name]) for name in self.names]
        return hashlib.sha256(repr((self.processor, files, self.offsets)).encode("utf-8", "surrogatepass")).digest()


def resolve(name: str, root: Path) -> Path:
    """The file that a row calls `name`. Raises ValueError unless it lies under `root`."""
    if "://" in name or name.startswith("data:"):
        raise ValueError("it is a URL; only files are read, nothing is downloaded")
    fix = "move it there, or name another folder with --image-root"
    if ".." in Path(name).parts:
        raise ValueError(f"'..' may lead out of {root}; {fix}")
    try:
        inside = root.resolve()
        path = (inside / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL character; a loop of links
        raise BadImage(f"it is no file name: {error}") from None
    if not path.is_relative_to(inside):
        raise ValueError(f"it lies outside of {root}; {fix}")
    return path


def check(path: Path, processor: ImageProcessor) -> tuple[int, int]:
    """Width and height of an image, upright. Raises BadImage if the file is missing, not an image, a decompression
    bomb or incomplete.

    Cheap, without decoding where the format has another way to tell that the file is complete.
    """
    with _open(path) as image:
        processor.check_size(*image.size)
        complete = _looks_complete(image, path)
        if not complete:
            _run(image.load)
        # The base class's: that of a PNG would decode it, which is needed only where `_looks_complete` says so.
        exif = _run(Image.Image.getexif, image)
        if complete:
            _run(image.verify)
        return image.size[::-1] if exif.get(0x0112) in (5, 6, 7, 8) else image.size


def decode(path: Path, processor: ImageProcessor) -> Tensor:
    """[tiles, 3, H, W] uint8, not yet normalised. Raises BadImage."""
    with _open(path) as image:
        processor.check_size(*image.size)
        return _run(processor.cut, image)


def load_image(path: str | Path, processor: ImageProcessor) -> Tensor:
    """Pixel values [tiles, 3, H, W] float32 of one file in any folder, for an image that the user names."""
    try:
        return processor.normalize(decode(Path(path), processor))
    except BadImage as error:
        raise ValueError(f"image {path}: {error}") from None


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def _open(path: Path) -> Image.Image:
    try:
        if not path.exists():
            raise BadImage("there is no such file")
        if not path.is_file():
            raise BadImage("it is not a file")
        return Image.open(path, formats=_formats())
    except UnidentifiedImageError:
        raise BadImage(f"it is not an image (known are {', '.join(_formats())})") from None
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: {error}") from None
    except (SyntaxError, ValueError) as error:
        raise error if isinstance(error, BadImage) else BadImage(f"broken: {error}") from None


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow may be built without some


def _run(work, *arguments):
    """Pillow's work on an untrusted file, which may fail in any way."""
    try:
        return work(*arguments)
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(f"broken: {str(error) or type(error).__name__}") from None


def _looks_complete(image: Image.Image, path: Path) -> bool:
    """Whether the header and `verify` will do. It reads a PNG to its end, but of other formats little more than the
    header."""
    with open(path, "rb") as file:
        if image.format == "PNG":
            return not _metadata_after_pixels(file)
        size = os.fstat(file.fileno()).st_size
        if image.format == "WEBP":  # RIFF: the length of what follows these 8 bytes
            return size >= 8 + struct.unpack("<4xI", file.read(8))[0]
        if image.format in ("JPEG", "MPO"):
            file.seek(max(0, size - TAIL))
            return b"\xff\xd9" in file.read()
    return False


def _metadata_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has metadata after its pixels, which may hold the orientation."""
    file.seek(8)
    pixels = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        pixels = pixels or kind == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)  # the checksum, too
    return False
