"""The real data, but few of each file: where a test needs their shapes, classes and columns, and not their number."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np

TRAIN, TEST = 800, 100


def cut(source: Path, into: Path) -> Path:
    """Writes about `TRAIN` training and `TEST` test samples of every file, the first of each class, to a new folder."""
    into.mkdir()
    for path in source.glob("*.npz"):
        with np.load(path) as whole:
            if "x_train" in whole.files:
                np.savez(into / path.name, **_fewer(whole))
    text = source / "tiny_shakespeare.txt"
    if text.is_file():
        (into / text.name).write_text(text.read_text()[:40_000])
    trained = source / "weights" / "cifar10_resnet20.safetensors"
    if trained.is_file():
        (into / "weights").mkdir()
        shutil.copy(trained, into / "weights")
    model = source / "weights" / "stories260K"
    if model.is_dir():
        shutil.copytree(model, into / "weights" / model.name)
    if importlib.util.find_spec("pyarrow") is not None:  # who reads the tables needs it, and skips without it
        for path in source.glob("*.parquet"):
            _cut_table(path, into / path.name)
    return into


def _fewer(whole):
    found = {name: whole[name] for name in whole.files if not name.startswith(("x_", "y_"))}
    for split, limit in (("train", TRAIN), ("test", TEST)):
        y = whole[f"y_{split}"]
        kept = _first_of_each(y, limit)
        found |= {f"x_{split}": whole[f"x_{split}"][kept], f"y_{split}": y[kept]}
    return found


def _first_of_each(y, limit):
    classes = np.unique(y)
    return np.sort(np.concatenate([np.flatnonzero(y == c)[: max(1, limit // len(classes))] for c in classes]))


def _cut_table(path, to):
    from pyarrow import parquet

    whole = parquet.read_table(path)
    split, label = (whole.column(name).to_numpy(zero_copy_only=False) for name in ("split", "label"))
    rows = [
        np.flatnonzero(split == part)[_first_of_each(label[split == part], TRAIN if part == "train" else TEST)]
        for part in np.unique(split)
    ]
    parquet.write_table(whole.take(np.concatenate(rows)), to)
