"""A package of other people adds a defense, an adversary, a kind of task and a measurement; all verbs take them."""

from __future__ import annotations

import json

import pytest
import yaml

import holdfast
from holdfast.adversaries import BATTERIES, KINDS, UNDO
from holdfast.defenses import DEFENSES
from holdfast.experiments.measurements.base import MEASUREMENTS
from holdfast.experiments.replay import replay
from holdfast.tasks import TASKS
from plugins import HEAD_DESCENT, NOISE, TAGS, WEIGHT_NORM, installed

BATTERY = """
from holdfast.adversaries import FineTuning


register_battery("descents-v1", (HeadDescent(), FineTuning(Strategy("direct", "all", "adam", 1e-2, 16))))
"""


@pytest.fixture
def package(tmp_path):
    modules = {
        "noisy": (DEFENSES.package, NOISE),
        "descents": (KINDS.package, HEAD_DESCENT + BATTERY),
        "tagging": ("holdfast.tasks", TAGS),
        "weight_norm": (MEASUREMENTS.package, WEIGHT_NORM),
    }
    (tmp_path / "site").mkdir()
    with installed(tmp_path / "site", modules, [DEFENSES, KINDS, BATTERIES, UNDO, TASKS, MEASUREMENTS]):
        yield


def written(folder, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"title": "Of others", "threads": 1, **settings}))
    return path


TASK_PAIR = {"benign": {"data": "tags-seen"}, "restricted": {"data": "tags-hidden"}}
MODEL = {"model": {"name": "mlp"}, "pretrain": {"steps": 60}}


@pytest.mark.trains
def test_a_run_with_all_of_them(package, tmp_path):
    path = written(
        tmp_path, **TASK_PAIR, **MODEL, defense={"name": "noise", "scale": 0.02},
        audit={"battery": "descents-v1", "budgets": [0, 2], "seeds": 1, "shots": 40, "side_effects": False},
    )  # fmt: skip
    result = holdfast.run(path, folder=tmp_path / "run", device="cpu")
    assert result.immunization.defense == "noise"
    assert result.audit.unit == "share of tags"
    assert "head descent" in result.audit.adversaries
    assert replay(tmp_path / "run", adversary="head descent").same
    page = (tmp_path / "run" / "report.html").read_text()
    assert "tagged samples" in page
    assert "head descent" in page


@pytest.mark.trains
def test_a_protocol_with_all_of_them(package, tmp_path):
    path = written(
        tmp_path, kind="protocol", seeds=1, epochs=[0, 1], max_steps_per_epoch=2, battery="descents-v1",
        settings={"tags": {**TASK_PAIR, **MODEL}}, defenses={"shaken": {"name": "noise"}},
        measurements={"weight-norm": {"order": 1}},
    )  # fmt: skip
    result = holdfast.run(path, folder=tmp_path / "protocol", device="cpu")
    (row,) = result.tables["weight_norm"].rows
    assert (row["model"], row["norm"].mean > 0) == ("shaken", True)
    assert "Norm of all weights" in (tmp_path / "protocol" / "report.html").read_text()
    kept = json.loads((tmp_path / "protocol" / "result.json").read_text())
    assert kept["recipe"]["measurements"] == {"weight-norm": {"order": 1}}
