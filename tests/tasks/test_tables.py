"""Tables: cells, columns, labels and splits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import HoldfastError
from holdfast.tasks import ArrayTask, load_task
from holdfast.tasks.tables import read_csv

ROWS = [f"{i * 7 % 41},{'xy'[i % 2]}" for i in range(40)]


def said(task: ArrayTask) -> str:
    return "; ".join(task.notes)


@pytest.fixture
def csv(tmp_path):
    """Writes a table and loads it."""

    def load(header: str, rows: list[str], settings: str = "target=y", *, encoding: str = "utf-8") -> ArrayTask:
        path = tmp_path / "t.csv"
        path.write_bytes("\n".join([header, *rows]).encode(encoding))
        return load_task(f"{path}@{settings}")

    return load


def column(csv, cell, settings: str = "target=y") -> ArrayTask:
    """Loads a table with another column `p`, whose cells are a function of the row."""
    return csv("p,a,y", [f"{cell(i)},{row}" for i, row in enumerate(ROWS)], settings)


class TestCells:
    def test_a_decimal_comma_is_a_decimal_point(self, csv):
        plain = csv("a,b,y", [f"{i * 7 % 41 / 4:.2f},{i},{'xy'[i % 2]}" for i in range(40)])
        comma = csv("a;b;y", [f"{i * 7 % 41 / 4:.2f};{i};{'xy'[i % 2]}".replace(".", ",") for i in range(40)])
        assert comma.facts().sha256 == plain.facts().sha256
        assert "numbers are written with a decimal comma" in said(comma)

    def test_a_decimal_comma_of_the_target(self, csv):
        rows = [f"{i * 7 % 41};{i},25" for i in range(40)]
        assert csv("a;y", rows, "target=y,kind=regression").size("train") == 30

    def test_of_thousands_alone_the_meaning_is_not_known(self, csv):
        with pytest.raises(HoldfastError, match=r"column 'a' holds numbers, and also '1,234' \(line 2\)"):
            csv("a;y", [f"{i + 1},234;{'xy'[i % 2]}" for i in range(40)])

    @pytest.mark.parametrize(
        ("cell", "bad"),
        [
            (lambda i: f'"{i + 1},234"', "1,234"),
            (lambda i: f'"{i},5"', "0,5"),
            (lambda i: f"{i}%", "0%"),
            (lambda i: f"${i}", "$0"),
            (lambda i: "?" if i == 7 else i, "?"),
            (lambda i: "?" if i % 3 == 0 else i, "?"),
            (lambda i: "unknown" if i % 2 else i, "unknown"),
            (lambda i: "--" if i == 7 else i / 4, "--"),
            (lambda i: "x" if i == 7 else i, "x"),
        ],
    )
    @pytest.mark.parametrize("encoding", ["onehot", "ordinal"])
    def test_numbers_that_would_be_read_as_texts_are_refused(self, csv, cell, bad, encoding):
        with pytest.raises(HoldfastError) as caught:
            column(csv, cell, f"target=y,encoding={encoding}")
        assert f"column 'p' holds numbers, and also {bad!r}" in str(caught.value)

    def test_the_line_is_that_of_the_file_where_rows_are_left_out(self, csv):
        words = ["val", "train", "test"]
        rows = [f"{'' if i == 32 else i},{'xy'[i % 2]},{words[i // 2 % 3]}" for i in range(40)]
        with pytest.raises(HoldfastError, match=r"column 'p' has an empty cell \(line 34\)"):
            csv("p,y,split", rows)

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            (lambda i: "inf" if i == 7 else i, "'p' holds an infinite value"),
            (lambda i: (i + 1) * 1e200, r"'p' holds 4e\+201, too large"),
            (lambda i: 10**30 + i, "'p' holds whole numbers of more than 64 bits"),
        ],
    )
    def test_numbers_that_cannot_be_standardised(self, csv, cell, message):
        with pytest.raises(HoldfastError, match=message):
            column(csv, cell)

    def test_an_infinite_target_cannot_be_binned(self, csv):
        with pytest.raises(HoldfastError, match="'y' holds an infinite value"):
            csv("a,y", [f"{i * 7 % 41},{'inf' if i == 7 else i}" for i in range(40)], "target=y,bins=3")

    def test_a_bad_cell_of_a_numeric_target_is_named(self, csv):
        rows = [f"{i * 7 % 41},{'n.a.' if i == 7 else i}" for i in range(40)]
        with pytest.raises(HoldfastError, match=r"line 9: 'n\.a\.'\); regression needs numbers"):
            csv("a,y", rows, "target=y,kind=regression")

    def test_blanks_before_quotes(self, csv):
        task = csv('a, "y"', [row.replace(",", ', "') + '"' for row in ROWS])
        assert task.facts().sha256 == csv("a,y", ROWS).facts().sha256

    @pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
    def test_other_encodings_are_named(self, csv, encoding):
        with pytest.raises(HoldfastError, match=r"not UTF-8 .*; save it as UTF-8"):
            csv("größe,y", ROWS, encoding=encoding)

    def test_no_rows(self, csv):
        with pytest.raises(HoldfastError, match="has no rows, only the names"):
            csv("a,y", [])


class TestColumns:
    def test_texts_that_are_other_ones_in_each_row_are_refused(self, csv):
        with pytest.raises(
            HoldfastError, match=r"'p' has a different text in each of its 40 rows, such as 'N0'.*drop=p"
        ):
            column(csv, lambda i: f"N{i}")
        assert column(csv, lambda i: f"N{i}", "target=y,drop=p").input_shape == (1,)
        assert column(csv, lambda i: f"N{i}", "target=y,encoding=ordinal").input_shape == (2,)

    @pytest.mark.parametrize(
        ("cell", "note"),
        [
            (lambda i: "u", "columns with the same value in all rows: p"),
            (lambda i: 5, "columns with the same value in all rows: p"),
            (lambda i: f"2024-01-{i % 28 + 1:02d}", "column 'p' holds dates"),
            (lambda i: f"{i % 28 + 1}.1.2024", "column 'p' holds dates"),
            (lambda i: f"N{i // 2 * 2 if i < 4 else i}", "column 'p' has 38 different texts in 40 rows"),
        ],
    )
    def test_noted(self, csv, cell, note):
        assert note in said(column(csv, cell))

    @pytest.mark.parametrize(
        ("cell", "note"),
        [
            (lambda i: i, "counts the rows"),
            (lambda i: i * 7 % 40, "looks like an index"),
            (lambda i: i % 30, "looks like an index"),
            (lambda i: f"Car {i}", "looks like an index"),
        ],
    )
    def test_an_index_without_a_name_is_left_out(self, csv, cell, note):
        task = csv(",a,y", [f"{cell(i)},{row}" for i, row in enumerate(ROWS)])
        assert task.input_shape == (1,)
        assert f"no name and {note}, was left out" in said(task)

    def test_unnamed_numbers_that_are_not_an_index_are_inputs(self, csv):
        assert csv(",a,y", [f"{i / 4},{row}" for i, row in enumerate(ROWS)]).input_shape == (2,)

    def test_a_comma_at_the_end_of_all_lines(self, csv):
        task = csv("a,y,", [f"{row}," for row in ROWS])
        assert task.input_shape == (1,)
        assert "1 columns without a name and without values were left out" in said(task)

    def test_columns_of_one_name_once_blanks_are_off(self, csv):
        with pytest.raises(HoldfastError, match="two columns called 'a'"):
            csv("a,a ,y", [f"1,{row}" for row in ROWS])

    def test_a_long_column_is_read_as_one_kind(self, tmp_path):
        wide = ",1" * 300  # pandas reads so wide a table in parts of some 2,000 rows
        cells = [*(str(i % 2) for i in range(3000)), *(["b", "1"] * 1000)]
        header = "a" + "".join(f",n{i}" for i in range(300))
        (tmp_path / "wide.csv").write_text("\n".join([header, *(cell + wide for cell in cells)]))
        assert set(read_csv(tmp_path / "wide.csv", [])["a"]) == {"0", "1", "b"}


class TestSplits:
    @pytest.mark.parametrize("name", ["Split", "SPLIT", " split "])
    def test_the_column_in_any_letter_case(self, csv, name):
        rows = [f"{row},{'test' if i // 2 % 4 == 3 else 'train'}" for i, row in enumerate(ROWS)]
        task = csv(f"a,y,{name}", rows)
        assert (task.input_shape, task.size("train"), task.size("test"), task.drawn) == ((1,), 30, 10, False)

    def test_two_such_columns(self, csv):
        with pytest.raises(HoldfastError, match="has the columns Split and split"):
            csv("a,y,Split,split", [f"{row},train,test" for row in ROWS])

    def test_a_split_by_another_name_is_not_an_input(self, csv):
        rows = [f"{row},{'Test' if i // 2 % 4 == 3 else 'Train'}" for i, row in enumerate(ROWS)]
        with pytest.raises(HoldfastError, match="column 'part' holds 'Train' and 'Test', the words of a split"):
            csv("a,y,part", rows)
        task = csv("a,y,part", [row.replace(",", "w,", 1) for row in rows], "text=a,target=y,tokenizer=words")
        assert "column 'part' holds the words of a split and was not used" in said(task)

    def test_an_empty_cell_is_named(self, csv):
        with pytest.raises(HoldfastError, match=r"column 'split' has an empty cell \(line 7\)"):
            csv("a,y,split", [f"{row},{'' if i == 5 else 'train'}" for i, row in enumerate(ROWS)])

    def test_all_words_that_are_tested_on_are_noted(self, csv):
        rows = [f"{row},{['train', 'val', 'dev'][i // 2 % 3]}" for i, row in enumerate(ROWS)]
        assert "whose split is 'dev' or 'val'" in said(csv("a,y,split", rows))


class TestLabels:
    @pytest.mark.parametrize("settings", ["target=y", "target=y,text=a,tokenizer=words"])
    @pytest.mark.parametrize(
        ("label", "remedy"),
        [
            (lambda i, test: f"{'<>'[i % 2]}50K{'.' * test}", "if it means '<50K', write both alike"),
            (lambda i, test: -1 if test else i % 2, "-1 often marks rows without a label: remove them"),
            (lambda i, test: 11 if test else 1 + i % 2, "add some to train on, or remove those rows"),
        ],
    )
    def test_one_that_is_only_tested_on_is_named_with_the_nearest(self, csv, settings, label, remedy):
        held = [i // 2 % 4 == 3 for i in range(40)]
        rows = [f"{i * 7 % 41},{label(i, test)},{'test' if test else 'train'}" for i, test in enumerate(held)]
        with pytest.raises(HoldfastError) as caught:
            csv("a,y,split", rows, settings)
        assert "has no training samples, and" in str(caught.value)
        assert remedy in str(caught.value)

    def test_minus_one_among_others_is_noted(self, csv):
        task = csv("a,y", [f"{i * 7 % 41},{i % 3 - 1}" for i in range(42)])
        assert task.class_names == ["-1", "0", "1"]
        assert "-1 is a class; if it marks rows without a label, remove them" in said(task)
        assert csv("a,y", [f"{i * 7 % 41},{i % 2 * 2 - 1}" for i in range(42)]).notes == ()  # as of a margin


class TestParquet:
    @pytest.fixture
    def parquet(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet as pq

        def load(names=("neg", "pos"), **columns) -> ArrayTask:
            table = pa.table({"text": [f"word {i * 7 % 41}" for i in range(40)], **columns})
            feature = {"names": list(names), "_type": "ClassLabel"}
            about = {"info": {"features": {"label": feature}}}
            path: Path = tmp_path / "p.parquet"
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)} if names else {}), path)
            return load_task(f"{path}@tokenizer=words")

        return load

    def test_labels_have_the_names_that_the_file_has_for_them(self, parquet):
        labels = [i % 2 for i in range(40)]
        named, bare = parquet(label=labels), parquet((), label=labels)
        assert (named.class_names, bare.class_names) == (["neg", "pos"], ["0", "1"])
        assert named.facts().sha256 == bare.facts().sha256

    def test_names_without_rows_are_left_out(self, parquet):
        task = parquet(("neg", "neutral", "pos"), label=[i % 2 * 2 for i in range(40)])
        assert task.class_names == ["neg", "pos"]
        assert np.array_equal(np.unique(task._y["train"]), [0, 1])
        assert "classes without rows were left out: neutral" in said(task)

    @pytest.mark.parametrize(
        ("wrong", "remedy"), [(-1, "these rows have no label; remove them"), (7, "expected 0 to 1")]
    )
    def test_a_label_without_a_name(self, parquet, wrong, remedy):
        with pytest.raises(HoldfastError, match=f"10 rows have the label {wrong}, .*neg, pos.; {remedy}"):
            parquet(label=[wrong if i % 4 == 3 else i % 2 for i in range(40)])

    def test_rows_without_any_text(self, parquet):
        with pytest.raises(HoldfastError, match="no row has a text in text"):
            parquet(text=[" "] * 40, label=[0, 1] * 20)

    def test_numbers_as_texts_are_noted(self, parquet):
        assert "column 'text' holds numbers, read as texts" in said(parquet(text=list(range(40)), label=[0, 1] * 20))

    def test_columns_that_differ_in_blanks(self, parquet):
        with pytest.raises(HoldfastError, match="two columns called 'text'"):
            parquet(label=[0, 1] * 20, **{"text ": ["a"] * 40})
