"""Images with captions from folders with a list of them, from `.parquet` files and from arrays."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holdfast.errors import HoldfastError
from holdfast.tasks import TaskSpec, TextToImageTask, is_text, load_task
from holdfast.tasks.text_to_image import caption_tokens

CPU = torch.device("cpu")


def shade(i: int) -> np.ndarray:
    """An image of one grey, which tells its number."""
    return np.full((6, 6, 3), 10 + i, np.uint8)


def said(i: int) -> str:
    return f"picture {i}, grey"


def write(folder: Path, numbers, *, under: str = "", suffix: str = ".csv", column: str = "text") -> Path:
    """Images with a list of them in one folder; returns the list."""
    (folder / under).mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{under}{i}.png", column: said(i)} for i in numbers]
    for i in numbers:
        Image.fromarray(shade(i)).save(folder / f"{under}{i}.png")
    return listed(folder, rows, suffix)


def listed(folder: Path, rows, suffix: str = ".csv") -> Path:
    import pandas as pd

    file = folder / f"metadata{suffix}"
    table = pd.DataFrame(rows)
    if suffix == ".csv":
        table.to_csv(file, index=False)
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pytest.importorskip("pyarrow")
        table.to_parquet(file)
    return file


def load(path, settings: str = "") -> TextToImageTask:
    task = load_task(f"{path}@kind=text-to-image{settings}")
    assert isinstance(task, TextToImageTask)
    return task


def pairs(task: TextToImageTask, split: str) -> set[tuple[int, str]]:
    """The grey of each image with its caption."""
    captions = task.captions
    return {(int(x.max()), captions[y]) for x, y in zip(task._x[split], task._y[split], strict=True)}


def wanted(*numbers: int) -> set[tuple[int, str]]:
    return {(10 + i, said(i)) for i in numbers}


def refused(path, *words: str, settings: str = "") -> None:
    with pytest.raises(HoldfastError) as error:
        load(path, settings)
    for word in words:
        assert word in str(error.value)


class TestFolders:
    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    @pytest.mark.parametrize("under", ["", "images/deep/"])
    def test_every_image_has_its_caption(self, tmp_path, suffix, under):
        write(tmp_path / "pics", range(8), under=under, suffix=suffix)
        task = load(tmp_path / "pics")
        assert (task.size("train"), task.size("test"), task.drawn) == (6, 2, True)
        assert pairs(task, "train") | pairs(task, "test") == wanted(*range(8))
        assert task.source == f"folder {tmp_path / 'pics'}"
        assert load(tmp_path / "pics", ",seed=1").facts().sha256 != task.facts().sha256

    @pytest.mark.parametrize(("train", "test"), [("train", "test"), ("training", "validation")])
    def test_two_folders_are_the_split(self, tmp_path, train, test):
        write(tmp_path / "pics" / train, range(5))
        write(tmp_path / "pics" / test, range(5, 8), suffix=".jsonl")
        task = load(tmp_path / "pics")
        assert not task.drawn
        assert (pairs(task, "train"), pairs(task, "test")) == (wanted(*range(5)), wanted(5, 6, 7))

    @pytest.mark.parametrize("by", ["column", "folders"])
    def test_one_list_may_say_the_split(self, tmp_path, by):
        parts = ["train"] * 4 + ["test"] * 2 + ["validation"]
        rows = []
        for i, part in enumerate(parts):
            name = f"{part}/{i}.png" if by == "folders" else f"{i}.png"
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(shade(i)).save(tmp_path / name)
            rows.append({"file_name": name, "text": said(i)} | ({"split": part} if by == "column" else {}))
        listed(tmp_path, rows)
        task = load(tmp_path)
        assert (pairs(task, "train"), pairs(task, "test")) == (wanted(0, 1, 2, 3), wanted(4, 5))
        assert "1 rows for validation were left out" in "; ".join(task.notes)

    @pytest.mark.parametrize("column", ["caption", "prompt"])
    def test_the_column_is_guessed_or_named(self, tmp_path, column):
        write(tmp_path, range(6), column=column)
        task = load(tmp_path)
        assert task.facts().sha256 == load(tmp_path, f",text={column}").facts().sha256
        listed(tmp_path, [{"file_name": f"{i}.png", "caption": "a", "prompt": said(i)} for i in range(6)])
        refused(tmp_path, "has the columns caption, prompt", "Name their column: text=COLUMN")
        assert pairs(load(tmp_path, ",text=prompt"), "train") <= wanted(*range(6))
        refused(tmp_path, "Unknown column of metadata.csv 'promt'", "did you mean 'prompt'", settings=",text=promt")
        refused(tmp_path, "text is caption+prompt", "expected one column", settings=",text=caption+prompt")

    def test_names_and_captions_are_read_as_they_are_written(self, tmp_path):
        for i in range(8):
            Image.fromarray(shade(i)).save(tmp_path / f"00{i}", format="PNG")
        texts = ["007", "None", "a_b", "  NA ", *"wxyz"]
        rows = "".join(f"00{i},{text}\n" for i, text in enumerate(texts))
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
        assert load(tmp_path).captions == ["007", "NA", "None", "a_b", *"wxyz"]
        assert load(tmp_path, ",caption=see {}").captions[0] == "see 007"

    def test_images_that_are_listed_nowhere_are_counted(self, tmp_path):
        write(tmp_path, range(8))
        for name in ("more.png", ".hidden.png"):
            Image.fromarray(shade(90)).save(tmp_path / name)
        task = load(tmp_path)
        assert "1 images without a caption were left out, such as more.png" in "; ".join(task.notes)
        assert pairs(task, "train") | pairs(task, "test") == wanted(*range(8))

    def test_limits_read_a_part_of_given_splits(self, tmp_path):
        write(tmp_path / "train", range(10))
        write(tmp_path / "test", range(10, 20))
        (tmp_path / "train" / "3.png").write_bytes(b"not an image")
        refused(tmp_path, "3.png' cannot be opened as an image")
        drawn = next(s for s in range(9) if 3 not in np.random.default_rng(s).permutation(10)[:4])
        task = load(tmp_path, f",train_limit=4,test_limit=3,seed={drawn}")
        assert (task.size("train"), task.size("test")) == (4, 3)
        assert pairs(task, "train") < wanted(*range(10))
        assert pairs(task, "test") < wanted(*range(10, 20))

    def test_sizes_and_channels(self, tmp_path):
        write(tmp_path, range(6))
        Image.fromarray(np.full((9, 12, 3), 99, np.uint8)).save(tmp_path / "2.png")
        refused(tmp_path, "2.png' is 12x9 and others are 6x6; give image_size")
        task = load(tmp_path, ",image_size=8,channels=1")
        assert (task.input_shape, task.output_shape) == ((3, 8, 8), (1, 8, 8))
        assert load(tmp_path, ",image_size=8").input_shape == (5, 8, 8)

    def test_a_batch_shows_each_image_with_its_caption(self, tmp_path):
        write(tmp_path, range(8))
        task = load(tmp_path, ",caption_dropout=0,length=6")
        batch = next(task.batches("train", 6, generator=torch.Generator().manual_seed(0), device=CPU))
        t = batch.x[:, -1, 0, 0].long()
        a = task.schedule.alpha_bar[t].double().view(-1, 1, 1, 1)
        clean = (batch.x[:, :3].double() - (1 - a).sqrt() * batch.y.double()) / a.sqrt()
        greys = ((clean + 1) * 127.5).flatten(1).median(1).values
        told = caption_tokens(batch.x[:, -2])
        early = t < 700  # later, too little of the image is left for float32
        assert early.sum() >= 3
        for grey, row in zip(greys[early], told[early], strict=True):
            expected = task.tokenizer.encode([said(round(float(grey)) - 10)], 6)
            assert row.tolist() == expected[0].tolist()


class TestRefusals:
    @pytest.fixture
    def pics(self, tmp_path):
        write(tmp_path / "pics", range(4))
        return tmp_path / "pics"

    @staticmethod
    def change(pics, row: int, **cells) -> None:
        rows = [{"file_name": f"{i}.png", "text": said(i)} for i in range(4)]
        rows[row] |= cells
        listed(pics, rows)

    @pytest.mark.parametrize(
        ("cells", "words"),
        [
            ({"file_name": "gone.png"}, ("line 4", "there is no file 'gone.png'", "1 of 4", "remove the rows")),
            ({"file_name": ""}, ("line 4", "file_name is empty")),
            ({"file_name": "/etc/passwd"}, ("line 4", "'/etc/passwd'", "outside of the folder")),
            ({"file_name": "../secret.png"}, ("line 4", "'../secret.png'", "outside of the folder")),
            ({"file_name": "a\\..\\..\\b.png"}, ("line 4", "outside of the folder")),
            ({"file_name": "C:\\b.png"}, ("line 4", "outside of the folder")),
            ({"file_name": "./1.png"}, ("line 4", "'./1.png' is listed twice, first in line 3", "Remove one")),
            ({"text": ""}, ("line 4", "column 'text' is empty", "1 of 4 rows have no caption", "remove the rows")),
            ({"text": "   "}, ("line 4", "column 'text' is empty")),
        ],
        ids=str,
    )
    def test_a_row_of_a_list(self, pics, cells, words):
        Image.fromarray(shade(9)).save(pics.parent / "secret.png")
        self.change(pics, 2, **cells)
        refused(pics, "metadata.csv", *words)

    def test_rows_of_json(self, pics):
        (pics / "metadata.csv").unlink()
        listed(pics, [{"file_name": "0.png", "text": ["a", "b"]}, {"file_name": "1.png", "text": "c"}], ".jsonl")
        refused(pics, "metadata.jsonl', line 1", "(list)", "1 of 2 rows have no caption")
        listed(pics, [{"text": "c"}, {"file_name": "1.png", "text": "c"}], ".jsonl")
        refused(pics, "line 1: file_name is empty")
        (pics / "metadata.jsonl").write_text("{]")
        refused(pics, "metadata.jsonl', row 0: it is not JSON")

    def test_lists_as_a_whole(self, pics):
        listed(pics, [{"image": "0.png", "text": "a"}])
        refused(pics, "has the columns image, text; expected file_name")
        listed(pics, [{"file_name": "0.png", "label": "a"}])
        refused(pics, "has the columns label; expected captions in text")
        listed(pics, [{"file_name": "0.png"}])
        refused(pics, "has no column for captions")
        (pics / "metadata.csv").write_text("file_name,text\n")
        refused(pics, "has no rows")
        (pics / "metadata.csv").write_text("")
        refused(pics, "metadata.csv' cannot be read as CSV")
        (pics / "metadata.csv").write_text("file_name,text\n0.png,a dog, running\n")
        refused(pics, "its rows have more cells than its header has names")
        listed(pics, [{"file_name": "0.png", "text": "a"}])
        refused(pics, "class 'images with captions' has 1 sample")
        listed(pics, [{"file_name": "0.png", "text": "a"}], ".jsonl")
        refused(pics, "holds metadata.csv and metadata.jsonl; expected one list")

    def test_one_of_two_folders_without_a_list(self, tmp_path):
        write(tmp_path / "train", range(3))
        refused(tmp_path, "holds the folders train; expected one for training", "one for testing")
        write(tmp_path / "test", range(3, 5)).unlink()
        refused(tmp_path, "test' holds none of metadata.csv", "expected one list")

    def test_all_images_alike(self, tmp_path):
        write(tmp_path, [0, 1])  # one of two is for testing
        refused(tmp_path, "all pixels of its test images are the same")

    def test_the_kind_is_suggested(self, pics, tmp_path):
        hint = r"It holds images with captions.*@kind=text-to-image"
        with pytest.raises(HoldfastError, match=hint):
            load_task(str(pics))
        write(tmp_path / "both" / "train", range(4))
        write(tmp_path / "both" / "test", range(4))
        with pytest.raises(HoldfastError, match=hint):
            load_task(str(tmp_path / "both"))

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    def test_a_list_in_place_of_its_folder(self, pics, suffix):
        file = listed(pics, [{"file_name": "0.png", "text": "a"}], suffix)
        refused(file, "lists the images of a folder; give the folder", repr(str(pics)))
        refused(file.rename(pics / "list.csv"), "images with captions are read from .npz, .parquet or a folder")

    def test_settings_without_effect(self, pics, tmp_path):
        refused(pics, "target has no effect on images with captions", settings=",target=text")
        refused("digits", "text has no effect on digits", settings=",text=prompt")
        for i in range(4):
            (tmp_path / "by-class" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(shade(i)).save(tmp_path / "by-class" / "ab"[i % 2] / f"{i}.png")
        refused(tmp_path / "by-class", "text has no effect on by-class", settings=",text=prompt")


def stored(i: int) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(shade(i)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{i}.png"}


class TestParquet:
    @pytest.fixture(autouse=True)
    def _pyarrow(self):
        pytest.importorskip("pyarrow")

    def table(self, path: Path, *, meta=None, **columns) -> Path:
        import pandas as pd
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pandas(pd.DataFrame(columns))
        if meta is not None:
            stored_meta = json.dumps({"info": {"features": meta}}).encode()
            table = table.replace_schema_metadata({b"huggingface": stored_meta})
        parquet.write_table(table, path)
        return path

    def test_images_and_captions_of_one_file(self, tmp_path):
        path = self.table(
            tmp_path / "pics.parquet", image=[stored(i) for i in range(8)], text=list(map(said, range(8)))
        )
        task = load(path)
        assert (task.name, task.size("train"), task.drawn) == ("pics", 6, True)
        assert pairs(task, "train") | pairs(task, "test") == wanted(*range(8))
        named = load_task(TaskSpec(data="pics", kind="text-to-image"), data_dir=tmp_path)
        assert named.facts().sha256 == task.facts().sha256
        assert not is_text(f"{path}@kind=text-to-image")
        assert not is_text(str(path))

    def test_a_split_and_labels_with_names(self, tmp_path):
        columns = {"pic": [stored(i) for i in range(4)], "label": [1, 0, 1, 0], "split": ["train"] * 2 + ["test"] * 2}
        meta = {"label": {"names": ["a_cat", "a_dog"], "_type": "ClassLabel"}, "pic": {"_type": "Image"}}
        task = load(self.table(tmp_path / "p.parquet", meta=meta, **columns), ",text=label")
        assert pairs(task, "train") == {(10, "a_dog"), (11, "a_cat")}
        assert pairs(task, "test") == {(12, "a_dog"), (13, "a_cat")}

    def test_sixteen_bits_are_scaled(self, tmp_path):
        cells = []
        for value in (0, 30_000, 65_535, 65_535):
            file = io.BytesIO()
            Image.fromarray(np.full((6, 6), value, np.uint16)).save(file, "PNG")
            cells.append({"bytes": file.getvalue()})
        path = self.table(tmp_path / "deep.parquet", image=cells, text=list("abcd"), split=["train", "test"] * 2)
        task = load(path, ",channels=1")
        assert {(int(x.max())) for split in ("train", "test") for x in task._x[split]} == {0, round(30_000 / 257), 255}

    def test_what_is_wrong_is_said(self, tmp_path):
        good, texts = [stored(i) for i in range(3)], ["a", "b", "c"]
        path = self.table(tmp_path / "p.parquet", image=[*good[:2], {"bytes": None, "path": "2.png"}], text=texts)
        refused(path, "p.parquet', row 2", "only the path '2.png'", "Save the table with its images")
        path = self.table(tmp_path / "p.parquet", image=[*good[:2], {"bytes": b"GIF", "path": None}], text=texts)
        refused(path, "p.parquet, row 2' cannot be opened as an image")
        path = self.table(tmp_path / "p.parquet", image=[*good[:2], None], text=texts)
        refused(path, "row 2: column 'image' holds no image")
        path = self.table(tmp_path / "p.parquet", one=good, two=good, text=texts)
        refused(path, "has the columns of images one, two; expected one, called image")
        path = self.table(tmp_path / "p.parquet", number=[1, 2, 3], text=texts)
        refused(path, "has no column of images")
        path = self.table(tmp_path / "p.parquet", image=good, text=[["a", "b"]] * 3)
        refused(path, "row 0: column 'text' is", "3 of 3 rows have no caption")
        (tmp_path / "p.parquet").write_bytes(b"PAR1 damaged")
        refused(tmp_path / "p.parquet", "cannot be read as parquet")

    def test_the_kind_is_suggested_and_tables_of_sentences_stay_so(self, tmp_path):
        meta = {"sound": {"_type": "Audio"}}
        columns = {"text": list("abcd"), "label": [0, 1, 0, 1]}
        path = self.table(tmp_path / "p.parquet", image=[stored(i) for i in range(4)], **columns)
        with pytest.raises(HoldfastError, match=r"has a column of images.*@kind=text-to-image"):
            load_task(str(path))
        assert is_text(f"{path}@text=text")
        sounds = self.table(tmp_path / "s.parquet", meta=meta, sound=[stored(i) for i in range(4)], **columns)
        assert is_text(str(sounds))


class TestArrays:
    @staticmethod
    def arrays(**more):
        x = np.stack([shade(i) for i in range(6)])
        given = {
            "x_train": x[:4], "x_test": x[4:],
            "captions_train": [said(i) for i in range(4)], "captions_test": [said(4), said(5)],
        }  # fmt: skip
        return {k: v for k, v in {**given, **more}.items() if v is not None}

    def test_each_image_has_its_caption(self, tmp_path):
        np.savez(tmp_path / "pics.npz", **self.arrays())
        task = load(tmp_path / "pics.npz")
        assert (pairs(task, "train"), pairs(task, "test")) == (wanted(0, 1, 2, 3), wanted(4, 5))
        assert task.notes == ()

    def test_captions_come_before_labels(self, tmp_path):
        more = {"y_train": [0, 1, 0, 1], "y_test": [0, 1], "class_names": ["cat_a", "dog_b"]}
        np.savez(tmp_path / "pics.npz", **self.arrays(**more))
        assert pairs(load(tmp_path / "pics.npz"), "train") == wanted(0, 1, 2, 3)
        assert "captions_train" in load_task(str(tmp_path / "pics.npz")).notes[0]
        np.savez(tmp_path / "plain.npz", **self.arrays(captions_train=None, captions_test=None, **more))
        assert load(tmp_path / "plain.npz", ",caption=a {}").captions == ["a cat a", "a dog b"]

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"captions_test": None}, "lacks captions_test"),
            ({"captions_test": ["one"]}, r"captions_test has dtype <U3 and shape \(1,\); expected one text an image"),
            ({"captions_test": [1, 2]}, "captions_test has dtype int64"),
            ({"captions_train": ["a", " ", "b", "c"]}, "captions_train is empty for 1 images, first in row 1"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said(self, tmp_path, more, words):
        np.savez(tmp_path / "pics.npz", **self.arrays(**more))
        with pytest.raises(HoldfastError, match=words):
            load(tmp_path / "pics.npz")


class TestClasses:
    def test_underscores_of_class_names_are_blanks(self, tmp_path):
        for i in range(8):
            folder = tmp_path / "pets" / ("golden_retriever", "black_cat")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shade(i)).save(folder / f"{i}.png")
        task = load(tmp_path / "pets", ",caption=a photo of a {}")
        assert task.captions == ["a photo of a black cat", "a photo of a golden retriever"]

    def test_unless_two_would_be_called_alike(self, tmp_path):
        x = np.stack([shade(i) for i in range(4)])
        arrays = {"x_train": x, "y_train": [0, 1, 0, 1], "x_test": x, "y_test": [0, 1, 0, 1]}
        np.savez(tmp_path / "a.npz", **arrays, class_names=["a_b", "a b"])
        assert load(tmp_path / "a.npz").captions == ["a_b", "a b"]

    def test_more_captions_than_training_images(self, tmp_path):
        """Numbers of classes are refused when they are far above the number of images; captions are not."""
        x = np.zeros((1300, 5, 5), np.uint8)
        x[:, 0] = 9
        texts = [f"c{i}" for i in range(1300)]
        np.savez(
            tmp_path / "a.npz", x_train=x[:200], x_test=x[200:], captions_train=texts[:200], captions_test=texts[200:]
        )
        assert len(load(tmp_path / "a.npz").captions) == 1300
