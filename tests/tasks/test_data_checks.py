"""Checks of loaded tasks: the summary, leaks and refusals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.results import TaskFacts
from holdfast.tasks import ArrayTask, DenoisingTask, RegressionTask, load_task, located
from holdfast.tasks.data_checks import HELD, SHARED, validate
from holdfast.tasks.paths import place


def images(seed: int, count: int = 40, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8), np.arange(count) % classes


def task(seed: int, name: str = "mine", test: int | None = None) -> ArrayTask:
    return ArrayTask(name, *images(seed), *images(seed + 50 if test is None else test))


def table(path: Path, *lines: str, encoding: str = "utf-8") -> str:
    path.write_text("\n".join(lines), encoding=encoding)
    return str(path)


ROWS = [f"{i % 7},{'ab'[i % 2]},{'train' if i % 4 else 'test'}" for i in range(40)]


class TestReading:
    def test_a_summary_of_what_was_read(self):
        found = validate({"benign": task(0), "restricted": task(1)})
        read = found.facts["benign"].read
        assert read is not None
        assert (read.samples, read.class_names, read.shape) == (
            {"train": [20, 20], "test": [20, 20]},
            ["0", "1"],
            [3, 4, 4],
        )
        assert (read.low, read.high) == (0, 255)
        assert "40 training and 40 test samples, 2 classes (0, 1), 20 training samples each" in found.lines()[0]
        assert found.flags == []

    def test_the_hash_is_that_of_the_data(self):
        assert validate({"benign": task(0)}).facts["benign"].sha256 == task(0).facts().sha256

    def test_facts_of_former_versions_are_read(self):
        old = {"name": "digits", "sha256": "0", "train": 3, "test": 2, "classes": 2}
        assert TaskFacts.model_validate(old).read is None

    def test_notes_outlive_narrowing(self, tmp_path):
        x, y = images(0)
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4], extra=y)
        for spec in ("a.npz", "a.npz[1,0]", "a.npz@channels=1", "a.npz@train_limit=10", "a.npz@kind=denoising"):
            assert load_task(f"{tmp_path}/{spec}").notes == ("arrays left out: extra",)

    def test_duplicates_and_contradictions_are_noted(self):
        (x, y), held = images(0), images(9)
        x[1] = x[0]
        read = validate({"benign": ArrayTask("a", x, y, *held)}).facts["benign"].read
        assert read is not None
        assert "1 of 40 training inputs are duplicates of others" in read.notes
        assert "2 training inputs come with different labels" in read.notes

    def test_names_that_differ_in_capitals_are_noted(self):
        named = ArrayTask("a", *images(0), *images(1), ["Cat", "cat"])
        assert "differ only in case: Cat, cat" in "; ".join(validate({"benign": named}).lines())


class TestLeaks:
    def test_test_samples_in_training(self):
        (x, y), (held, answers) = images(0), images(1)
        held[:10] = x[:10]
        found = validate({"benign": task(5), "restricted": ArrayTask("leaky", x, y, held, answers)})
        assert [(f.name, f.severity) for f in found.flags] == [(HELD, "warning")]
        assert "10 of 40 test samples (25.0%) are among the training samples" in found.flags[0].found

    def test_shared_samples(self):
        benign = task(0)
        (x, y), held = images(1), images(2)
        x[:8] = images(0)[0][:8]
        found = validate({"benign": benign, "restricted": ArrayTask("near", x, y, *held)})
        assert [f.name for f in found.flags] == [SHARED]
        assert "8 of 80 samples (10.0%) are also in the benign task mine" in found.flags[0].found

    def test_the_same_task_is_refused_in_any_order_and_numbering(self):
        x, y = images(0)
        other = ArrayTask("again", x[::-1], 1 - y[::-1], *images(7))
        with pytest.raises(HoldfastError, match="'again' and the benign task 'mine' are the same data"):
            validate({"s: benign": task(0), "s: restricted": other})

    def test_other_kinds(self):
        x, y = images(0)
        held = images(1)
        same = {"benign": DenoisingTask("a", x, y, *held), "restricted": DenoisingTask("b", x, 0 * y, held[0], 0 * y)}
        with pytest.raises(HoldfastError, match="the same data"):
            validate(same)
        rng = np.random.default_rng(0)
        inputs, targets = rng.normal(size=(20, 3)), rng.normal(size=20)
        with pytest.raises(HoldfastError, match="the same data"):
            validate({k: RegressionTask(k, inputs, targets, inputs, targets) for k in ("benign", "restricted")})
        other = RegressionTask("other", inputs, -targets, inputs[:5], targets[:5])
        found = validate({"benign": RegressionTask("own", inputs, targets, inputs, targets), "restricted": other})
        assert {f.name for f in found.flags} == {HELD, SHARED}

    def test_two_labels_of_the_same_samples_are_a_warning(self):
        x, _ = images(0)
        a, b = np.arange(40) % 2, np.arange(40) // 20
        held = images(1)[0]
        found = validate({"benign": ArrayTask("a", x, a, held, a), "restricted": ArrayTask("b", x, b, held, b)})
        assert [f.name for f in found.flags] == [SHARED]

    @pytest.mark.parametrize("verb", ["immunize", "audit", "feasibility"])
    def test_every_verb_refuses(self, verb, benign, trained):
        calls = {
            "immunize": lambda: holdfast.immunize(trained, benign=benign, restricted=benign, device="cpu"),
            "audit": lambda: holdfast.audit(
                trained, original=trained, benign=benign, restricted=benign, device="cpu", seeds=1, budgets=(0, 1)
            ),
            "feasibility": lambda: holdfast.feasibility(benign, benign, device="cpu"),
        }
        with pytest.raises(HoldfastError, match="are the same data"):
            calls[verb]()


class TestClasses:
    def test_labels_from_one(self):
        x, y = images(0)
        with pytest.raises(HoldfastError, match=r"no training sample has label 0.*number the classes from 0"):
            ArrayTask("a", x, y + 1, x, y + 1)

    def test_a_label_of_the_test_split_alone(self):
        x, y = images(0)
        with pytest.raises(HoldfastError, match=r"class 'c' .label 2. has no training samples, and 20 test samples"):
            ArrayTask("a", x, y, x, 2 * y, ["a", "b", "c"])
        with pytest.raises(HoldfastError, match="label -1, which often marks samples without a label"):
            ArrayTask("a", x, y, x, np.full(40, -1))

    def test_a_named_class_without_samples_can_be_left_out(self):
        x, y = images(0)
        empty = ArrayTask("a", x, y, *images(1), ["a", "b", "c"])
        with pytest.raises(HoldfastError, match=r"class 'c' \(label 2\) has no training samples"):
            validate({"benign": empty})
        validate({"benign": empty.subset([0, 1])})

    def test_a_name_twice(self):
        with pytest.raises(HoldfastError, match="two classes are called 'a'"):
            ArrayTask("a", *images(0), *images(1), ["a", "a"])

    def test_a_dot_behind_the_labels_of_the_test_rows(self, tmp_path):
        rows = [f"{i},{'<>'[i % 2]}50K{'.' if i % 4 == 0 else ''},{'train' if i % 4 else 'test'}" for i in range(40)]
        with pytest.raises(HoldfastError, match=r"class '<50K\.' .* has no training samples, and 10 test samples"):
            load_task(table(tmp_path / "adult.csv", "n,income,split", *rows) + "@target=income")


class TestTables:
    @pytest.mark.parametrize(("sign", "said"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
    def test_other_separators(self, tmp_path, sign, said):
        lines = [line.replace(",", sign) for line in ("n,y,split", *ROWS)]
        found = load_task(table(tmp_path / "t.csv", *lines, encoding="utf-8-sig") + "@target=y")
        assert (found.input_shape, found.class_names, found.size("test")) == ((1,), ["a", "b"], 10)
        assert f"cells are separated by {said}" in found.notes

    def test_blanks_and_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "t.csv"
        plain = load_task(table(path, "n,y,split", *ROWS) + "@target=y")
        spaced = [line.replace(",", " , ") for line in ("n,y,split", *ROWS)]
        found = load_task(table(path, *spaced, encoding="utf-8-sig") + "@target=y")
        assert found.facts().sha256 == plain.facts().sha256
        assert found.class_names == ["a", "b"]

    @pytest.mark.parametrize("word", ["val", "valid", "Validation", "dev", "testing"])
    def test_words_of_a_split(self, tmp_path, word):
        rows = [row.replace("test", word) for row in ROWS]
        found = load_task(table(tmp_path / "t.csv", "n,y,split", *rows) + "@target=y")
        assert (found.size("train"), found.size("test")) == (30, 10)
        third = [row.replace("test", word) if i % 8 else row for i, row in enumerate(ROWS)]
        if word != "testing":
            kept = load_task(table(tmp_path / "t.csv", "n,y,split", *third) + "@target=y")
            assert kept.size("test") == 5

    @pytest.mark.parametrize(
        ("header", "rows", "message"),
        [
            ("n,n,y", ["1,2,a", "2,1,b"] * 9, "two columns called 'n'"),
            ("n,y", ["1,2,a", "2,1,b"] * 9, "more cells than its header has names"),
            ("y", ["a", "b"] * 9, "no column beside the target"),
        ],
    )
    def test_refused(self, tmp_path, header, rows, message):
        with pytest.raises(HoldfastError, match=message):
            load_task(table(tmp_path / "t.csv", header, *rows) + "@target=y")

    def test_an_empty_file(self, tmp_path):
        with pytest.raises(HoldfastError, match="cannot be read as CSV"):
            load_task(table(tmp_path / "t.csv", "") + "@target=y")

    def test_an_index_is_left_out_and_one_with_a_name_is_noted(self, tmp_path):
        rows = [f"{i},{i % 7},{'ab'[i % 2]}" for i in range(40)]
        bare = load_task(table(tmp_path / "t.csv", ",n,y", *rows) + "@target=y")
        assert bare.input_shape == (1,)
        assert "counts the rows, was left out" in bare.notes[0]
        named = load_task(table(tmp_path / "t.csv", "id,n,y", *rows) + "@target=y")
        assert named.input_shape == (2,)
        assert "column 'id' counts the rows" in named.notes[0]

    def test_classes_are_chosen_by_names_that_are_numbers(self, tmp_path):
        rows = [f"{i % 7},{1 + i % 5}" for i in range(60)]
        assert load_task(table(tmp_path / "t.csv", "n,stars", *rows) + "[1,5]@target=stars").class_names == ["1", "5"]

    def test_parquet_of_lists(self, tmp_path):
        pd = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        frame = pd.DataFrame({"text": [["a"], ["b"]] * 9, "label": [0, 1] * 9})
        frame.to_parquet(tmp_path / "t.parquet")
        with pytest.raises(HoldfastError, match="column 'text' holds ndarray, not text"):
            load_task(f"{tmp_path}/t.parquet@tokenizer=words")


class TestIdleSettings:
    @pytest.mark.parametrize(
        ("spec", "key"),
        [
            ("digits@target=y", "target"),
            ("digits@bins=3", "bins"),
            ("digits@test_fraction=0.5", "test_fraction"),
            ("digits@seed=3", "seed"),
            ("a.npz@target=y", "target"),
            ("a.npz@drop=n", "drop"),
            ("a.npz@encoding=ordinal", "encoding"),
            ("a.npz@rows=4", "rows"),
            ("a.npz@fill=true", "fill"),
            ("a.npz@seed=1", "seed"),
            ("t.csv@target=y,image_size=8", "image_size"),
            ("t.csv@target=y,test_fraction=0.5", "test_fraction"),
            ("t.csv@target=n,kind=regression,bins=3", "bins"),
            ("phrases-mood@tokenizer=words,text=a", "text"),
            ("phrases-mood@tokenizer=words,rows=4", "rows"),
            ("mnist@bins=4", "bins"),
        ],
    )
    def test_are_refused(self, tmp_path, monkeypatch, spec, key):
        x, y = images(0)
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        table(tmp_path / "t.csv", "n,y,split", *ROWS)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(HoldfastError, match=f"{key} has no effect on"):
            load_task(spec)

    def test_a_seed_that_draws_is_taken(self):
        assert load_task("digits@seed=3,train_limit=100").size("train") < 110


class TestPlaces:
    @pytest.fixture
    def both(self, tmp_path, monkeypatch):
        here, there = tmp_path / "here", tmp_path / "there"
        for folder, seed in ((here, 0), (there, 1)):
            folder.mkdir()
            x, y = images(seed)
            np.savez(folder / "cars.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        monkeypatch.chdir(here)
        monkeypatch.setenv("HOLDFAST_DATA", str(there))
        return here, there

    def test_a_path_is_that_path(self, both):
        here, there = both
        own, other = (load_task(str(folder / "cars.npz")).facts().sha256 for folder in (here, there))
        assert load_task("./cars.npz").facts().sha256 == own
        assert load_task("cars").facts().sha256 == other
        with pytest.raises(HoldfastError, match=r"is both '.*here/cars\.npz' and '.*there/cars\.npz'"):
            load_task("cars.npz")
        (there / "cars.npz").unlink()
        assert load_task("cars.npz").facts().sha256 == own

    def test_the_same_rule_for_folders_and_weights(self, both):
        from holdfast.models.spec import find_weights

        here, there = both
        for folder in both:
            (folder / "words").mkdir()
            (folder / "w").mkdir()
            (folder / "w" / "m.safetensors").write_text("")
        with pytest.raises(HoldfastError, match="is both"):
            located("words")
        with pytest.raises(HoldfastError, match="is both"):
            find_weights("w/m.safetensors", None)
        assert find_weights("./w/m.safetensors", None) == Path("w/m.safetensors")
        assert located("./words") == "words"
        (here / "w" / "m.safetensors").unlink()
        assert find_weights("w/m.safetensors", None) == there / "w" / "m.safetensors"
        with pytest.raises(HoldfastError, match="No weights at"):
            find_weights("./w/m.safetensors", None)

    def test_the_data_folder_may_be_here(self, both):
        here, _ = both
        assert place("cars.npz", here) == Path("cars.npz")

    def test_a_folder_here_comes_before_a_download(self, tmp_path, monkeypatch):
        from PIL import Image

        for name in ("a", "b"):
            (tmp_path / "cifar10" / name).mkdir(parents=True)
            for i in range(8):
                Image.new("L", (4, 4), i).save(tmp_path / "cifar10" / name / f"{i}.png")
        monkeypatch.chdir(tmp_path)
        assert load_task("cifar10@channels=1").class_names == ["a", "b"]

    def test_embedded_data_and_a_folder_of_that_name(self, tmp_path, monkeypatch):
        (tmp_path / "digits").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(HoldfastError, match=r"both a named task and a folder here; write ./digits"):
            load_task("digits")

    @pytest.mark.parametrize("folder", ["a@b", "a[1]", "a@b[0-1]"])
    def test_signs_in_a_path(self, tmp_path, folder):
        (tmp_path / folder).mkdir()
        x, y = images(0, classes=3)
        np.savez(tmp_path / folder / "cars.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        assert load_task(f"{tmp_path}/{folder}/cars.npz").num_outputs == 3
        assert load_task(f"{tmp_path}/{folder}/cars.npz[0,2]@channels=1").class_names == ["0", "2"]


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda x: x / 255, "(255 * x).round().astype('uint8')"),
        (lambda x: x > 127, "x.astype('uint8') * 255"),
        (lambda x: (x > 127).astype(int), "x.astype('uint8') * 255"),
        (lambda x: x.astype(int), "x.round().astype('uint8')"),
        (lambda x: x.astype(np.uint16) * 257, "x / 257 for 16"),
        (lambda x: x / 127.5 - 1, "undo the normalisation first"),
        (lambda x: np.where(x == x.max(), np.nan, x), "NaN and infinite"),
        (lambda x: np.concatenate([x, x[..., :1]], -1), "put transparent pixels on white"),
    ],
)
def test_the_remedy_for_images_of_another_form_is_the_right_one(change, remedy):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (8, 5, 5, 3), dtype=np.uint8), np.arange(8) % 2
    with pytest.raises(HoldfastError, match=re.escape(remedy)):
        ArrayTask("a", change(x), y, x, y)


def test_names_of_classes_in_bytes_are_read_as_text(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (8, 5, 5), dtype=np.uint8), np.arange(8) % 2
    other = rng.integers(0, 256, (8, 5, 5), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=other, y_test=y, class_names=np.array([b"cat", b"dog"]))
    assert load_task(str(tmp_path / "a.npz")).class_names == ["cat", "dog"]
