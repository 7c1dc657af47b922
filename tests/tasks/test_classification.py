from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from conftest import toy_task
from holdfast.errors import HoldfastError
from holdfast.tasks import ArrayTask, TaskSpec, in_memory, load_task

CPU = torch.device("cpu")
X, Y = np.arange(24, dtype=np.float32).reshape(6, 4), np.array([0, 1, 0, 1, 0, 1])


def draw(task, n, seed=0, batch=10):
    generator = torch.Generator().manual_seed(seed)
    stream = task.batches("train", batch, generator=generator, device=CPU)
    return [next(stream) for _ in range(n)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x_train": X[:5]}, "5 samples, y_train 6 labels"),
            ({"x_train": X[:0], "y_train": Y[:0]}, "train split is empty"),
            ({"x_test": X[:0], "y_test": Y[:0]}, "test split is empty"),
            ({"x_test": X[:, :3]}, r"training inputs are \(4,\), test inputs \(3,\)"),
            ({"y_train": np.zeros(6, int), "y_test": np.zeros(6, int)}, "one class only"),
            ({"y_test": np.array([0, 1, 0, 1, 0, 7])}, "holds label 7; expected 0 to 1"),
            ({"y_train": np.array([0, 1, 0, 1, 0, -1])}, "holds label -1"),
            ({"y_train": np.array([0, 1, 0, 1, 0, 2**40])}, "number the classes from 0"),
            ({"y_train": np.array([0, 1, 0, 1, 0, 0.5])}, "values that are not integers"),
            ({"y_train": Y[:, None]}, r"y_train has shape \(6, 1\)"),
            ({"x_train": np.where(X == 5, np.nan, X)}, "first in row 1, column 1"),
            ({"x_train": np.where(X == 5, np.inf, X)}, "NaN or infinite"),
            ({"x_train": X[0]}, "expected .N, D."),
            ({"x_train": np.array([["a"] * 4] * 6)}, "expected numbers"),
            ({"x_train": np.zeros((6, 8, 8)), "x_test": np.zeros((6, 8, 8))}, "expected uint8"),
            ({"x_train": np.zeros((6, 8, 8, 5), np.uint8)}, "5 channels"),
            ({"class_names": ["only"]}, "expected 0 to 0"),
        ],
    )
    def test_names_the_array_and_the_value(self, change, message):
        arrays = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, **change}
        with pytest.raises(HoldfastError, match=message):
            ArrayTask("bad", **arrays)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("digit", "did you mean 'digits'"),
            ("digits[0-", "is not a name"),
            ("digits[a]", "not a class or a range"),
            ("digits[4-0]", "runs backwards"),
            ("digits[0-12]", "there is no class 10"),
            ("digits[3]", "at least two"),
            ("digits[1,1]", "each once"),
            ("digits[0-999999999]", "names 1000000000 classes; expected at most 100000"),
            ("digits[0-9999999999]", "not a class or a range"),
            ("digits[" + "9" * 5000 + "]", "not a class or a range"),
            ("digits@seed=4294967296", "seed is '4294967296'"),
            ("digits@seed=-1", "seed is '-1'"),
            ("./nothing.npz", "does not exist"),
            ("digits@image_sise=4", "did you mean 'image_size'"),
            ("digits@image_size", "has no '='"),
            ("digits@image_size=big", "image_size is 'big'"),
            ("digits@data=mnist", "Unknown setting"),
        ],
    )
    def test_names(self, spec, message):
        with pytest.raises(HoldfastError, match=message):
            load_task(spec)

    def test_data_folder_must_exist(self, tmp_path, monkeypatch):
        with pytest.raises(HoldfastError, match="--data-dir"):
            load_task("anything", data_dir=tmp_path / "no")
        monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "no"))
        with pytest.raises(HoldfastError, match=r"\$HOLDFAST_DATA"):
            load_task("anything")

    def test_the_refusal_of_an_unknown_name_gives_both_ways(self, tmp_path):
        with pytest.raises(HoldfastError, match=r"put cars\.npz into .*or give a path"):
            load_task("cars", data_dir=tmp_path)

    def test_the_refusal_of_a_failed_download_gives_both_ways(self, monkeypatch, tmp_path):
        from torchvision import datasets

        def offline(**_):
            raise OSError("no network")

        monkeypatch.setattr(datasets, "KMNIST", offline)
        with pytest.raises(
            HoldfastError, match=r"no network.*or put kmnist\.npz, or a folder kmnist/ of images .*, into"
        ):
            load_task("kmnist", data_dir=tmp_path)

    def test_pickled_arrays_are_not_opened(self, tmp_path):
        path = tmp_path / "evil.npz"
        np.savez(path, x_train=np.array([{}], dtype=object), y_train=Y, x_test=X, y_test=Y)
        with pytest.raises(HoldfastError, match="plain arrays"):
            load_task(str(path))

    def test_damaged_or_incomplete_archive(self, tmp_path):
        (tmp_path / "noise.npz").write_bytes(b"not an archive")
        np.savez(tmp_path / "half.npz", x_train=X, y_train=Y)
        with pytest.raises(HoldfastError, match="cannot be read"):
            load_task("noise", data_dir=tmp_path)
        with pytest.raises(HoldfastError, match="lacks x_test, y_test"):
            load_task("half", data_dir=tmp_path)

    def test_a_flipped_bit_is_a_clear_error_wherever_it_is(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 255, (6, 4, 4), dtype=np.uint8)
        np.savez_compressed(tmp_path / "whole.npz", x_train=x, y_train=Y, x_test=x, y_test=Y)
        whole, refused = (tmp_path / "whole.npz").read_bytes(), 0
        for position in range(0, len(whole), 3):
            flipped = bytearray(whole)
            flipped[position] ^= 0x10
            (tmp_path / "flipped.npz").write_bytes(flipped)
            try:
                load_task("flipped", data_dir=tmp_path)
            except HoldfastError:
                refused += 1
        assert refused > 100

    def test_other_things_called_npz(self, tmp_path):
        np.save(tmp_path / "one.npy", X)
        (tmp_path / "one.npy").rename(tmp_path / "one.npz")
        with pytest.raises(HoldfastError, match="is a single array"):
            load_task("one", data_dir=tmp_path)
        for names, shape in ((np.array("ab"), r"\(\)"), (np.array([["a", "b"]]), r"\(1, 2\)")):
            np.savez(tmp_path / "names.npz", x_train=X, y_train=Y, x_test=X, y_test=Y, class_names=names)
            with pytest.raises(HoldfastError, match=f"class_names has shape {shape}"):
                load_task("names", data_dir=tmp_path)

    def test_too_few_samples(self, toy):
        with pytest.raises(HoldfastError, match="lower `shots`"):
            toy.few_shot(31, 0)
        with pytest.raises(HoldfastError, match="all 1 training samples of class '0' are in the same half"):
            toy.few_shot(1, 0).halves(0)
        with pytest.raises(HoldfastError, match="too few to hold 1 out"):
            toy.few_shot(1, 0).holdout(0.1, 0)


class TestBatches:
    def test_an_epoch_holds_every_sample_once(self):
        task = toy_task(2, samples=10)
        seen = torch.cat([b.x for b in draw(task, 4, batch=5)])
        assert len(torch.unique(seen, dim=0)) == 20

    def test_batches_are_full_and_capped_at_the_split(self, toy):
        assert {len(b.y) for b in draw(toy, 5, batch=40)} == {40}
        assert len(draw(toy, 1, batch=1000)[0].y) == toy.size("train")

    def test_the_generator_decides(self, toy):
        first, same, other = (draw(toy, 3, seed) for seed in (1, 1, 2))
        assert all(torch.equal(a.x, b.x) for a, b in zip(first, same, strict=True))
        assert not all(torch.equal(a.x, b.x) for a, b in zip(first, other, strict=True))

    def test_test_batches_are_in_order_and_once(self, toy):
        labels = torch.cat([b.y for b in toy.batches("test", 7, device=CPU)])
        assert labels.tolist() == [i % 3 for i in range(60)]

    def test_images_are_scaled(self, benign):
        batch = draw(benign, 1)[0]
        assert batch.x.shape == (10, 1, 8, 8)
        assert batch.x.dtype == torch.float32
        assert 0 <= batch.x.min() < 0.1
        assert 0.9 < batch.x.max() <= 1


class TestNarrowing:
    @given(st.integers(0, 1000))
    def test_halves_are_disjoint_and_complete(self, seed):
        task = toy_task(3)
        first, second = task.halves(seed)
        rows = [set(map(tuple, t._x["train"].tolist())) for t in (task, first, second)]
        assert rows[1] | rows[2] == rows[0]
        assert not rows[1] & rows[2]
        assert torch.equal(first._x["test"], task._x["test"])
        for half in (first, second):
            assert torch.bincount(half._y["train"], minlength=3).min() >= 1

    def test_halves_are_about_halves_of_every_class(self):
        for half in load_task("digits").halves(0):
            counts = torch.bincount(half._y["train"]).tolist()
            assert min(counts) > 50  # of 131 to 137; four standard deviations are 23
            assert max(counts) < 86

    def test_a_seed_decides_the_halves(self, toy):
        assert len({toy.halves(seed)[0].facts().sha256 for seed in range(3)}) == 3

    @pytest.mark.parametrize("other", ["digits", "digits[9,8,7]", "digits[8,9]", "digits[0-2,9,4]"])
    def test_the_side_of_an_image_does_not_depend_on_the_other_classes(self, other):
        def rows(task):
            return set(map(bytes, task._x["train"].numpy()))

        defender_data, adversary_data = load_task("digits[7-9]").halves(0)
        theirs = load_task(other).halves(0)
        assert rows(theirs[0]) & rows(defender_data)
        assert not rows(theirs[0]) & rows(adversary_data)
        assert not rows(theirs[1]) & rows(defender_data)

    def test_duplicates_are_on_one_side_even_with_another_label(self):
        task = toy_task(2)
        x, y = task._x["train"].numpy(), task._y["train"].numpy()
        twice = ArrayTask("twice", np.concatenate([x, -0.0 + x]), np.concatenate([y, 1 - y]), x, y)
        first, second = twice.halves(0)
        assert not set(map(tuple, first._x["train"].tolist())) & set(map(tuple, second._x["train"].tolist()))
        assert first.size("train") + second.size("train") == 120

    def test_zero_has_one_sign(self, toy):
        zero = np.zeros((60, 2), np.float32)
        zero[:, 1] = np.arange(60)
        sides = []
        for x in (zero, np.where(zero == 0, np.float32(-0.0), zero)):
            task = ArrayTask("zeros", x, np.arange(60) % 2, x, np.arange(60) % 2)
            sides.append(task.halves(0)[0]._x["train"][:, 1].tolist())
        assert sides[0] == sides[1]

    def test_few_shot(self, toy):
        few = toy.few_shot(2, seed=1)
        assert torch.bincount(few._y["train"]).tolist() == [2, 2, 2]
        assert few.size("test") == toy.size("test")
        assert few.facts().sha256 == toy.few_shot(2, seed=1).facts().sha256 != toy.few_shot(2, seed=2).facts().sha256

    def test_holdout_takes_from_training_data(self, toy):
        rest, held = toy.holdout(0.2, 0)
        assert (rest.size("train"), held.size("test")) == (72, 18)
        assert not set(map(tuple, rest._x["train"].tolist())) & set(map(tuple, held._x["test"].tolist()))

    def test_subset_renumbers_and_names(self):
        task = load_task("digits[7-9,2]")
        assert task.name == "digits[7-9,2]"
        assert task.class_names == ["7", "8", "9", "2"]
        whole = load_task("digits")
        assert torch.equal(task._x["test"][task._y["test"] == 3], whole._x["test"][whole._y["test"] == 2])

    def test_test_limit_keeps_shares(self):
        task = load_task(TaskSpec(data="digits", test_limit=100))
        assert 95 <= task.size("test") <= 105
        assert torch.bincount(task._y["test"]).min() >= 9

    def test_limits_come_before_resizing(self, monkeypatch):
        whole = load_task("digits@image_size=16,channels=3")
        resized, honest = [], in_memory.resize
        monkeypatch.setattr(in_memory, "resize", lambda x, *how: resized.append(len(x)) or honest(x, *how))
        few = load_task("digits@image_size=16,channels=3,train_limit=60,test_limit=20,seed=3")
        assert resized == [few.size("train"), few.size("test")]
        assert few.facts() == whole.limit_train(60, 3).limit_test(20, 3).facts()

    def test_as_images(self):
        task = load_task(TaskSpec(data="digits", image_size=16, channels=3))
        assert task.input_shape == (3, 16, 16)
        assert task._x["train"].dtype == torch.uint8
        assert task.as_images(channels=1).input_shape == (1, 16, 16)
        with pytest.raises(HoldfastError, match="channels is 2"):
            task.as_images(channels=2)
        with pytest.raises(HoldfastError, match="not images"):
            toy_task(2).as_images(8)

    def test_inverted(self):
        plain, inverted = load_task("digits[0-4]"), load_task("digits[0-4]@invert=true")
        assert torch.equal(inverted._x["train"], 255 - plain._x["train"])
        assert inverted.facts().sha256 != plain.facts().sha256
        assert inverted.inverted().facts() == plain.facts()
        with pytest.raises(HoldfastError, match="no images of 0 to 255; leave invert out"):
            toy_task(2).inverted()

    def test_chance_is_the_largest_class(self):
        task = ArrayTask("t", X, Y, X[:5], [0, 0, 0, 0, 1])
        assert task.chance == 0.8


class TestScore:
    def test_accuracy_in_evaluation_mode(self, toy):
        class Modal(nn.Module):
            def __init__(self):
                super().__init__()
                self.anchor = nn.Parameter(torch.zeros(1))

            def forward(self, x):
                index = (
                    torch.zeros(len(x), dtype=torch.int64) if self.training else torch.ones(len(x), dtype=torch.int64)
                )
                return nn.functional.one_hot(index, 3).float()

        model = Modal().train()
        assert toy.score(model) == pytest.approx(1 / 3)
        assert model.training

    def test_not_finite_is_nan_not_a_number_of_hits(self, toy):
        model = nn.Linear(6, 3)
        nn.init.constant_(model.weight, float("nan"))
        assert np.isnan(toy.score(model))


class TestSources:
    def test_npz_round_trip_with_class_names(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
        np.savez(tmp_path / "mine.npz", x_train=images, y_train=Y, x_test=images, y_test=Y, class_names=["a", "b"])
        task = load_task("mine", data_dir=tmp_path)
        assert task.class_names == ["a", "b"]
        assert torch.equal(task._x["test"][2], torch.from_numpy(images[2]).permute(2, 0, 1))

    def test_csv(self, tmp_path):
        frame = pd.DataFrame({"n": range(40), "c": ["u", "v"] * 20, "label": ["yes"] * 20 + ["no"] * 20})
        frame.to_csv(tmp_path / "t.csv", index=False)
        task = load_task(TaskSpec(data=str(tmp_path / "t.csv"), target="label"))
        assert task.class_names == ["no", "yes"]
        assert task.input_shape == (3,)
        assert (task.size("train"), task.size("test")) == (30, 10)
        assert task._x["train"][:, 0].mean().abs() < 1e-6

    def test_csv_as_on_a_command_line(self, tmp_path):
        pd.DataFrame({"n": range(40), "label": ["a", "b"] * 20}).to_csv(tmp_path / "t.csv", index=False)
        assert load_task(f"{tmp_path}/t.csv@target=label").class_names == ["a", "b"]
        assert load_task("t[1,0]@target=label", data_dir=tmp_path).class_names == ["b", "a"]

    def test_csv_with_its_own_split(self, tmp_path):
        frame = pd.DataFrame({"n": [1.0, 2, 3, 4], "y": [0, 1, 0, 1], "split": ["train", "train", "test", "test"]})
        frame.to_csv(tmp_path / "t.csv", index=False)
        task = load_task(TaskSpec(data="t", target="y"), data_dir=tmp_path)
        assert task._y["test"].tolist() == [0, 1]
        assert task.input_shape == (1,)

    @pytest.mark.parametrize(
        ("change", "target", "message"),
        [
            ({}, None, "needs `target`"),
            ({}, "labell", "did you mean 'label'"),
            ({"n": [None, *range(39)]}, "label", r"column 'n' has an empty cell \(line 2\)"),
            ({"label": np.linspace(0, 1, 200)}, "label", "looks continuous"),
            ({"split": ["valid"] * 40}, "label", "expected train, test"),
            ({"label": ["a"] * 39 + ["b"]}, "label", "cannot be split"),
        ],
    )
    def test_csv_refusals(self, tmp_path, change, target, message):
        columns = {"n": list(range(40)), "label": ["a", "b"] * 20, **change}
        length = max(len(v) for v in columns.values())
        frame = pd.DataFrame({k: (list(v) * 5)[:length] for k, v in columns.items()})
        frame.to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(HoldfastError, match=message):
            load_task(TaskSpec(data=str(tmp_path / "t.csv"), target=target))

    @staticmethod
    def _folder(root, sizes=((6, 6),)):
        for i, name in enumerate(("cat", "dog")):
            for j in range(8):
                (root / name).mkdir(parents=True, exist_ok=True)
                size = sizes[j % len(sizes)]
                Image.new("RGB", size, (40 * j, 200 * i, 0)).save(root / name / f"{j}.png")

    def test_image_folder(self, tmp_path):
        self._folder(tmp_path / "pets")
        task = load_task("pets", data_dir=tmp_path)
        assert task.class_names == ["cat", "dog"]
        assert task.input_shape == (3, 6, 6)
        assert (task.size("train"), task.size("test")) == (12, 4)
        assert load_task(TaskSpec(data=str(tmp_path / "pets"), channels=1, image_size=4)).input_shape == (1, 4, 4)

    def test_image_folder_with_splits(self, tmp_path):
        self._folder(tmp_path / "train")
        self._folder(tmp_path / "test")
        task = load_task(f"{tmp_path}/")
        assert (task.size("train"), task.size("test")) == (16, 16)

    def test_a_decompression_bomb_is_refused(self, tmp_path, monkeypatch):
        self._folder(tmp_path / "bomb")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(HoldfastError, match=r"cannot be opened as an image: .*decompression bomb"):
            load_task(f"{tmp_path}/bomb")

    def test_image_folder_refusals(self, tmp_path):
        self._folder(tmp_path / "odd", sizes=((6, 6), (7, 6)))
        with pytest.raises(HoldfastError, match="give image_size"):
            load_task(f"{tmp_path}/odd")
        (tmp_path / "odd" / "cat" / "broken.png").write_text("no image")
        with pytest.raises(HoldfastError, match=r"broken\.png.*cannot be opened"):
            load_task(TaskSpec(data=f"{tmp_path}/odd", image_size=6))
        (tmp_path / "bare").mkdir()
        with pytest.raises(HoldfastError, match="no sub-folders"):
            load_task(f"{tmp_path}/bare")
        (tmp_path / "bare" / "class").mkdir()
        with pytest.raises(HoldfastError, match="no images"):
            load_task(f"{tmp_path}/bare")

    @pytest.mark.parametrize(
        ("name", "train", "shape", "classes"),
        [
            ("mnist", 60_000, (1, 28, 28), 10),
            ("usps", 7_291, (1, 16, 16), 10),
            ("cifar10", 10_000, (3, 32, 32), 10),
            ("cifar100_objects", 4_000, (3, 32, 32), 10),
            ("stanford_cars40", 1_447, (3, 64, 64), 40),
            ("imagenette64", 2_000, (3, 64, 64), 10),
        ],
    )
    def test_real_arrays(self, data_dir, name, train, shape, classes):
        task = load_task(name, data_dir=data_dir)
        assert (task.size("train"), task.input_shape, task.num_outputs) == (train, shape, classes)

    def test_real_image_folder(self, data_dir):
        task = load_task(TaskSpec(data="imagenette224", image_size=32), data_dir=data_dir)
        assert (task.num_outputs, task.input_shape) == (10, (3, 32, 32))
        assert task.size("train") + task.size("test") == 200


class TestRegressionTables:
    ROWS = "\n".join(["a,b,y", *(f"{i},{'x' if i % 3 else 'z'},{2 * i + 1}" for i in range(20))])

    def load(self, tmp_path, text=None, **settings):
        (tmp_path / "t.csv").write_text(text or self.ROWS)
        return load_task(TaskSpec(data="t", kind="regression", target="y", **settings), data_dir=tmp_path)

    def test_is_standardised_by_the_training_rows(self, tmp_path):
        task = self.load(tmp_path, encoding="ordinal")
        x, y = task._x["train"], task._y["train"]
        assert task.input_shape == (2,)
        assert torch.allclose(x.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)
        assert y.std().item() == pytest.approx(1)
        assert task.facts().train + task.facts().test == 20

    def test_first_rows_for_training_and_the_rest_for_testing(self, tmp_path):
        task = self.load(tmp_path, rows=12)
        assert (task.size("train"), task.size("test")) == (12, 8)

    def test_a_split_column_is_honoured(self, tmp_path):
        lines = self.ROWS.split("\n")
        marked = [
            lines[0] + ",split",
            *(f"{row},{'test' if i % 5 == 0 else 'train'}" for i, row in enumerate(lines[1:])),
        ]
        task = self.load(tmp_path, "\n".join(marked), encoding="ordinal")
        assert task.input_shape == (2,)
        assert (task.size("train"), task.size("test")) == (16, 4)

    @pytest.mark.parametrize(
        ("text", "settings", "message"),
        [
            (None, {"drop": "y"}, "is the target and cannot be dropped"),
            (None, {"drop": "c"}, "Unknown column of t.csv to drop"),
            (None, {"rows": 20}, "expected 2 to 19"),
            ("y\n1\n2\n3", {}, "no column beside the target"),
            ("a,y\n1,2\n2,2\n3,2\n4,2", {}, "the same value in all training rows"),
            ("a,y\n1,2", {}, "cannot be split"),
            ("a,y\n1,u\n2,v\n3,w", {}, "needs numbers"),
            ("a,y\n1,1\ninf,2\n3,3\n4,4", {}, "holds an infinite value"),
        ],
    )
    def test_refuses(self, tmp_path, text, settings, message):
        with pytest.raises(HoldfastError, match=message):
            self.load(tmp_path, text, **settings)

    def test_only_tables_are_for_regression(self):
        with pytest.raises(HoldfastError, match="regression is for a CSV"):
            load_task("digits@kind=regression")

    def test_few_samples_halves_and_score(self, tmp_path):
        task = self.load(tmp_path, test_fraction=0)
        first, second = task.halves(0)
        assert first.size("train") + second.size("train") == 20
        assert task.few_shot(5, 0).size("train") == 5
        constant = torch.nn.Linear(task.input_shape[0], 1, dtype=torch.float64)
        torch.nn.init.zeros_(constant.weight)
        torch.nn.init.zeros_(constant.bias)
        assert task.score(constant) == pytest.approx(task.chance)
        assert task.audit_score(constant) == pytest.approx(0, abs=1e-9)


class TestLimitedFolders:
    """A part of ImageNet is kept without reading all images."""

    @pytest.fixture
    def folder(self, tmp_path):
        for split, count in (("train", 8), ("val", 4)):
            for c in range(3):
                place = tmp_path / "pictures" / split / f"class{c}"
                place.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(np.full((4, 4, 3), 80 * c + i, np.uint8)).save(place / f"{i}.png")
        return tmp_path

    def test_only_kept_images_are_read(self, folder, monkeypatch):
        from holdfast.tasks.image_files import Opener

        opened: list[Path] = []
        real = Opener.open
        monkeypatch.setattr(Opener, "open", lambda self, file: (opened.append(file), real(self, file))[1])
        task = load_task("pictures@train_limit=12,test_limit=3", data_dir=folder)
        assert (task.size("train"), task.size("test"), len(opened)) == (12, 3, 15)
        assert torch.bincount(task._y["train"]).tolist() == [4, 4, 4]
        same = load_task("pictures@train_limit=12,test_limit=3", data_dir=folder)
        assert same.facts().sha256 == task.facts().sha256
        other = load_task("pictures@train_limit=12,test_limit=3,seed=1", data_dir=folder)
        assert other.facts().sha256 != task.facts().sha256

    def test_without_limits_all_is_read(self, folder):
        task = load_task("pictures", data_dir=folder)
        assert (task.size("train"), task.size("test")) == (24, 12)


@pytest.mark.parametrize("there", [True, False])
def test_the_digits_are_those_that_scikit_learn_reads(there, monkeypatch, tmp_path):
    from sklearn.datasets import load_digits

    from holdfast.tasks.builtin import digits

    if not there:
        monkeypatch.setattr(digits, "located", lambda _: str(tmp_path))
    theirs = load_digits()
    for own, other in zip(digits._read(), (theirs.images, theirs.target), strict=True):
        assert own.dtype == other.dtype
        assert (own == other).all()
