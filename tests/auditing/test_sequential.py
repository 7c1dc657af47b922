"""Audits that add seeds until the band decides."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from pydantic import ValidationError

from holdfast.adversaries import battery
from holdfast.auditing import audit as auditing
from holdfast.auditing.audit import audit
from holdfast.auditing.sequential import LEVEL, Stage, spent, stages, stops, until_decided
from holdfast.auditing.spec import AuditSpec
from holdfast.auditing.statistics import CONFIDENCE, Battery, Comparison
from holdfast.auditing.trials import TrialContext
from holdfast.errors import HoldfastError
from holdfast.results import BudgetRow, Interval, Reason, Thresholds, Verdict
from holdfast.results.tables import Cell
from holdfast.runtime.run import Run

CPU = torch.device("cpu")
EXACT = 1e-12


class TestStages:
    @given(st.integers(2, 300), st.integers(0, 3000))
    @example(5, 15)
    def test_all_looks_together_have_the_level_of_one_audit(self, seeds, more):
        """By the union bound this is the whole proof, whatever the bands are and however looks depend on each other."""
        planned = stages(seeds, seeds + more)
        counts = [stage.seeds for stage in planned]
        assert counts == sorted(set(counts))
        assert (counts[0], counts[-1]) == (seeds, seeds + more)
        assert all(stage.level > 0 for stage in planned)
        assert sum(stage.level for stage in planned) <= LEVEL + EXACT

    @given(st.integers(2, 300), st.integers(1, 3000))
    def test_after_an_audit_that_was_reported_later_looks_add_to_its_level(self, seeds, more):
        planned, fresh = (stages(seeds, seeds + more, reported=told) for told in (True, False))
        assert planned[0] == Stage(seeds, LEVEL)
        assert planned[1:] == fresh[1:]
        assert LEVEL < sum(stage.level for stage in planned) < 2 * LEVEL

    @given(st.floats(0, 1), st.floats(0, 1))
    def test_the_spending_function_ascends_to_the_whole_level(self, one, two):
        assert (spent(0), spent(1)) == (0, pytest.approx(LEVEL, abs=EXACT))
        assert spent(min(one, two)) <= spent(max(one, two)) <= LEVEL + EXACT

    def test_one_look_is_an_audit_of_a_fixed_number_of_seeds(self):
        (only,) = stages(7, 7)
        assert (only.level, only.confidence) == (LEVEL, CONFIDENCE)


def row(advantage, low, high, *, had=(0.2, 0.1, 0.3)):
    cell, interval = {"immunized": Cell.of([0.5]), "original": Cell.of([0.7]), "scratch": Cell.of([0.5])}, had
    return BudgetRow(
        budget=10, best=cell, best_adversary=dict.fromkeys(cell, "a"), advantage=advantage, original_advantage=had[0],
        interval=Interval(low=low, high=high), original_interval=Interval(low=interval[1], high=interval[2]),
    )  # fmt: skip


def said(decision, *reasons):
    return Verdict(
        label="invalid", decision=Reason(code=decision), sentence="", threat_model="", thresholds=Thresholds(),
        reasons=[Reason(code=code, names=["a"]) for code in reasons], retained=None,
    )  # fmt: skip


NARROW, WIDE = row(0.0, -0.02, 0.02), row(0.0, -0.2, 0.2)


class TestStops:
    @pytest.mark.parametrize(
        ("verdict", "found", "why"),
        [
            (said("exceeds"), WIDE, "decided"),
            (said("bounded"), NARROW, "decided"),
            (said("undecided"), WIDE, None),
            (said("unproven", "critical-flag"), WIDE, None),  # an attack may still be proven
            (said("unproven", "critical-flag"), NARROW, "not by seeds"),
            (said("worthless", "benign-dropped"), WIDE, "not by seeds"),
            (said("worthless", "uncertain-original-advantage"), WIDE, None),
            (said("worthless", "uncertain-original-advantage", "data-warning"), WIDE, None),
            (said("worthless", "uncertain-original-advantage", "benign-dropped"), WIDE, "not by seeds"),
            (said("worthless", "no-original-advantage"), row(0, -0.1, 0.1, had=(0.03, -0.1, 0.16)), None),
            (said("worthless", "no-original-advantage"), row(0, -0.1, 0.1, had=(0.0, -0.04, 0.04)), "not by seeds"),
            (said("worthless"), WIDE, "not by seeds"),
        ],
    )
    def test_more_seeds_only_where_they_may_help(self, verdict, found, why):
        assert stops(verdict, [found]) == why

    def test_looks_end_with_the_first_that_decides_or_with_the_seeds(self):
        @dataclasses.dataclass
        class Judged:
            verdict: Verdict
            rows: list[BudgetRow]

        def look(decides_at):
            return lambda stage: Judged(said("bounded" if stage.seeds >= decides_at else "undecided"), [WIDE])

        planned = stages(5, 20)
        _, looks, why = until_decided(planned, look(10))
        assert ([k.seeds for k in looks], [k.decision for k in looks]) == ([5, 10], ["undecided", "bounded"])
        assert why == "decided"
        _, looks, why = until_decided(planned, look(100))
        assert ([k.seeds for k in looks], why) == ([5, 10, 20], "budget ended")
        assert [k.level for k in looks] == [stage.level for stage in planned]


def test_a_band_of_more_confidence_is_wider():
    rng = np.random.default_rng(0)
    batteries = {role: Battery(("a", "b"), rng.random((2, 5, 3, 8))) for role in ("immunized", "scratch")}
    bands = [Comparison(batteries, (0, 5, 10), confidence=c).band("immunized")[1:] for c in (0.9, 0.95, 0.99, 0.999)]
    for narrow, wide in itertools.pairwise(bands):
        assert all(w.low < n.low and n.high < w.high for n, w in zip(narrow, wide, strict=True))
    assert bands[1] == Comparison(batteries, (0, 5, 10)).band("immunized")[1:]


class TestSpec:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_seeds": 9}, "max_seeds is 9, and decide is off"),
            ({"decide": True, "seeds": 1}, "one seed shows no spread"),
            ({"decide": True, "max_seeds": 3}, r"max_seeds is 3, less than seeds \(5\)"),
        ],
    )
    def test_settings_that_cannot_work_are_refused(self, settings, message):
        with pytest.raises(ValidationError, match=message):
            AuditSpec(**settings)

    def test_without_decide_the_settings_are_those_of_earlier_versions(self):
        assert not {"decide", "max_seeds"} & AuditSpec().model_dump().keys()
        chosen = AuditSpec(decide=True, max_seeds=9)
        assert AuditSpec.model_validate(chosen.model_dump(mode="json")) == chosen
        assert (AuditSpec().most_seeds, AuditSpec(decide=True).most_seeds, chosen.most_seeds) == (5, 20, 9)


FIXED = AuditSpec(
    battery=tuple(battery("quick-v1")[1:3]), budgets=(0, 5), seeds=2, shots=3, side_effects=False,
    thresholds=Thresholds(max_benign_drop=0.99, min_scratch_gain=0.001),
)  # fmt: skip
STAGED = FIXED.model_copy(update={"decide": True, "max_seeds": 4})


@pytest.fixture(scope="module", autouse=True)
def _unseen():
    """Red flags are looked for before the first look, whatever the seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "red_flags", lambda *_, **__: [])
        yield


@pytest.fixture(scope="module")
def sides(trained, benign, restricted):
    """Of two seeds nothing can be said about fresh weights: the audit needs another look."""
    with Run(0, CPU).seeded("another"):
        fresh = trained.fresh()
    return {"immunized": fresh, "original": trained, "benign": benign, "restricted": restricted}


@pytest.fixture(scope="module")
def fixed(sides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixed")
    return folder, audit(**sides, spec=FIXED, run=Run(0, CPU, folder))


@pytest.fixture(scope="module")
def staged(sides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    return folder, audit(**sides, spec=STAGED, run=Run(0, CPU, folder))


class TestAudit:
    def test_it_says_how_it_looked(self, staged):
        result = staged[1]
        record = result.sequential
        assert [look.seeds for look in record.looks] == [2, 4]
        assert [look.level for look in record.looks] == [stage.level for stage in stages(2, 4)]
        assert record.looks[-1].decision == result.verdict.decision.code
        assert (record.max_seeds, record.reported, result.seeds) == (4, False, [0, 1, 2, 3])
        assert result.verdict.tried.seeds == 4
        assert [result.stage_of(seed) for seed in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]

    def test_the_first_seeds_are_those_of_an_audit_with_a_fixed_number(self, fixed, staged):
        first = [c for c in staged[1].curves if c.seed < 2]
        assert first == fixed[1].curves
        assert fixed[1].sequential is None

    def test_it_continues_the_folder_of_an_audit_that_could_not_decide(
        self, sides, fixed, staged, tmp_path, monkeypatch
    ):
        folder = shutil.copytree(fixed[0], tmp_path / "copy")
        ran, curves = [], TrialContext.curves
        monkeypatch.setattr(TrialContext, "curves", lambda self, trials: ran.extend(trials) or curves(self, trials))
        result = audit(**sides, spec=STAGED, run=Run(0, CPU, folder))
        assert {trial.seed for trial in ran} == {2, 3}
        assert result == staged[1]

    def test_killed_and_continued_it_is_the_same(self, sides, staged, tmp_path, monkeypatch):
        folder = shutil.copytree(staged[0], tmp_path / "copy")
        path = folder / "checkpoints" / "trials.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[: 2 * len(lines) // 3]) + '\n{"key": "restricted/torn')
        assert audit(**sides, spec=STAGED, run=Run(0, CPU, folder)) == staged[1]
        again = path.read_text().splitlines()
        assert sorted(json.loads(line)["key"] for line in again[1:]) == sorted(json.loads(k)["key"] for k in lines[1:])
        monkeypatch.setattr(TrialContext, "curves", lambda *_: pytest.fail("a finished trial was run again"))
        assert audit(**sides, spec=STAGED, run=Run(0, CPU, folder)) == staged[1]

    def test_a_first_look_that_was_reported_has_the_full_level(self, sides, staged, tmp_path):
        folder = shutil.copytree(staged[0], tmp_path / "copy")
        result = audit(**sides, spec=STAGED, run=Run(0, CPU, folder), reported=True)
        assert [look.level for look in result.sequential.looks] == [s.level for s in stages(2, 4, reported=True)]
        assert result.sequential.level > LEVEL
        assert result.by_budget == staged[1].by_budget  # the last look is the same

    def test_side_effects_have_the_seeds_of_the_last_look(self, sides, tmp_path):
        spec = STAGED.model_copy(update={"side_effects": True})
        result = audit(**sides, spec=spec, run=Run(0, CPU, tmp_path))
        (side,) = result.side_effects
        assert side.by_budget[-1].best["original"].n == 4
        assert side.interval.low < side.lost < side.interval.high

    def test_a_search_is_done_once_before_the_first_look(self, sides, monkeypatch):
        searched, curves = [], TrialContext.curves

        def watched(self, trials):
            searched.extend(t.seed for t in trials)
            return curves(self, trials)

        monkeypatch.setattr(TrialContext, "curves", watched)
        spec = STAGED.model_copy(update={"battery": "adaptive-v1", "trials": 3, "budgets": (0, 2)})
        result = audit(**sides, spec=spec, run=Run(0, CPU))
        assert [seed for seed in searched if seed < 0] == searched[: sum(seed < 0 for seed in searched)]
        assert len(result.search) == 3 * 3
        assert {c.seed for c in result.curves} == {0, 1, 2, 3}
        confirmed = {trial.adversary for trial in result.search if trial.confirmed}
        assert confirmed == {*result.adversaries} | {*result.not_applicable}


class TestFolder:
    """Through `holdfast.audit`, whose folders have results."""

    def test_with_decide_an_audit_goes_on_and_says_so(self, sides, tmp_path):
        import holdfast
        from holdfast.results import read_result

        options = {
            "original": sides["original"], "benign": sides["benign"], "restricted": sides["restricted"],
            "device": "cpu", "folder": tmp_path, "budgets": (0, 5), "seeds": 2, "shots": 3, "side_effects": False,
            "battery": FIXED.battery, "thresholds": {"max_benign_drop": 0.99, "min_scratch_gain": 0.001},
        }  # fmt: skip
        holdfast.audit(sides["immunized"], **options)
        with pytest.raises(HoldfastError, match=r"in: audit\.seeds.* with --decide adds seeds until it decides"):
            holdfast.audit(sides["immunized"], **{**options, "seeds": 3})
        result = holdfast.audit(sides["immunized"], **options, decide=True, max_seeds=4)
        assert result.sequential.reported
        assert result.sequential.looks[0].level == LEVEL
        assert holdfast.audit(sides["immunized"], **options, decide=True, max_seeds=4) == result
        assert read_result(tmp_path).audit == result
        assert "reported as an audit of its own" in (tmp_path / "report.html").read_text()
        for other in ({}, {"decide": True, "max_seeds": 8}):
            with pytest.raises(HoldfastError, match=r"differs in: audit\.(decide|max_seeds)"):
                holdfast.audit(sides["immunized"], **options, **other)
