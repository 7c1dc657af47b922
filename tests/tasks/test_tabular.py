from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.errors import HoldfastError
from holdfast.tasks import RegressionTask, TaskSpec, load_task

HEADER = "size,colour,kind,price,empty\n"


@pytest.fixture
def table(tmp_path):
    lines = [f"{i},{'red' if i % 2 else 'blue'},{'abc'[i % 3]},{i * i},{i if i % 5 else ''}" for i in range(40)]
    (tmp_path / "things.csv").write_text(HEADER + "\n".join(lines))

    def load(**settings):
        return load_task(TaskSpec(data=str(tmp_path / "things.csv"), **{"drop": ("empty",), **settings}))

    return load


class TestClassification:
    def test_two_tasks_of_one_table_have_the_same_inputs(self, table):
        kinds = table(target="kind", drop=("price", "empty"), rows=30)
        prices = table(target="price", bins=3, drop=("kind", "empty"), rows=30)
        for split in ("train", "test"):
            assert torch.equal(kinds._x[split], prices._x[split])
        assert (kinds.size("train"), kinds.size("test"), kinds.input_shape) == (30, 10, (3,))
        assert torch.allclose(kinds._x["train"][:, 0].mean(), torch.zeros(()), atol=1e-6)

    @pytest.mark.parametrize("bins", [2, 3, 7])
    def test_bins_are_equally_full_and_in_order(self, table, bins):
        task = table(target="price", bins=bins, rows=39)
        y = torch.cat([task._y["train"], task._y["test"]])
        assert torch.equal(y, y.sort().values)  # the price rises from row to row
        assert int(y.bincount().max() - y.bincount().min()) <= 1
        assert task.num_outputs == bins
        assert task.class_names[0].startswith("up to ")
        assert task.class_names[-1].startswith("above ")
        assert task.name == "things:price"

    def test_a_value_on_an_edge_is_in_the_range_below(self, tmp_path):
        (tmp_path / "t.csv").write_text("x,y\n" + "\n".join(f"{i},{v}" for i, v in enumerate([1, 2, 2, 3, 4])))
        task = load_task(TaskSpec(data=str(tmp_path / "t.csv"), target="y", bins=2, rows=4))
        assert task.class_names == ["up to 2", "above 2"]
        assert task._y["train"].tolist() == [0, 0, 0, 1]

    def test_filling_makes_empty_numbers_zero_and_empty_texts_a_value(self, tmp_path):
        (tmp_path / "t.csv").write_text("n,t,y\n1,a,0\n,b,1\n3,,0\n5,a,1\n")
        task = load_task(TaskSpec(data=str(tmp_path / "t.csv"), target="y", fill=True, rows=3))
        numbers = np.array([1.0, 0.0, 3.0])
        expected = (numbers - numbers.mean()) / numbers.std()
        assert np.allclose(task._x["train"][:, 0], expected)
        assert task._x["train"][:, 1:].sum(1).tolist() == [1, 1, 1]
        assert task.input_shape == (4,)  # and "(empty)", "a", "b"

    def test_ordinal_texts_are_ranks(self, tmp_path):
        (tmp_path / "t.csv").write_text("t,y\n" + "\n".join(f"{'acb'[i % 3]},{i % 2}" for i in range(9)))
        task = load_task(TaskSpec(data=str(tmp_path / "t.csv"), target="y", encoding="ordinal", rows=6))
        spread = np.sqrt(2 / 3)
        assert np.allclose(task._x["train"][:, 0][:3], [-1 / spread, 1 / spread, 0])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target": "kind", "drop": ()}, "has an empty cell .*or set fill"),
            ({"target": "kind", "drop": ("colr",)}, "column of things.csv to drop: 'colr': did you mean 'colour'"),
            ({"target": "kind", "drop": ("kind",)}, "is the target and cannot be dropped"),
            ({"target": "kind", "bins": 3}, "is text, and bins need numbers"),
            ({"target": "kind", "rows": 40}, "rows is 40; expected 2 to 39"),
            ({"target": "empty", "drop": (), "fill": True, "bins": 3}, "'empty' has an empty cell"),
        ],
    )
    def test_impossible_settings_are_refused(self, table, settings, message):
        with pytest.raises(HoldfastError, match=message):
            table(**settings)

    def test_too_many_equal_values_cannot_be_binned(self, tmp_path):
        (tmp_path / "t.csv").write_text("x,y\n" + "\n".join(f"{i},{min(i, 2)}" for i in range(20)))
        with pytest.raises(HoldfastError, match="too many equal values for 5 bins"):
            load_task(TaskSpec(data=str(tmp_path / "t.csv"), target="y", bins=5))


def test_real_houses_have_the_same_inputs_for_quality_and_price(data_dir):
    def load(target, other):
        spec = TaskSpec(data="house_prices", target=target, bins=3, drop=("Id", other), fill=True, rows=1095)
        return load_task(spec, data_dir=data_dir)

    quality, price = load("OverallQual", "SalePrice"), load("SalePrice", "OverallQual")
    assert torch.equal(quality._x["train"], price._x["train"])
    assert price._y["train"].bincount().min() > 350


def test_the_skill_on_a_batch_compares_each_output_with_its_own_target():
    x, y = np.eye(4), np.array([0.0, 1.0, 2.0, 5.0])
    task = RegressionTask("numbers", x, y, x, y)
    batch = next(task.sweep("test", 4, device=torch.device("cpu")))
    assert task.batch_skill(batch.y.reshape(4, 1), batch) == 1.0  # outputs are (N, 1), targets (N,)
    halfway = (batch.y + batch.y.mean()).reshape(4, 1) / 2
    assert task.batch_skill(halfway, batch) == pytest.approx(0.75)
    assert task.batch_skill(batch.y.flip(0).reshape(4, 1), batch) < 0.5
