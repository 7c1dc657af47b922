"""A folder of images, one folder a class: `ROOT/CLASS/*.png`, or `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*`.

Many data sets have a third folder with images for validation. It is left alone where there is one for testing, and is
tested on where there is none, as in ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.model_selection import train_test_split

from holdfast.errors import HoldfastError
from holdfast.tasks.arrays import Array, ArrayTask
from holdfast.tasks.audio import read_wav

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".wav"}
"""Of images, and of sounds, which become images: see `holdfast.tasks.audio`."""

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Where images for testing are, beside a folder `train`; the first that is there."""


def load_folder(
    path: Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
    limits: tuple[int | None, int | None] = (None, None),
    kind: type[ArrayTask] = ArrayTask,
) -> ArrayTask:
    """Reads an image folder into memory.

    Args:
        path: the root; classes are its sub-folders, sorted by name. With sub-folders `train` and `test` (or, without
            it, `val`, `valid` or `validation`) these are the splits, else `test_fraction` of every class is drawn by
            `seed`.
        image_size: pixels a side that every image is resized to (bicubic); None: they must already be equal.
        channels: 1 for grey, 3 for colour; None: 3, or 1 for a folder of sounds.
        test_fraction: share of the images to test on, in (0, 1).
        seed: of the split, and of what `limits` keep.
        limits: about how many images to read for training and for testing, the same share of every class; where the
            folder has no splits, all are read. None: all.
        kind: of the task; if it needs no labels, images may also lie in the root (or in `train` and `test`) itself.

    Raises:
        HoldfastError: if a folder is empty, an image cannot be opened, or sizes differ and no `image_size` is given.
    """
    sounds = channels is None and next(path.rglob("*.wav"), None) is not None
    mode = "L" if channels == 1 or sounds else "RGB"
    held = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if (path / "train").is_dir() and held is not None:
        names = _classes(path / "train", kind.labelled)
        strange = sorted(set(_classes(held, kind.labelled)) - set(names))
        if strange:
            raise HoldfastError(f"{str(path)!r}: {held.name} has a class {strange[0]!r} that train does not have.")
        x_train, y_train = _read(path / "train", names, image_size, mode, limits[0], seed)
        x_test, y_test = _read(held, names, image_size, mode, limits[1], seed)
        return kind(path.name, x_train, y_train, x_test, y_test, names)
    names = _classes(path, kind.labelled)
    x, y = _read(path, names, image_size, mode)
    try:
        train, test = train_test_split(np.arange(len(y)), test_size=test_fraction, random_state=seed, stratify=y)
    except ValueError as error:
        raise HoldfastError(f"{str(path)!r} cannot be split into train and test: {error}") from error
    return kind(path.name, x[train], y[train], x[test], y[test], names)


def _classes(path: Path, labelled: bool) -> list[str]:
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names and not labelled and _files(path):
        return ["."]
    if not names:
        wanted = "one folder of images a class" if labelled else f"images ({', '.join(sorted(SUFFIXES))}), or folders"
        raise HoldfastError(
            f"{str(path)!r} has no sub-folders{'' if labelled else ' and no images'}; expected {wanted}."
        )
    return names


def _eight_bits(image: Image.Image, file: Path) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion would cut everything above 255 off."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise HoldfastError(
            f"{str(file)!r} has pixels of 32 bits, whose range is not known; convert it to 8 or 16 bits a channel."
        )
    return image


def _read(
    path: Path, names: list[str], size: int | None, mode: str, limit: int | None = None, seed: int = 0
) -> tuple[Array, Array]:
    files = [_files(path / name) for name in names]
    total = sum(map(len, files))
    if not total:
        raise HoldfastError(f"{str(path)!r}: no images in its class folders ({', '.join(sorted(SUFFIXES))}).")
    if limit is not None and limit < total:  # of ImageNet, nobody reads everything to keep a part
        files = [_some(each, limit / total, seed) for each in files]
    return stack(((repr(str(f)), _open(f, mode), label) for label, each in enumerate(files) for f in each), size)


def _some(files: list[Path], share: float, seed: int) -> list[Path]:
    count = max(1, round(share * len(files)))
    return [files[i] for i in sorted(np.random.default_rng(seed).permutation(len(files))[:count])]


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES)


def _open(file: Path, mode: str) -> Image.Image:
    if file.suffix.lower() == ".wav":
        return Image.fromarray(read_wav(file)).convert(mode)
    try:
        with Image.open(file) as image:
            return _eight_bits(image, file).convert(mode)
    except HoldfastError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HoldfastError(f"{str(file)!r} cannot be opened as an image: {error}.") from error


def stack(labelled: Iterable[tuple[str, Image.Image, int]], size: int | None) -> tuple[Array, Array]:
    """Puts images of one mode into one array.

    Args:
        labelled: what each image is called in messages, the image, and its label.
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
