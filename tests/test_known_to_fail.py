"""Two known results, which an audit has to reproduce before its verdicts on other models mean anything."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from holdfast.adversaries import BATTERIES
from holdfast.experiments.recipe import load
from holdfast.experiments.runner import run_recipe


def stopped(result):
    """What the audit says of each adversary."""
    return {row["method"]: row["stopped"] for row in result.tables["stops"].rows}


def test_fine_tuning_brings_the_digits_back_that_ntl_unlearned(tmp_path):
    # Early steps and few samples show the advantage best, and only many seeds make sure of it.
    brief = ["audit.budgets=[0, 5, 10]", "audit.shots=4", "audit.seeds=12", "audit.side_effects=false",
             "audit.battery=brief", "pretrain.steps=300"]  # fmt: skip
    # Half of the recipe's battery: what is the best on some model, and the released head.
    half = tuple(BATTERIES["quick-v1"][i] for i in (2, 4, 6, 7))
    with patch.dict(BATTERIES._members, {"brief": half}):
        result = run_recipe(load("ntl", overrides=brief), folder=tmp_path, device="cpu", quiet=True)
    assert result.audit.benign.drop < 0.03
    first, *_, last = result.audit.by_budget
    assert first.best["immunized"].mean < 0.5  # a guess is right in a third of the cases
    assert last.best["immunized"].mean > 0.8
    assert result.audit.verdict.label in {"fails", "partial"}


@pytest.mark.usefixtures("brief_look")
def test_ntl_starts_on_real_weights(data_dir, tmp_path):
    few = ["benign.train_limit=40", "restricted.train_limit=80", "audit.shots=2", "audit.side_effects=false",
           "benign.test_limit=50", "restricted.test_limit=20"]  # fmt: skip
    recipe = load("ntl-cifar", scale="smoke", overrides=few)
    result = run_recipe(recipe, folder=tmp_path, data_dir=data_dir, device="cpu", quiet=True)
    assert result.audit.benign.original > 0.7
    assert len(result.immunization.history["mmd"]) == 2


@pytest.mark.usefixtures("brief_look")
def test_whitening_and_the_closed_form_walk_through_a_linear_extractor(data_dir, tmp_path):
    few = [
        "benign.train_limit=800",
        "benign.test_limit=300",
        "restricted.train_limit=1200",
        "restricted.test_limit=200",
    ]
    recipe = load("condition/probes", overrides=[*few, "audit.seeds=1", "audit.side_effects=false"])
    result = run_recipe(recipe, folder=tmp_path, data_dir=data_dir, device="cpu", quiet=True)
    says = stopped(result)
    assert says["probe line-search raw"] == says["probe gd raw"] == "slowed"
    for name in ("line-search whitened", "gd whitened", "ridge raw", "ridge whitened"):
        assert says[f"probe {name}"] == "not stopped"
    assert max(row.advantage for row in result.audit.by_budget) > 0.2  # one seed gives numbers, and no verdict
