"""Data sets that torchvision, or Hugging Face's `datasets`, downloads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from holdfast.errors import HoldfastError
from holdfast.tasks.arrays import Array
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.image_files import Opener, stack
from holdfast.tasks.paths import cache_folder
from holdfast.tasks.text import TextTask, text_task
from holdfast.tasks.tokenizers import Tokenizer

_Arguments = dict[str, Any]
_BY_FLAG: tuple[_Arguments, _Arguments] = ({"train": True}, {"train": False})
_BY_WORD: tuple[_Arguments, _Arguments] = ({"split": "train"}, {"split": "test"})
TORCHVISION: dict[str, tuple[str, tuple[_Arguments, _Arguments]]] = {
    "mnist": ("MNIST", _BY_FLAG),
    "fashion_mnist": ("FashionMNIST", _BY_FLAG),
    "kmnist": ("KMNIST", _BY_FLAG),
    "usps": ("USPS", _BY_FLAG),
    "cifar10": ("CIFAR10", _BY_FLAG),
    "cifar100": ("CIFAR100", _BY_FLAG),
    "svhn": ("SVHN", _BY_WORD),
    "stl10": ("STL10", _BY_WORD),
    "imagenette": ("Imagenette", ({"split": "train"}, {"split": "val"})),
    "celeba": ("CelebA", _BY_WORD),
    "stanford_cars": ("StanfordCars", _BY_WORD),
    "country211": ("Country211", _BY_WORD),
}
"""Class in torchvision.datasets, and its arguments for the training and the test split."""

HUGGING_FACE: dict[str, tuple[str, str]] = {"cinic10": ("flwrlabs/cinic10", "8e3c2c337e520de86f32a669bb7dcc9662930502")}
"""Name and commit on the Hub of data sets with the splits `train` and `test` and the columns `image` and `label`."""

DOWNLOADS = (*TORCHVISION, *HUGGING_FACE)
"""Names that `download` takes."""


class TextSource(NamedTuple):
    """A data set of sentences on the Hugging Face Hub."""

    repository: str
    revision: str
    text: str = "text"
    label: str = "label"
    test: str = "test"


TEXTS: dict[str, TextSource] = {
    "ag_news": TextSource("fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4"),
    # The labels of its test split were never published.
    "sst2": TextSource(
        "stanfordnlp/sst2", "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb", text="sentence", test="validation"
    ),
    # A copy of CogComp/trec, which needs a script; Holdfast runs no scripts.
    "trec": TextSource("SetFit/TREC-QC", "0a34640b3cac3affef6f0abdfb81e3d0ecffcf92", label="label_coarse_original"),
    "imdb": TextSource("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"),
}
"""Names that `download_text` takes."""


def download(
    name: str, folder: Path | None, *, image_size: int | None = None, channels: int | None = None
) -> ArrayTask:
    """Loads a data set, which is downloaded on first use.

    Args:
        name: one of `DOWNLOADS`.
        folder: the data folder, in which downloads are kept; None: `~/.cache/holdfast`.
        image_size: pixels a side, if images are files; None: they must have one size.
        channels: 1 for grey, if images are files; otherwise they are in colour.

    Raises:
        HoldfastError: if it cannot be loaded; the message names an alternative.
    """
    root, data_folder = _folders(folder)
    instead = f"put {name}.npz, or a folder {name}/ of images in train/CLASS/ and test/CLASS/, into {data_folder}"
    mode = "L" if channels == 1 else "RGB"
    if name in HUGGING_FACE:
        return _hugging_face(name, root / "huggingface", image_size, mode, instead)
    return _torchvision(name, root / "torchvision", image_size, mode, instead)


def _folders(folder: Path | None) -> tuple[Path, str]:
    """The folder for downloads, and the data folder in messages."""
    named = repr(str(folder)) if folder else "a folder named by --data-dir or $HOLDFAST_DATA"
    return cache_folder(folder), named


def download_text(name: str, folder: Path | None, *, tokenizer: Tokenizer, length: int) -> TextTask:
    """Loads a data set of sentences, which is downloaded on first use.

    Args:
        name: one of `TEXTS`.
        folder: the data folder, in which downloads are kept; None: `~/.cache/holdfast`.
        tokenizer: makes the ids.
        length: tokens a sentence.

    Raises:
        HoldfastError: if it cannot be loaded; the message names an alternative.
    """
    source = TEXTS[name]
    root, data_folder = _folders(folder)
    instead = f"put {name}.parquet or {name}.csv, with the columns split, label and text, into {data_folder}"
    parts = _hugging_face_parts(
        name, source.repository, source.revision, ["train", source.test], root / "huggingface", instead
    )
    numbered = getattr(parts[0].features[source.label], "names", None)
    names = numbered or sorted({str(label) for label in parts[0][source.label]})
    train, test = (
        (list(part[source.text]), [int(v) if numbered else names.index(str(v)) for v in part[source.label]])
        for part in parts
    )
    task = text_task(name, train, test, names, tokenizer=tokenizer, length=length)
    return task.noted(f"{source.repository}, downloaded by datasets")


def _torchvision(name: str, root: Path, size: int | None, mode: str, instead: str) -> ArrayTask:
    from torchvision import datasets

    kind, splits = TORCHVISION[name]
    more: _Arguments = _imagenette_size(size) if name == "imagenette" else {}
    if name == "celeba":
        more["target_transform"] = lambda attributes: int(attributes[SMILING])
    fetched = name not in NOT_FETCHED
    try:
        parts = [getattr(datasets, kind)(root=str(root), download=fetched, **split, **more) for split in splits]
    except (OSError, RuntimeError) as error:
        why = (
            f"torchvision could not download it ({_one_line(error)}). Check the network, or {instead}"
            if fetched
            else f"torchvision can no longer download its archive; unpack yours into {str(root)!r} as described in "
            f"torchvision.datasets.{kind}, or {instead}"
        )
        raise HoldfastError(f"Task {name!r}: {why}.") from error
    opener = Opener(mode, ())
    arrays = [_arrays(part) if hasattr(part, "data") else stack(_converted(name, part, opener), size) for part in parts]
    classes = ("not smiling", "smiling") if name == "celeba" else getattr(parts[0], "classes", ())
    names = [c if isinstance(c, str) else c[0] for c in classes]
    (x_train, y_train), (x_test, y_test) = arrays
    task = ArrayTask(name, x_train, y_train, x_test, y_test, names or None)
    return task.noted(f"torchvision.datasets.{kind}", *opener.notes())


NOT_FETCHED = frozenset({"stanford_cars"})
"""Data sets that torchvision can no longer download, but reads from the disk."""

SMILING = 31
"""Index of the one of CelebA's 40 attributes that is its label; denoising uses no label."""


def _arrays(part: Any) -> tuple[Array, Array]:
    """Images and labels of a data set of torchvision in memory, with channels last."""
    x = np.asarray(part.data)
    y = np.asarray(part.targets if hasattr(part, "targets") else part.labels)
    return np.moveaxis(x, 1, -1) if x.ndim == 4 and x.shape[1] == 3 else x, y


def _imagenette_size(image_size: int | None) -> _Arguments:
    """The smallest of Imagenette's three archives whose images have at least this many pixels a side."""
    if image_size is None:
        raise HoldfastError("Task 'imagenette': its images differ in size; set one, as in imagenette@image_size=64.")
    return {"size": "160px" if image_size <= 160 else "320px" if image_size <= 320 else "full"}


def _hugging_face_parts(
    name: str, repository: str, revision: str, splits: list[str], root: Path, instead: str
) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HoldfastError(
            f"Task {name!r} is downloaded by Hugging Face's datasets, which is not installed: "
            f'pip install "holdfast[data]", or {instead}.'
        ) from error
    try:
        return list(load_dataset(repository, revision=revision, split=splits, cache_dir=str(root)))
    except Exception as error:  # a network, the Hub, a cache and a file format raise different exceptions
        raise HoldfastError(
            f"Task {name!r}: datasets could not download {repository} ({_one_line(error)}). Check the network, "
            f"or {instead}."
        ) from error


def _hugging_face(name: str, root: Path, size: int | None, mode: str, instead: str) -> ArrayTask:
    parts = _hugging_face_parts(name, *HUGGING_FACE[name], ["train", "test"], root, instead)
    opener = Opener(mode, ())
    (x_train, y_train), (x_test, y_test) = (
        stack(_converted(name, ((row["image"], row["label"]) for row in part), opener), size) for part in parts
    )
    task = ArrayTask(name, x_train, y_train, x_test, y_test, parts[0].features["label"].names)
    return task.noted(f"{HUGGING_FACE[name][0]}, downloaded by datasets", *opener.notes())


def _converted(
    name: str, labelled: Iterable[tuple[Image.Image, int]], opener: Opener
) -> Iterator[tuple[str, Image.Image, int]]:
    for i, (image, label) in enumerate(labelled):
        yield f"image {i} of {name}", opener.converted(image, f"image {i} of {name}"), label


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
