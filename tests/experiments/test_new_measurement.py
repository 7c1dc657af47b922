"""A measurement of another package: one file and an entry point, and a protocol measures it and reports it."""

from __future__ import annotations

import importlib
import sys

import pytest

from holdfast.errors import HoldfastError
from holdfast.experiments.measurements.base import MEASUREMENTS
from holdfast.experiments.recipe import ProtocolRecipe
from holdfast.experiments.runner import run_recipe
from plugins import WEIGHT_NORM


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package is installed for one test: a module, and metadata with its entry point."""
    (tmp_path / "weight_norm.py").write_text(WEIGHT_NORM)
    info = tmp_path / "weight_norm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weight-norm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{MEASUREMENTS.package}]\nweight-norm = weight_norm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    members = dict(MEASUREMENTS._members)
    monkeypatch.setattr(MEASUREMENTS, "_members", members)
    monkeypatch.setattr(MEASUREMENTS, "_loaded", False)
    yield
    sys.modules.pop("weight_norm", None)


def recipe(**measurements):
    return ProtocolRecipe.model_validate(
        {
            "kind": "protocol", "title": "Norms", "threads": 1, "seeds": 1, "epochs": [0, 1], "shots": 2,
            "max_steps_per_epoch": 1,
            "settings": {"digits": {"model": {"name": "mlp"}, "pretrain": {"steps": 2},
                                    "benign": {"data": "digits[0-4]"}, "restricted": {"data": "digits[5-9]"}}},
            "defenses": {"LEACE": {"name": "leace"}},
            "attacks": {"all": {}},
            "measurements": measurements,
        }
    )  # fmt: skip


@pytest.mark.trains
def test_it_is_measured_and_reported(package, tmp_path):
    result = run_recipe(recipe(**{"weight-norm": {"order": 1}}), folder=tmp_path / "out", device="cpu", quiet=True)
    (row,) = result.tables["weight_norm"].rows
    assert row["model"] == "LEACE"
    assert row["norm"].mean > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Norm of all weights" in page
    assert "Norms were taken." in page
    assert (tmp_path / "out" / "checkpoints" / "weight-norm.jsonl").exists()


def test_its_settings_are_checked(package, tmp_path):
    with pytest.raises(HoldfastError, match="weight-norm: order is 0; expected at least 1"):
        run_recipe(recipe(**{"weight-norm": {"order": 0}}), folder=tmp_path / "out", device="cpu", quiet=True)
    with pytest.raises(ValueError, match=r"Unknown key 'ordr': did you mean 'order'"):
        recipe(**{"weight-norm": {"ordr": 1}})
    with pytest.raises(ValueError, match=r"Unknown measurement 'weight-nrm': did you mean 'weight-norm'"):
        recipe(**{"weight-nrm": {}})
