"""Tasks of sentences: reading, truncation, classes and refusals."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_downloads import fake_datasets

from holdfast.errors import HoldfastError
from holdfast.tasks import TaskSpec, TextTask, Vocabulary, is_text, load_task, load_tokenizer, located
from holdfast.tasks.downloads import TEXTS
from holdfast.tasks.spec import parse_spec
from holdfast.tasks.splits import halves
from texts import save_tokenizer, write_reviews

VOCABULARY = Vocabulary("toy", 8, 0, "0" * 64)
SENTENCES = [("train", "b", "two words"), ("train", "a", "one"), ("test", "b", "three words here"), ("dev", "a", "no")]

PHRASES = ("phrases-topic", "phrases-mood", "phrases-form")


def offline(*_, **__):
    raise OSError("no network")


def toy(x, **change):
    x = np.asarray(x)
    return TextTask("toy", x, [0, 1], x, [0, 1], vocabulary=VOCABULARY, **change)


class TestTextTask:
    def test_batches_hold_ids_as_they_are(self):
        batch = next(toy([[1, 2, 0], [3, 0, 0]]).sweep("train", 2, device=torch.device("cpu")))
        assert batch.x.dtype == torch.int64
        assert batch.x.tolist() == [[1, 2, 0], [3, 0, 0]]

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            ([[1, 8], [0, 0]], "holds the id 8; the vocabulary 'toy' has ids from 0 to 7"),
            ([[1, -1], [0, 0]], "holds the id -1"),
            ([[1.0, 2.0], [0.0, 0.0]], "float64 .*expected integers of shape .N, L."),
            ([1, 2], r"of shape \(2,\); expected integers"),
        ],
    )
    def test_arrays_that_are_not_ids_are_refused(self, x, message):
        with pytest.raises(HoldfastError, match=message):
            toy(x)

    def test_facts_tell_vocabularies_apart_and_name_the_tokenizer(self):
        x = np.array([[1, 2], [3, 0]])
        other = TextTask("toy", x, [0, 1], x, [0, 1], vocabulary=Vocabulary("toy", 8, 0, "1" * 64))
        assert toy(x).facts().tokenizer == "toy"
        assert toy(x).facts().sha256 != other.facts().sha256

    def test_features_in_the_place_of_ids_have_no_vocabulary(self):
        task = toy([[1, 2], [3, 0]])
        plain = task.with_inputs(torch.zeros(2, 5), torch.zeros(2, 5))
        assert plain.input_shape == (5,)
        assert plain.vocabulary is None
        assert plain.facts().tokenizer is None
        assert task.vocabulary == VOCABULARY


class TestTables:
    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_columns_become_sentences_and_labels(self, suffix, tmp_path):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        table = pd.DataFrame(SENTENCES, columns=["split", "label", "text"])
        path = tmp_path / f"tiny.{suffix}"
        (table.to_parquet if suffix == "parquet" else table.to_csv)(path, index=False)
        more = {"text": "text"} if suffix == "csv" else {}
        task = load_task(TaskSpec(data="tiny", tokenizer="words", length=3, **more), data_dir=tmp_path)
        words = load_tokenizer("words")
        assert task.class_names == ["a", "b"]
        assert task._y["train"].tolist() == [1, 0]
        assert task._x["train"].tolist() == words.encode(["two words", "one"], 3).tolist()
        assert task._x["test"].tolist() == words.encode(["three words here"], 3).tolist()  # not the rows for validation

    def test_titles_come_before_texts_and_empty_ones_are_left_out(self, tmp_path):
        pytest.importorskip("pyarrow")
        rows = {"split": ["train", "train", "test"], "label": [0, 1, 1], "title": ["News", None, "New"]}
        pd.DataFrame({**rows, "text": ["of today", "old", "things"]}).to_parquet(tmp_path / "news.parquet")
        task = load_task("news@tokenizer=words,length=3", data_dir=tmp_path)
        expected = load_tokenizer("words").encode(["News of today", "old"], 3)
        assert task._x["train"].tolist() == expected.tolist()
        bare = load_task("news@tokenizer=words,length=3,text=text", data_dir=tmp_path)
        assert bare._x["test"].tolist() == load_tokenizer("words").encode(["things"], 3).tolist()

    def test_columns_by_name_and_a_split_that_is_drawn(self, tmp_path):
        path = write_reviews(tmp_path)
        task = load_task(f"{path}@text=review,target=label,tokenizer=words,length=6")
        assert (task.size("train"), task.size("test"), task.input_shape) == (20, 20, (6,))
        path.write_text(path.read_text().replace("split,", "part,", 1))
        drawn = load_task(f"{path}@text=review,target=label,tokenizer=words,length=6,test_fraction=0.3,seed=1")
        assert (drawn.size("train"), drawn.size("test")) == (28, 12)
        assert torch.bincount(drawn._y["test"]).tolist() == [6, 6]

    def test_validation_takes_the_place_of_a_missing_test_split(self, tmp_path):
        rows = "split,label,text\ntrain,a,one\ntrain,b,two\ndev,a,three\n"
        (tmp_path / "t.csv").write_text(rows)
        assert load_task("t@text=text,tokenizer=words,length=2", data_dir=tmp_path).size("test") == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"text": "reveiw"}, "did you mean 'review'"),
            ({"target": "labels"}, "did you mean 'label'"),
            ({"tokenizer": None}, "is text and needs a tokenizer: reviews.csv@tokenizer=FOLDER"),
            ({"tokenizer": "nowhere"}, "no folder 'nowhere' here, and fetching it"),
            ({"image_size": 8}, "leave another kind, image_size and channels out"),
            ({"kind": "regression"}, "text is for classification"),
            ({"target": "review"}, "400 distinct values; expected at most 100"),
        ],
    )
    def test_unreadable_files_are_refused(self, change, message, tmp_path, monkeypatch):
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
        count = 400 if change.get("target") == "review" else 40
        write_reviews(tmp_path, count)
        settings = {"data": "reviews.csv", "text": "review", "target": "label", "tokenizer": "words", **change}
        with pytest.raises(HoldfastError, match=message):
            load_task(TaskSpec(**settings), data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("split", "message"),
        [(["train", "tset", "test"], "holds 'tset'; expected train, test"), (["test"] * 3, "has no 'train'")],
    )
    def test_an_invalid_split(self, split, message, tmp_path):
        table = pd.DataFrame({"split": split, "label": [0, 1, 1], "text": ["a", "b", "c"]})
        table.to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(HoldfastError, match=message):
            load_task("t@text=text,tokenizer=words", data_dir=tmp_path)

    def test_an_empty_label_is_refused(self, tmp_path):
        (tmp_path / "t.csv").write_text("split,label,text\ntrain,a,x\ntrain,,y\ntest,a,z\n")
        with pytest.raises(HoldfastError, match="'label' has 1 empty labels"):
            load_task("t@text=text,tokenizer=words", data_dir=tmp_path)

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise ImportError("no engine")

        monkeypatch.setattr(pd, "read_parquet", refuse)
        (tmp_path / "t.parquet").touch()
        with pytest.raises(HoldfastError, match=r"pip install 'holdfast\[language\]', or give a \.csv"):
            load_task("t@tokenizer=words", data_dir=tmp_path)


class TestNames:
    @pytest.mark.parametrize("key", ["text=review", "tokenizer=words", "length=8"])
    def test_settings_of_text_are_refused_for_other_data(self, key):
        with pytest.raises(HoldfastError, match=f"{key.partition('=')[0]} is for text, and its data is not text"):
            load_task(f"digits@{key}")

    def test_which_tasks_are_text(self, tmp_path):
        write_reviews(tmp_path)
        assert is_text("reviews@text=review", data_dir=tmp_path)
        assert not is_text("reviews@target=label", data_dir=tmp_path)
        assert not is_text("digits")
        assert all(map(is_text, [*PHRASES, *TEXTS]))
        (tmp_path / "sst2.npz").touch()
        assert not is_text("sst2", data_dir=tmp_path)

    def test_columns_on_a_command_line(self):
        assert parse_spec("t.csv@text=title+body").text == ("title", "body")

    @pytest.mark.parametrize("name", PHRASES)
    def test_phrases_are_the_same_every_time_and_hold_every_class(self, name):
        task = load_task(f"{name}@tokenizer=words,length=12")
        assert task.facts() == load_task(f"{name}@tokenizer=words,length=12").facts()
        assert len(torch.bincount(task._y["test"])) == task.num_outputs
        assert int((task._x["train"] != 0).sum(1).max()) < 12  # no sentence is cut off
        assert all(part.size("train") > 200 for part in halves(task))

    def test_the_sentences_of_the_three_are_not_the_same(self):
        first, second = (load_task(f"{name}@tokenizer=words,length=12")._x["train"] for name in PHRASES[:2])
        assert not torch.equal(first, second)

    def test_fewer_training_samples_keep_the_shares_of_the_classes(self):
        task = load_task("phrases-topic@tokenizer=words,length=12,train_limit=100")
        whole = load_task("phrases-topic@tokenizer=words,length=12")
        assert abs(task.size("train") - 100) <= 2
        shares = [torch.bincount(t._y["train"]).double() / t.size("train") for t in (task, whole)]
        assert (shares[0] - shares[1]).abs().max() < 0.01
        assert task.size("test") == whole.size("test")


class TestTokenizers:
    def test_rows_are_cut_and_filled_on_the_right(self, tmp_path):
        save_tokenizer(tmp_path)
        made = load_tokenizer(str(tmp_path))
        assert made.encode(["the film was", "so"], 2).tolist() == [[9, 5], [11, 0]]
        assert (made.vocabulary.size, made.vocabulary.pad, made.vocabulary.name) == (19, 0, tmp_path.name)

    def test_the_end_fills_up_where_nothing_else_does(self, tmp_path):
        save_tokenizer(tmp_path, pad=None)
        assert load_tokenizer(str(tmp_path)).vocabulary.pad == 1

    def test_vocabularies_differ_by_their_tokens_not_by_their_names(self, tmp_path):
        for name, words in (("one", ["a", "b"]), ("same", ["a", "b"]), ("other", ["b", "a"])):
            (tmp_path / name).mkdir()
            save_tokenizer(tmp_path / name, words=words)
        one, same, other = (load_tokenizer(name, tmp_path).vocabulary for name in ("one", "same", "other"))
        assert one.agrees(same)
        assert not one.agrees(other)

    def test_words_are_hashed_without_regard_to_case(self):
        ids = load_tokenizer("words").encode(["Hold FAST!", "hold fast !"], 4)
        assert ids[0].tolist() == ids[1].tolist()
        assert len(set(ids[0].tolist()[:3])) == 3

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        with pytest.raises(HoldfastError, match=r"cannot be loaded: .*Expected a folder with tokenizer\.json"):
            load_tokenizer(str(tmp_path))

    def test_a_length_that_leaves_no_room(self, tmp_path):
        fast = SimpleNamespace(num_special_tokens_to_add=lambda: 2)
        made = type(load_tokenizer("words"))(VOCABULARY, fast)
        with pytest.raises(HoldfastError, match=r"length is 2, and the tokenizer 'toy' adds 2 tokens .* at least 3"):
            made.encode(["x"], 2)


class TestPackages:
    def test_a_folder_is_found_without_running_the_package(self, tmp_path, monkeypatch):
        (tmp_path / "trap_of_text" / "model").mkdir(parents=True)
        (tmp_path / "trap_of_text" / "__init__.py").write_text("raise SystemExit('run')")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        assert located("package:trap_of_text/model") == str(tmp_path / "trap_of_text" / "model")
        assert "trap_of_text" not in sys.modules

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_thing/model", "no package 'no_such_thing' is installed; pip install no-such-thing"),
            ("os.path/model", "'os.path' is not a top-level package"),
            ("sklearn/no_such_folder", "has no folder 'no_such_folder'"),
            ("sklearn/../torch", "has no folder '../torch'"),
        ],
    )
    def test_unusable_tokenizers_are_refused(self, name, message):
        with pytest.raises(HoldfastError, match=message):
            located(f"package:{name}")


class TestDownloads:
    def part(self, names):
        class Part(dict):
            features = {"label": SimpleNamespace(names=names), "label_coarse_original": SimpleNamespace()}  # noqa: RUF012

        return Part

    @pytest.mark.parametrize("name", TEXTS)
    def test_rows_become_a_task(self, name, tmp_path, monkeypatch):
        source = TEXTS[name]
        known = name != "trec"
        labels = [0, 1, 0] if known else ["NUM", "LOC", "NUM"]
        Part = self.part(["neg", "pos"])
        parts = [Part({source.text: ["one", "two", end], source.label: labels}) for end in ("three", "four")]
        asked = fake_datasets(monkeypatch, parts)
        task = load_task(f"{name}@tokenizer=words,length=3", data_dir=tmp_path)
        assert task.class_names == (["neg", "pos"] if known else ["LOC", "NUM"])
        assert task._y["test"].tolist() == ([0, 1, 0] if known else [1, 0, 1])
        assert task._x["test"].tolist() == load_tokenizer("words").encode(["one", "two", "four"], 3).tolist()
        repository, more = asked[0]
        assert repository == source.repository
        assert len(more["revision"]) == 40
        assert more["split"] == ["train", "validation" if name == "sst2" else "test"]

    def test_without_a_network(self, tmp_path, monkeypatch):
        fake_datasets(monkeypatch, ConnectionError("no network"))
        with pytest.raises(HoldfastError, match=r"no network.*put sst2\.parquet or sst2\.csv, .* into '"):
            load_task("sst2@tokenizer=words", data_dir=tmp_path)


def test_real_sentences(data_dir):
    pytest.importorskip("pyarrow")
    sizes = {"ag_news": (12_000, 7_600, 4), "sst2": (6_920, 1_821, 2), "trec": (5_452, 500, 6)}
    for name, wanted in sizes.items():
        task = load_task(f"{name}@tokenizer=words,length=8", data_dir=data_dir)
        assert (task.size("train"), task.size("test"), task.num_outputs) == wanted
