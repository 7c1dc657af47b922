"""A folder of images, one folder a class: `ROOT/CLASS/*.png`, or `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*`.

Many data sets have a third folder with images for validation. It is used for testing if there is no test folder, as in
ImageNet, and left out otherwise. `holdfast.tasks.image_files` reads the files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from holdfast.errors import HoldfastError
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.image_files import SOUND, Opener, stack, suffixes
from holdfast.tasks.splits import draw_rows

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation", "dev")
"""Names of the folders of the splits, in any case; the first of `TEST_FOLDERS` that exists is used."""

_LIKE_SPLITS = re.compile(r"train|trn|test|tst|(?<![a-z])(val|valid|validation|dev|eval|holdout)(?![a-z])")

JUNK_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
JUNK_FILES = ("thumbs.db", "desktop.ini", "icon\r")


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

    Files may be at any depth in the class folders. Hidden folders, those of systems and archives, and those without
    images are not classes. The task's notes count the files that were left out or converted.

    Args:
        path: the root; classes are its sub-folders, sorted by name. Sub-folders `train` and `test` (see `TRAIN_FOLDERS`
            and `TEST_FOLDERS`) are the splits; without them, `test_fraction` of every class is drawn by `seed`.
        image_size: pixels a side that every image is resized to (bicubic); None: they must already be equal.
        channels: 1 for grey, 3 for colour; None: 3, or 1 for a folder of sounds.
        test_fraction: share of the images to test on, in (0, 1).
        seed: of the split, and of the images that `limits` keep.
        limits: about how many images to read for training and for testing, the same share of every class; None: all.
            Without splits in the folder, all are read.
        kind: of the task; if it needs no labels, images may also be in the root (or in `train` and `test`) itself.

    Raises:
        HoldfastError: if a folder is empty, an image cannot be opened, sizes differ and no `image_size` is given, or
            the folders are ambiguous.
    """
    notes: list[str] = []
    splits = split_folders(path, kind.labelled, notes)
    parts = [_Classes(folder, kind.labelled, notes) for folder in (splits or {"all": path}).values()]
    names = list(parts[0].files)
    if splits is not None:
        _check_same(path, *parts)
        if untested := [n for n in names if n not in parts[1].files]:
            notes.append(f"{len(untested)} classes have no test images: {_some_of(untested)}")
    else:
        limits = (None, None)
    kept = [part.kept(names, limit, seed) for part, limit in zip(parts, limits, strict=False)]
    every = [file for part in kept for files in part for file in files]
    sounds = _are_sounds(path, every)
    opener = Opener("L" if channels == 1 or (sounds and channels is None) else "RGB", every)
    arrays = [
        stack(((repr(str(f)), opener.open(f), label) for label, files in enumerate(part) for f in files), image_size)
        for part in kept
    ]
    notes += opener.notes()
    if splits is not None:
        (x_train, y_train), (x_test, y_test) = arrays
        if x_train.shape[1:] != x_test.shape[1:]:
            (high, wide), (higher, wider) = x_train.shape[1:3], x_test.shape[1:3]
            raise HoldfastError(
                f"{str(path)!r}: images for training are {wide}x{high}, for testing {wider}x{higher}; give image_size "
                "to resize all."
            )
        return kind(path.name, x_train, y_train, x_test, y_test, names).noted(f"folder {path}", *notes)
    x, y = arrays[0]
    train, test = draw_rows(path, y, test_fraction, seed, names)
    task = kind(path.name, x[train], y[train], x[test], y[test], names)
    return task.noted(f"folder {path}", *notes, drawn=True)


def split_folders(path: Path, labelled: bool, notes: list[str] | None = None) -> dict[str, Path] | None:
    """Returns the folders for training and testing; None if the sub-folders are classes.

    A folder `train` with images and without folders is a class (of railway trains), unless all folders beside it have
    names of splits.

    Raises:
        HoldfastError: if one of the two is missing, or two have one name.
    """
    every, junk = _folders(path)
    folders = {p.name: p for p in every}
    train = [n for n in folders if n.lower() in TRAIN_FOLDERS]
    held = sorted((n for n in folders if n.lower() in TEST_FOLDERS), key=lambda n: TEST_FOLDERS.index(n.lower()))
    others = [n for n in folders if n not in (*train, *held)]
    nested = [n for n in (*train, *held) if _folders(folders[n])[0]]
    notes = notes if notes is not None else []
    if not train and not (held and set(nested) == set(held)):
        _check_levels(path, folders, notes)
        return None
    if others and not set(train) & set(nested) and (labelled or not held):
        return None
    listed = ", ".join(sorted(folders))
    same = [n for n in held if n.lower() == held[0].lower()] if held else []
    if not train or not held or len(train) > 1 or len(same) > 1:
        raise HoldfastError(
            f"{str(path)!r} holds the folders {listed}; expected one for training ({', '.join(TRAIN_FOLDERS)}) and one "
            f"for testing ({', '.join(TEST_FOLDERS)}), or one folder a class. Rename or move the other folders."
        )
    if (train[0], held[0]) != ("train", "test"):
        notes.append(f"trained on the folder {train[0]!r}, tested on {held[0]!r}")
    if len(held) > 1 or others:
        notes.append(f"folders beside the two splits were left out: {_some_of([*held[1:], *others])}")
    if junk:
        notes.append(f"{_at(path)}hidden and system folders were left out: {_some_of(junk)}")
    _note_skipped(path, [p for p in _entries(path) if p.is_file()], notes)
    return {"train": folders[train[0]], "test": folders[held[0]]}


def _check_levels(path: Path, folders: dict[str, Path], notes: list[str]) -> None:
    """Notes folders that all contain the same folders; refuses them if they have names like splits."""
    inner = [{p.name for p in _folders(place)[0]} for place in folders.values()]
    shared = sorted(set.intersection(*inner)) if len(inner) > 1 else []
    if not shared:
        return
    listed = ", ".join(sorted(folders))
    if any(_LIKE_SPLITS.search(name.lower()) for name in folders):
        raise HoldfastError(
            f"{str(path)!r} holds the folders {listed}, and each holds {_some_of(shared)}: these look like splits, not "
            f"classes. Call one {TRAIN_FOLDERS[0]} and one {TEST_FOLDERS[0]}."
        )
    notes.append(f"the classes are {listed}, and each holds folders of the same names ({_some_of(shared)})")


class _Classes:
    """The image files below one folder, by class."""

    def __init__(self, path: Path, labelled: bool, notes: list[str]) -> None:
        self.path = path
        folders, junk = _folders(path)
        own = [p for p in _entries(path) if p.is_file()]
        images = [p for p in own if p.suffix.lower() in suffixes()]
        if not folders and not labelled and images:
            self.files = {".": sorted(images)}
            _note_skipped(path, [p for p in own if p not in images], notes)
            return
        if not folders:
            wanted = "one folder of images a class" if labelled else "images, or folders of them"
            raise HoldfastError(
                f"{str(path)!r} has no sub-folders{'' if labelled else ' and no images'}; expected {wanted}."
            )
        named: dict[str, Path] = {}
        for folder in folders:
            name = unicodedata.normalize("NFC", folder.name).strip()
            if name in named:
                raise HoldfastError(
                    f"{str(path)!r} has two folders called {name!r}, which differ in blanks or in the encoding of "
                    "accents; merge or rename them."
                )
            named[name] = folder
        read: dict[str, list[Path]] = {}
        skipped = [p for p in own if not _is_junk(p)]
        for name, folder in named.items():
            files = below(folder)
            read[name] = sorted(p for p in files if p.suffix.lower() in suffixes())
            skipped += [p for p in files if p.suffix.lower() not in suffixes()]
        self.files = {name: files for name, files in read.items() if files}
        empty = [name for name, files in read.items() if not files]
        if not self.files:
            kinds = ", ".join(f"{n} {s or 'without suffix'}" for s, n in _by_suffix(skipped).items())
            raise HoldfastError(
                f"{str(path)!r}: no images in its class folders{f' (but {kinds})' if kinds else ''}; expected files "
                "that Pillow opens (.png, .jpg, .ppm, ...), or .wav."
            )
        if labelled and len(self.files) == 1:
            (only,) = self.files
            inner = [p.name for p in _folders(named[only])[0]]
            hint = f" Its own folders are {_some_of(inner)}: give {str(named[only])!r}." if len(inner) > 1 else ""
            raise HoldfastError(
                f"{str(path)!r} has only one class, {only!r}; a classification task needs at least two.{hint}"
            )
        if empty:
            notes.append(f"{_at(path)}folders without images are not classes: {_some_of(empty)}")
        if junk:
            notes.append(f"{_at(path)}hidden and system folders were left out: {_some_of(junk)}")
        _note_skipped(path, skipped, notes)

    def kept(self, names: Sequence[str], limit: int | None, seed: int) -> list[list[Path]]:
        """Files of each class, or about `limit` of them in total: so a part of ImageNet is read quickly."""
        every = [self.files.get(name, []) for name in names]
        total = sum(map(len, every))
        if limit is None or limit >= total:
            return every
        return [_some(files, limit / total, seed) if files else [] for files in every]


def _check_same(path: Path, train: _Classes, test: _Classes) -> None:
    extra = [name for name in test.files if name not in train.files]
    if extra:
        raise HoldfastError(
            f"{str(path)!r}: {test.path.name} has a class {extra[0]!r} that {train.path.name} does not have (classes "
            f"of {train.path.name}: {_some_of(list(train.files))}). Add images to train on, or move the folder away."
        )


def _are_sounds(path: Path, files: Sequence[Path]) -> bool:
    sounds = [f for f in files if f.suffix.lower() == SOUND]
    if sounds and len(sounds) < len(files):
        raise HoldfastError(
            f"{str(path)!r} holds {len(sounds)} sounds ({sounds[0].name}) and {len(files) - len(sounds)} images; "
            "expected one kind. Move the others away."
        )
    return bool(sounds)


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise HoldfastError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error


def _folders(path: Path) -> tuple[list[Path], list[str]]:
    """Folders that may be classes, and the names of the other folders."""
    every = [p for p in _entries(path) if p.is_dir()]
    junk = [p for p in every if p.name.startswith(".") or p.name.lower() in JUNK_FOLDERS]
    return [p for p in every if p not in junk], [p.name for p in junk]


def _is_junk(file: Path) -> bool:
    return file.name.startswith(".") or file.name.lower() in JUNK_FILES


def below(folder: Path) -> list[Path]:
    """Returns all files at any depth, except those of systems; links are followed, each folder once.

    Raises:
        HoldfastError: if a folder cannot be read.
    """
    found: list[Path] = []
    visited: set[str] = set()

    def unreadable(error: OSError) -> None:
        raise HoldfastError(f"{str(error.filename)!r} cannot be read: {error.strerror}.") from error

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in JUNK_FOLDERS)
        found += [file for file in map(Path(place).joinpath, files) if not _is_junk(file)]
    return found


def _note_skipped(path: Path, skipped: Sequence[Path], notes: list[str]) -> None:
    real = [p for p in skipped if not _is_junk(p)]
    if real:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in _by_suffix(real).items())
        notes.append(f"{_at(path)}files left out, as they are not images in a class folder: {kinds}")


def _by_suffix(files: Sequence[Path]) -> dict[str, int]:
    return dict(Counter(p.suffix.lower() for p in files).most_common(8))


def _at(path: Path) -> str:
    return f"{path.name}: " if path.name else ""


def _some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _some(files: list[Path], share: float, seed: int) -> list[Path]:
    count = max(1, round(share * len(files)))
    return [files[i] for i in sorted(np.random.default_rng(seed).permutation(len(files))[:count])]
