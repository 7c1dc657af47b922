from __future__ import annotations

import json

import hypothesis.strategies as st
import jsonschema
import pytest
from hypothesis import given
from pydantic import ValidationError

from holdfast.errors import HoldfastError
from holdfast.report.wording import reasons
from holdfast.results import RunResult, json_schema, read_result
from holdfast.results.tables import Cell
from made_results import make_audit, make_result


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_cells_are_mean_and_sample_deviation(values):
    cell = Cell.of(values)
    assert cell.n == len(values)
    assert cell.mean == pytest.approx(sum(values) / len(values))
    if len(values) == 1:
        assert cell.sd is None
    else:
        expected = (sum((v - cell.mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        assert cell.sd == pytest.approx(expected, abs=1e-9)


def test_one_value_that_is_not_finite_spoils_the_mean():
    assert Cell.of([0.5, None], paper=0.1) == Cell(mean=None, sd=None, n=2, paper=0.1)
    assert Cell.of([]) == Cell(mean=None, sd=None, n=0)


def test_the_schema_accepts_a_result_and_refuses_a_changed_one(brief_result):
    content = json.loads(brief_result.model_dump_json())
    jsonschema.validate(content, json_schema())
    assert RunResult.model_validate(content) == brief_result
    content["audit"]["verdict"]["label"] = "safe"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json_schema())
    with pytest.raises(ValidationError):
        RunResult.model_validate(content)


def test_numbers_leave_out_what_differs_between_runs(brief_result):
    numbers = brief_result.numbers()
    assert "timing" not in numbers
    assert "provenance" not in numbers
    assert numbers["audit"]["curves"]


def test_provenance_names_every_model_and_task(brief_result, brief_folder):
    import hashlib

    facts = brief_result.provenance
    assert set(facts.models) == {"original", "immunized"}
    assert set(facts.tasks) == {"benign", "restricted"}
    digest = hashlib.sha256((brief_folder / "model.safetensors").read_bytes()).hexdigest()
    assert facts.models["immunized"].file_sha256 == digest
    assert facts.packages["torch"].startswith("2.")
    assert facts.threads >= 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda audit: audit["by_budget"].clear(), "a row for each budget"),
        (lambda audit: audit["budgets"].clear(), "a row for each budget"),
        (lambda audit: audit["seeds"].clear(), "needs seeds"),
        (lambda audit: audit["by_budget"][-1]["best"].pop("scratch"), "needs immunized, original, scratch"),
        (lambda audit: audit["by_budget"][0]["best_adversary"].clear(), "needs immunized, original, scratch"),
    ],
)
def test_an_audit_that_lacks_a_part_is_damaged(change, why, tmp_path):
    """Else whatever shows it fails half way, and a leaderboard with it for all the others."""
    content = make_result(audit=make_audit()).model_dump(mode="json")
    change(content["audit"])
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(HoldfastError, match=f"damaged.*{why}"):
        read_result(tmp_path)


def test_reasons_of_an_earlier_version_are_sentences_and_still_read(tmp_path):
    content = make_result(audit=make_audit()).model_dump(mode="json")
    old = content["audit"]["verdict"]
    del old["decision"], old["tried"]
    old["reasons"] = ["The benign score fell."]
    (tmp_path / "result.json").write_text(json.dumps(content))
    audit = read_result(tmp_path).audit
    assert [(r.code, r.text) for r in audit.verdict.reasons] == [("text", "The benign score fell.")]
    assert reasons(audit) == ["The benign score fell."]


@pytest.mark.parametrize("result", [make_result(audit=make_audit(), kind="audit")])
def test_the_keys_of_former_versions_stay(result):
    content = json.loads(result.model_dump_json())
    assert (content["kind"], content["audit"]["side_effects"][1]["kind"]) == ("audit", "transfer")
    assert "job" not in content
    assert json.loads(RunResult.model_validate(content).model_dump_json()) == content
