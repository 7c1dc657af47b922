"""A kind of task from another package: one file adds it, and everything else works with it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import holdfast
from holdfast.adversaries import FineTuning
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.tasks import TASKS, list_tasks, load_task
from plugins import TAGS, installed


@pytest.fixture
def tags(tmp_path):
    with installed(tmp_path, {"tagging": ("holdfast.tasks", TAGS)}, [TASKS]):
        yield load_task("tags-seen"), load_task("tags-hidden")


@pytest.fixture
def reader(tags):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    model = SplitModel(network, "2", name="tagger")
    return holdfast.pretrain(model, tags[0], steps=60)


def test_it_is_loaded_by_name(tags):
    benign, restricted = tags
    assert {"tags-seen", "tags-hidden"} <= set(list_tasks())
    assert (benign.kind, benign.num_outputs, benign.audit_unit) == ("tagging", 3, "share of tags")
    assert load_task("tags-seen@train_limit=30,test_limit=10").size("test") == 10
    assert benign.facts().sha256 != restricted.facts().sha256
    with pytest.raises(HoldfastError, match="has no classes to choose from"):
        load_task("tags-seen[0-1]")


@pytest.mark.trains
class TestUse:
    @pytest.mark.parametrize("defense", ["condition", "deep-condition"])
    def test_it_is_immunized_and_audited_and_reported(self, tags, reader, defense, tmp_path):
        benign, restricted = tags
        immunized = holdfast.immunize(reader, benign=benign, restricted=restricted, defense=defense, iterations=4)
        assert immunized.facts().sha256 != reader.facts().sha256
        tune = FineTuning(holdfast.Strategy("direct", "all", "adam", 1e-2, 16))
        result = holdfast.audit(
            immunized, original=reader, benign=benign, restricted=restricted, battery=[tune, holdfast.Probe()],
            seeds=2, shots=40, budgets=(0, 5, 20), folder=tmp_path / "out",
        )  # fmt: skip
        assert (result.unit, result.words) == ("share of tags", benign.words)
        assert result.benign.original == pytest.approx(benign.score(reader))
        scores = [curve.scores[-1] for curve in result.curves if curve.role == "original"]
        assert len(scores) == 4
        assert all(0.5 < score <= 1 for score in scores)
        # As on a machine without the package: the result is enough.
        sys.modules.pop("tagging")
        holdfast.write_report(holdfast.read_result(tmp_path / "out"), tmp_path / "again.html")
        report = (tmp_path / "again.html").read_text()
        assert "tagged samples" in report
        assert "a class)" not in report

    def test_defenses_for_classes_refuse_it(self, tags, reader):
        benign, restricted = tags
        for defense, message in (
            ("ntl", "ntl is for classification; got the tagging task 'tags-seen'"),
            ("sophon", "no suppression loss fits both the tagging task"),
            ("ridge-probe", "the tagging task 'tags-hidden' has none"),
        ):
            with pytest.raises(HoldfastError, match=message):
                holdfast.immunize(reader, benign=benign, restricted=restricted, defense=defense)
