"""Data sets that libraries download, from tiny files in the libraries' formats."""

from __future__ import annotations

import bz2
import pickle
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from holdfast.errors import HoldfastError
from holdfast.tasks import TaskSpec, load_task
from holdfast.tasks.downloads import DOWNLOADS, TORCHVISION

N = 20
"""Images in each split; image i has label i % 10, and a brightness that depends only on label and split."""


def shade(split: str, label: int) -> int:
    return 10 * label + (100 if split == "test" else 0)


def images(split: str, size: int, channels: int) -> np.ndarray:
    """N x channels x size x size; the top left corner is white, so that a rotated image is noticed."""
    x = np.empty((N, channels, size, size), np.uint8)
    for i in range(N):
        x[i] = shade(split, i % 10)
    x[:, :, 0, 1] = 255
    return x


LABELS = np.arange(N) % 10


def write_mnist(root: Path, folder: str = "MNIST") -> None:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for word, split in (("train", "train"), ("t10k", "test")):
        pixels = images(split, 28, 1)[:, 0]
        (raw / f"{word}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, N, 28, 28) + pixels.tobytes())
        (raw / f"{word}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, N) + LABELS.astype(np.uint8).tobytes()
        )


def write_usps(root: Path) -> None:
    root.mkdir(parents=True)
    for split in ("train", "test"):
        rows = images(split, 16, 1).reshape(N, -1) / 255 * 2 - 1  # LIBSVM's format, pixels from -1 to 1, labels from 1
        lines = [
            f"{y + 1} " + " ".join(f"{k}:{v:.6f}" for k, v in enumerate(row, 1))
            for row, y in zip(rows, LABELS, strict=True)
        ]
        (root / f"usps{'.t' if split == 'test' else ''}.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))


def write_cifar(root: Path, classes: int) -> None:
    from torchvision import datasets

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        for i, (name, _) in enumerate(files):
            part = slice(i, None, len(files))
            batch = {"data": images(split, 32, 3)[part].reshape(-1, 3 * 32 * 32), key: LABELS[part].tolist()}
            (folder / name).write_bytes(pickle.dumps(batch))
    names = {kind.meta["key"]: [f"class {c}" for c in range(classes)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))


def write_svhn(root: Path) -> None:
    root.mkdir(parents=True)
    for split in ("train", "test"):
        x = images(split, 32, 3).transpose(2, 3, 1, 0)
        y = np.where(LABELS == 0, 10, LABELS)[:, None].astype(np.uint8)  # SVHN calls the digit 0 ten
        savemat(root / f"{split}_32x32.mat", {"X": x, "y": y})


def write_stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images(split, 96, 3).transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")  # columns first
        (LABELS + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "unlabeled_X.bin").touch()
    (folder / "class_names.txt").write_text("\n".join(f"class {c}" for c in range(10)))


def write_imagenette(root: Path) -> None:
    from torchvision.datasets import Imagenette

    for split, word in (("train", "train"), ("test", "val")):
        for i, pixels in enumerate(images(split, 160, 3)):
            folder = root / "imagenette2-160" / word / sorted(Imagenette._WNID_TO_CLASS)[i % 10]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i}.JPEG", quality=95)


def write_celeba(root: Path) -> None:
    """Image i has two attributes, the label and its opposite, at 31 and 32 of 40; one split after another."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(2 * N)]
    for name, pixels in zip(names, [*images("train", 32, 3), *images("test", 32, 3)], strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "img_align_celeba" / name, quality=95)
    rows = [["-1"] * 31 + ["1", "-1"] + ["-1"] * 7 if i % 2 else ["-1"] * 32 + ["1"] + ["-1"] * 7 for i in range(2 * N)]
    attributes = [str(2 * N), " ".join(f"a{k}" for k in range(40))]
    attributes += [f"{name} {' '.join(row)}" for name, row in zip(names, rows, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    partition = [f"{name} {0 if i < N else 2}" for i, name in enumerate(names)]
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    (folder / "identity_CelebA.txt").write_text("\n".join(f"{name} 1" for name in names) + "\n")
    for word, width in (("bbox", 4), ("landmarks_align", 10)):
        table = [str(2 * N), " ".join("abcdefghij"[:width]), *(f"{name}{' 0' * width}" for name in names)]
        (folder / f"list_{word}_celeba.txt").write_text("\n".join(table) + "\n")


def write_cars(root: Path) -> None:
    """Images of different sizes, whose annotations name class and file; the boxes are not used."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([f"car {c}" for c in range(10)], object)})
    kind = [("class", "i4"), ("fname", object)]
    for split, path in (("train", folder / "devkit" / "cars_train_annos.mat"),
                        ("test", folder / "cars_test_annos_withlabels.mat")):  # fmt: skip
        (folder / f"cars_{split}").mkdir()
        rows = [(int(label) + 1, f"{i}.jpg") for i, label in enumerate(LABELS)]
        savemat(path, {"annotations": np.array(rows, dtype=kind)})
        for i, pixels in enumerate(images(split, 64, 3)):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"cars_{split}" / f"{i}.jpg", quality=95)


def write_country211(root: Path) -> None:
    for split in ("train", "valid", "test"):
        for i, pixels in enumerate(images(split, 64, 3)):
            folder = root / "country211" / split / f"C{LABELS[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i}.jpg", quality=95)


WRITERS = {
    "mnist": write_mnist,
    "fashion_mnist": lambda root: write_mnist(root, "FashionMNIST"),
    "kmnist": lambda root: write_mnist(root, "KMNIST"),
    "usps": write_usps,
    "cifar10": lambda root: write_cifar(root, 10),
    "cifar100": lambda root: write_cifar(root, 100),
    "svhn": write_svhn,
    "stl10": write_stl10,
    "imagenette": write_imagenette,
    "stanford_cars": write_cars,
    "country211": write_country211,
}
OWN_SHAPES = {"mnist": (1, 28, 28), "usps": (1, 16, 16), "svhn": (3, 32, 32), "stl10": (3, 96, 96)}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checksums of the published files."""
    from torchvision.datasets import celeba, cifar, mnist, stl10, svhn, utils

    for module in (celeba, cifar, mnist, stl10, svhn, utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.usefixtures("no_network", "unchecked")
class TestTorchvision:
    @pytest.mark.parametrize("name", WRITERS)
    def test_images_and_labels_are_the_files(self, name, tmp_path):
        WRITERS[name](tmp_path / "torchvision")
        task = load_task(f"{name}@image_size=64,channels=3", data_dir=tmp_path)
        assert task.input_shape == (3, 64, 64)
        assert (task.num_outputs, len(set(task.class_names))) == ((100, 100) if name == "cifar100" else (10, 10))
        for split in ("train", "test"):
            x, y = task._x[split], task._y[split]
            assert torch.bincount(y)[:10].tolist() == [2] * 10
            expected = torch.tensor([float(shade(split, int(label))) for label in y])
            assert (x[:, :, 32:, 32:].float().mean((1, 2, 3)) - expected).abs().max() <= 1
            # The white pixel is in the first row, not the first column: nothing was turned.
            assert (x[:, :, 0, 1:8].float().mean((1, 2)) > x[:, :, 1:8, 0].float().mean((1, 2))).all()

    @pytest.mark.parametrize("name", OWN_SHAPES)
    def test_size_and_colour_are_their_own(self, name, tmp_path):
        WRITERS[name](tmp_path / "torchvision")
        assert load_task(name, data_dir=tmp_path).input_shape == OWN_SHAPES[name]
        assert load_task(f"{name}@channels=1", data_dir=tmp_path).input_shape[0] == 1

    def test_celeba_is_labelled_by_a_smile_and_its_validation_images_are_left_alone(self, tmp_path):
        write_celeba(tmp_path / "torchvision")
        task = load_task("celeba@image_size=32", data_dir=tmp_path)
        assert (task.class_names, task.size("train"), task.size("test")) == (["not smiling", "smiling"], N, N)
        assert task._y["train"].tolist() == [i % 2 for i in range(N)]
        expected = torch.tensor([float(shade("test", i % 10)) for i in range(N)])
        assert (task._x["test"][:, :, 16:, 16:].float().mean((1, 2, 3)) - expected).abs().max() <= 1
        assert load_task("celeba@image_size=32,kind=denoising", data_dir=tmp_path).input_shape == (4, 32, 32)

    def test_every_name_is_tested(self):
        assert {*WRITERS, "celeba"} == set(TORCHVISION)

    def test_imagenette_is_the_smallest_archive_that_will_do(self, tmp_path, monkeypatch):
        from torchvision.datasets import imagenette

        write_imagenette(tmp_path / "torchvision")
        task = load_task("imagenette[0,4]@image_size=160,channels=1", data_dir=tmp_path)
        assert task.input_shape == (1, 160, 160)
        assert task.class_names == ["tench", "church"]

        def refuse(url, *_, **__):
            raise RuntimeError(url)

        monkeypatch.setattr(imagenette, "download_and_extract_archive", refuse)
        for size, archive in ((161, "imagenette2-320"), (320, "imagenette2-320"), (400, "imagenette2")):
            with pytest.raises(HoldfastError, match=rf"/{archive}\.tgz"):
                load_task(f"imagenette@image_size={size}", data_dir=tmp_path)
        with pytest.raises(HoldfastError, match="differ in size; set one, as in imagenette@image_size=64"):
            load_task("imagenette", data_dir=tmp_path)


@pytest.mark.usefixtures("no_network")
class TestOffline:
    @pytest.mark.parametrize("name", DOWNLOADS)
    def test_the_refusal_gives_an_alternative(self, name, tmp_path, monkeypatch):
        fake_datasets(monkeypatch, ConnectionError("no network"))
        lacks = {"celeba": "'gdown' is required", "stanford_cars": "can no longer download"}.get(name, "no network")
        expected = rf"Task '{name}': .*{lacks}.*put {name}\.npz, or a folder {name}/ .* into '{tmp_path}'"
        with pytest.raises(HoldfastError, match=expected):
            load_task(f"{name}@image_size=32", data_dir=tmp_path)

    @pytest.mark.parametrize("name", DOWNLOADS)
    def test_local_files_come_first(self, name, tmp_path):
        x = images("train", 8, 3).transpose(0, 2, 3, 1)
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=LABELS, x_test=x[:10], y_test=LABELS[:10])
        task = load_task(f"{name}@image_size=16", data_dir=tmp_path)
        assert (task.size("train"), task.size("test"), task.input_shape) == (20, 10, (3, 16, 16))

    @pytest.mark.parametrize("held", ["test", "val", "valid"])
    def test_a_local_folder_comes_first(self, held, tmp_path):
        """CINIC-10 as it is published: 32-pixel PNGs in train, valid and test."""
        for split, shades in (("train", (10, 20)), ("valid", (70, 80)), (held, (30, 40))):
            for name, value in zip(("cat", "dog"), shades, strict=True):
                (tmp_path / "cinic10" / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / "cinic10" / split / name / "1.png")
        task = load_task("cinic10", data_dir=tmp_path)
        assert (task.size("train"), task.size("test"), task.class_names) == (2, 2, ["cat", "dog"])
        assert task._x["train"][:, 0, 0, 0].tolist() == [10, 20]
        assert task._x["test"][:, 0, 0, 0].tolist() == [30, 40]


def fake_datasets(monkeypatch, outcome):
    """Replaces Hugging Face's datasets by a module whose `load_dataset` returns or raises `outcome`."""
    asked = []

    def load_dataset(name, **more):
        asked.append((name, more))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


class Rows(list):
    features = {"label": SimpleNamespace(names=["airplane", "automobile"])}  # noqa: RUF012


class TestHuggingFace:
    def test_rows_become_a_task(self, tmp_path, monkeypatch):
        def rows(value):
            return Rows({"image": Image.new("L", (32, 32), value + i), "label": i % 2} for i in range(4))

        asked = fake_datasets(monkeypatch, [rows(50), rows(90)])
        task = load_task("cinic10@image_size=16", data_dir=tmp_path)
        assert task.class_names == ["airplane", "automobile"]
        assert task.input_shape == (3, 16, 16)
        assert task._x["test"][:, 2, 8, 8].tolist() == [90, 91, 92, 93]
        assert task._y["train"].tolist() == [0, 1, 0, 1]
        name, more = asked[0]
        assert name == "flwrlabs/cinic10"
        assert len(more["revision"]) == 40
        assert (more["split"], more["cache_dir"]) == (["train", "test"], str(tmp_path / "huggingface"))

    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(HoldfastError, match=r'pip install "holdfast\[data\]", or put cinic10\.npz'):
            load_task(TaskSpec(data="cinic10"), data_dir=tmp_path)
