"""Sentences on what would change a verdict."""

from __future__ import annotations

import pytest

from holdfast.auditing.verdict import judge
from holdfast.report import model_card
from holdfast.report.html import render
from holdfast.report.what_would_change import what_would_change
from holdfast.results import AuditResult, Flag, Interval, LanguageScale, Look, Reason, Sequential, ThreatModel
from made_results import FOLDER, make_audit, make_result

TRIED = ThreatModel(battery="test-v1", strategies=2, scored=2, searched=0, samples=337, steps=100, seeds=3)
CRITICAL = Flag(name="Dead units", severity="critical", found="They are dead.", remedy="Revive them.")


def decided(audit: AuditResult, *, bands: dict[int, tuple[float, float, float]], flags=()) -> AuditResult:
    """The audit with other advantages and bands, by budget, and the verdict that they lead to."""
    rows = []
    for row in audit.by_budget:
        changed = {"original_interval": Interval(low=0.1, high=0.3)}
        if row.budget in bands:
            mean, low, high = bands[row.budget]
            changed |= {"advantage": mean, "interval": Interval(low=low, high=high)}
        rows.append(row.model_copy(update=changed))
    verdict = judge(
        rows, audit.curves, benign=audit.benign, chance=audit.chance, limits=audit.verdict.thresholds, tried=TRIED,
        flags=flags, retained=(0.2, None),
    )  # fmt: skip
    return audit.model_copy(update={"by_budget": rows, "verdict": verdict, "flags": list(flags)})


@pytest.fixture
def audit() -> AuditResult:
    return make_audit("resists")


def test_what_resists_names_the_nearest_attack(audit):
    found = decided(audit, bands={10: (-0.2, -0.3, -0.1), 100: (0.01, -0.02, 0.04)})
    assert found.verdict.label == "resists"
    nearest, longer, search = what_would_change(found)
    assert "direct+all adam, at 62.0% after 100 steps or before: +1.0 points" in nearest
    assert "−2.0 to +4.0" in nearest
    assert "More than 100 steps" in longer
    assert "adaptive-v2" in search
    of_language = found.model_copy(update={"language": LanguageScale(unigram_nll=3.0, tokens_per_sample=9)})
    assert "adaptive-causal-v1" in what_would_change(of_language)[-1]


def test_what_is_undone_names_what_gets_through(audit):
    found = decided(audit, bands={10: (0.2, 0.1, 0.3), 100: (0.1, 0.05, 0.15)})
    assert found.verdict.label in ("fails", "partial")
    first, second = what_would_change(found)
    assert "after 10 steps or before: +20.0 points" in first
    assert second.startswith("0 of 2 adversaries alone")  # their made-up scores are below scratch there


@pytest.mark.parametrize(
    ("band", "says"),
    [
        ((0.0, -0.11, 0.11), "About 15 seeds would decide for `resists`"),  # 3 (0.11 / 0.05)^2 = 14.5
        ((0.08, -0.02, 0.18), "About 5 seeds would decide against it"),  # 3 (0.1 / 0.08)^2 = 4.7
        ((0.0, -1.0, 1.0), "More than 1000 seeds would decide for `resists`"),
    ],
)
def test_what_is_undecided_says_how_many_seeds_are_missing(audit, band, says):
    found = decided(audit, bands={10: (-0.2, -0.3, -0.1), 100: band})
    assert found.verdict.decision.code == "undecided"
    lines = what_would_change(found)
    assert "With 3 seeds it is" in lines[0]
    assert lines[1].startswith(says)


def test_a_flag_that_bars_the_verdict_is_named(audit):
    found = decided(audit, bands={10: (-0.2, -0.3, -0.1), 100: (0.0, -0.02, 0.02)}, flags=[CRITICAL])
    assert found.verdict.label == "invalid"
    assert what_would_change(found) == ["The red flag 'Dead units' bars a verdict. Revive them."]


def test_every_reason_of_an_invalid_audit_has_a_remedy(audit):
    from holdfast.report.what_would_change import REMEDIES
    from holdfast.results.reason_codes import InvalidCode

    apart = {"uncertain-original-advantage", "critical-flag"}  # by seeds, and by the flag's own remedy
    for code in set(InvalidCode.__args__) - apart:
        assert code in REMEDIES
        verdict = audit.verdict.model_copy(
            update={"label": "invalid", "decision": Reason(code="worthless"), "reasons": [Reason(code=code)]}
        )
        first, *more = what_would_change(audit.model_copy(update={"verdict": verdict}))
        assert first == REMEDIES[code]
        assert bool(more) == (code == "no-original-advantage")  # which more seeds may show


@pytest.mark.parametrize(
    ("band", "says"),
    [
        ((0.0, -0.11, 0.11), "--decide --max-seeds 30 adds seeds"),  # twice the estimate of 15
        ((0.08, -0.02, 0.18), "--decide --max-seeds 12 adds seeds"),  # four times the three seeds that there are
        ((0.0, -1.0, 1.0), None),  # more than 1000 would be needed
    ],
)
def test_what_is_undecided_says_how_to_add_seeds(audit, band, says):
    lines = what_would_change(decided(audit, bands={10: (-0.2, -0.3, -0.1), 100: band}))
    if says is None:
        assert not any("--decide" in line for line in lines)
    else:
        assert says in lines[2]
        assert "With --decide from the start, the level is 5%" in lines[2]


def test_an_audit_whose_seeds_are_used_up_names_a_new_one(audit):
    found = decided(audit, bands={10: (-0.2, -0.3, -0.1), 100: (0.0, -0.11, 0.11)})
    looks = [Look(seeds=n, level=level, decision="undecided") for n, level in ((2, 0.02), (3, 0.03))]
    record = Sequential(max_seeds=3, looks=looks, stopped="budget ended", reported=False)
    lines = what_would_change(found.model_copy(update={"sequential": record}))
    assert "another --seed" in lines[2]
    assert "--seeds 3" in lines[2]
    assert "--max-seeds 30" in lines[2]


def test_reports_say_how_seeds_were_added(audit):
    looks = [Look(seeds=n, level=level, decision="undecided") for n, level in ((2, 0.02), (3, 0.03))]
    said = {False: "together 5.0%; all looks may spend 5%", True: "reported as an audit of its own"}
    for reported, words in said.items():
        record = Sequential(max_seeds=3, looks=looks, stopped="budget ended", reported=reported)
        staged = audit.model_copy(update={"sequential": record})
        result = make_result(audit=staged)
        page, card = render(result, FOLDER), model_card.card(result, None)
        for text in (page, card):
            assert "2 looks, with 2 and 3 seeds (at most 3)" in text
            assert "no more seeds were allowed" in text
            assert "2.00% and 3.00%" in text
            assert words in text


def test_verdicts_of_earlier_versions_have_none(audit):
    assert what_would_change(audit) == []


def test_it_is_in_the_report(audit):
    found = decided(audit, bands={10: (-0.2, -0.3, -0.1), 100: (0.01, -0.02, 0.04)})
    page = render(make_result(audit=found), FOLDER)
    assert "What would change this verdict" in page
    assert "The nearest is direct+all adam" in page
