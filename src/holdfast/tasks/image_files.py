"""Image files become 8 bits a channel, as a viewer shows them: rotated, on white, with their brightness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from holdfast.errors import HoldfastError
from holdfast.tasks.arrays import Array
from holdfast.tasks.audio import SECOND, read_wav

SOUND = ".wav"

_NOT_OPENED = ("MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS")
"""Formats that Pillow recognises but cannot read."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_DEPTHS = (8, 10, 12, 14, 16)
_BAD = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """Endings of the files that are read, in lower case: all that Pillow opens, and sounds, which become images.

    Example:
        >>> {".png", ".jpeg", ".ppm", ".pgm", ".webp", ".wav"} <= suffixes()
        True
    """
    Image.init()
    known = Image.registered_extensions().items()
    opened = {*Image.OPEN, "MPO"} - {*_NOT_OPENED}  # an MPO file is opened as a JPEG and is not registered by itself
    return frozenset({e.lower() for e, f in known if f in opened} | {SOUND})


@dataclass(frozen=True)
class Stored:
    """An image file that is a cell of a table.

    Attributes:
        name: of the cell, for messages.
        data: the bytes of the file.
    """

    suffix: ClassVar[str] = ""
    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def _opened(file: Path | Stored) -> Image.Image:
    return Image.open(BytesIO(file.data) if isinstance(file, Stored) else file)


class Opener:
    """Opens the image files of one data set, all in the same way, and counts the conversions.

    Args:
        mode: of Pillow, "L" or "RGB".
        files: all that will be opened; images of 16 bits are scaled by the largest value in all of them.

    Raises:
        HoldfastError: if a file cannot be opened.
    """

    def __init__(self, mode: str, files: Sequence[Path | Stored]) -> None:
        self.mode = mode
        self.counted: Counter[str] = Counter()
        self._depth = _depth(files)

    def open(self, file: Path | Stored) -> Image.Image:
        """Returns one image.

        Raises:
            HoldfastError: if it cannot be opened, or the range of its pixels is unknown.
        """
        if isinstance(file, Path) and file.suffix.lower() == SOUND:
            spectrogram, seconds = read_wav(file)
            if seconds > SECOND:
                self.counted[f"sounds longer than {SECOND:.2f} s, cut off"] += 1
            elif seconds < SECOND:
                self.counted[f"sounds shorter than {SECOND:.2f} s, filled up with silence"] += 1
            return Image.fromarray(spectrogram).convert(self.mode)
        try:
            with _opened(file) as image:
                return self.converted(image, repr(str(file)))
        except HoldfastError:
            raise
        except _BAD as error:
            raise HoldfastError(f"{str(file)!r} cannot be opened as an image: {error}.") from error

    def converted(self, image: Image.Image, what: str) -> Image.Image:
        """Returns an image in the opener's mode; `what` names it in messages."""
        if getattr(image, "n_frames", 1) > 1:
            self.counted["images with several frames or pages: the first was taken"] += 1
        source, deep = image, _is_deep_colour(image)
        if image.getexif().get(_ORIENTATION) in range(2, 9):
            self.counted["images turned as their EXIF orientation says"] += 1
            source = ImageOps.exif_transpose(image)
        if deep:
            self.counted["colour images of 16 bits a channel: the upper 8 were taken"] += 1
        if source.mode.startswith("I;16") or (source.mode == "I" and image.format == "PPM"):
            return self._scaled(source).convert(self.mode)
        if source.mode in ("I", "F"):
            raise HoldfastError(
                f"{what} has pixels of 32 bits, whose range is unknown; convert it to 8 or 16 bits a channel."
            )
        if source.has_transparency_data:
            source = self._on_white(source)
        elif source.mode not in ("L", "RGB", "P"):
            self.counted[f"images of mode {source.mode}, converted"] += 1
        return source.convert(self.mode)

    def _on_white(self, image: Image.Image) -> Image.Image:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() == (255, 255):
            return rgba.convert("RGB")
        self.counted["images with transparent pixels, put on white"] += 1
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")

    def _scaled(self, image: Image.Image) -> Image.Image:
        """Scales 16-bit grey to 8 bits; Pillow's own conversion would clip at 255."""
        bits = 16 if image.mode == "I" else self._depth  # Pillow has already scaled a .pgm
        self.counted[f"grey images of {bits} bits, scaled to 8"] += 1
        pixels = np.asarray(image)
        values = np.round(pixels.astype(np.float64) * (255 / (2**bits - 1))).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int) and (pixels == clear).any():
            self.counted["images with transparent pixels, put on white"] += 1
            values[pixels == clear] = 255
        return Image.fromarray(values)

    def notes(self) -> list[str]:
        """Returns the conversions with their counts."""
        return [f"{count} {what}" for what, count in self.counted.items()]


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether a PNG or TIFF has 16 bits a channel where Pillow gives 8."""
    if isinstance(image, TiffImageFile) and image.mode in ("RGB", "RGBA", "RGBX", "LA", "CMYK"):
        return bool(max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8)
    file = getattr(image, "fp", None)
    if image.format != "PNG" or image.mode.startswith("I") or file is None:
        return False
    position = file.tell()
    file.seek(24)  # after 8 bytes of signature, 8 of the header's length and name, 8 of width and height
    depth = file.read(1)
    file.seek(position)
    return bool(depth == b"\x10")


def _depth(files: Sequence[Path | Stored]) -> int:
    """How many of 16 bits the grey images use; cameras and scanners often use 12."""
    top, deepest = -1, -1
    shallow: Path | Stored | None = None
    for file in files:
        if file.suffix.lower() in (".jpg", ".jpeg", ".gif", ".bmp", ".webp", SOUND):
            continue
        try:
            with _opened(file) as image:
                if image.mode.startswith("I;16"):
                    top = max(top, int(np.asarray(image).max()))
                elif _is_deep_colour(image):
                    shallow = file
                    deepest = max(deepest, int(np.asarray(image.convert("RGB")).max()))
        except _BAD as error:
            raise HoldfastError(f"{str(file)!r} cannot be opened as an image: {error}.") from error
    if 0 < deepest < 64:  # black images do not show the depth
        raise HoldfastError(
            f"{str(shallow)!r} and the other images of 16 bits a channel use at most 14 of them, and would be almost "
            "black; scale them to 8 bits."
        )
    return next(bits for bits in _DEPTHS if top < 2**bits)


def stack(labelled: Iterable[tuple[str, Image.Image, int]], size: int | None) -> tuple[Array, Array]:
    """Puts images of one mode into one array.

    Args:
        labelled: the name of each image in messages, the image, and its label.
        size: pixels a side that every image is resized to (bicubic); None: they must already be equal.

    Raises:
        HoldfastError: if sizes differ and no `size` is given.
    """
    images: list[Array] = []
    labels: list[int] = []
    for what, image, label in labelled:
        pixels = np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BICUBIC))
        if images and pixels.shape != images[0].shape:
            high, wide = images[0].shape[:2]
            raise HoldfastError(
                f"{what} is {image.width}x{image.height} and others are {wide}x{high}; give image_size to resize all."
            )
        images.append(pixels)
        labels.append(label)
    return np.stack(images), np.array(labels)
