"""Results made up for tests of reports, cards and leaderboards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.auditing.audit import tables
from holdfast.auditing.statistics import Comparison, costs
from holdfast.results import (
    ROLES,
    AuditResult,
    Curve,
    Event,
    Flag,
    ImmunizationResult,
    Interval,
    ModelFacts,
    Provenance,
    Role,
    RunResult,
    SearchTrial,
    Side,
    SideEffect,
    TaskFacts,
    Thresholds,
    Verdict,
    VerdictLabel,
)

LEVELS: dict[Role, list[float]] = {
    "immunized": [0.25, 0.42, 0.61],
    "original": [0.31, 0.75, 0.87],
    "scratch": [0.21, 0.45, 0.58],
}
BUDGETS = [0, 10, 100]


FOLDER = Path("runs/of a test")


NASTY = 'probe <img src=x onerror="alert(1)"> & </script><script>alert(2)</script>'


def make_curves(names: Sequence[str], seeds: int, lost: dict[tuple[str, Role], int]) -> list[Curve]:
    """Later names score lower by a tenth each; `lost` gives the index of a budget without a finite score."""
    curves = []
    for a, name in enumerate(names):
        for role in ROLES:
            for seed in range(seeds):
                scores: list[float | None] = [v - 0.1 * a + 0.01 * seed for v in LEVELS[role]]
                if seed == 0 and (name, role) in lost:
                    scores[lost[name, role]] = None
                curve = Curve(
                    adversary=name, role=role, seed=seed, budgets=BUDGETS, scores=scores,
                    losses=[None, 1.5, 0.5], folds=[None if s is None else [s] * 4 for s in scores], batch_size=50,
                )  # fmt: skip
                curves.append(curve)
    return curves


FLAGS = (
    Flag(name="Poisoned BatchNorm statistics", severity="critical", found="Found <this>.", remedy="Recalibrate."),
    Flag(name="Dead units", severity="warning", found="Half are dead.", remedy="Revive them."),
)


def settings_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, "optimizer": "adam", "learning_rate": 0.001, "batch_size": 50}


def make_audit(
    label: VerdictLabel = "resists",
    *,
    names: Sequence[str] = ("direct+all adam", "initFC+all momentum"),
    seeds: int = 3,
    lost: dict[tuple[str, Role], int] | None = None,
    kind: str = "finetuning",
    scope: str = "all",
    flags: Sequence[Flag] = (),
    searched: int = 0,
) -> AuditResult:
    curves = make_curves(names, seeds, lost or {})
    comparison = Comparison.of(curves, both_ways=not searched)
    sizes, flops = dict.fromkeys(names, 50), dict.fromkeys(names, 2e6)
    search = [
        SearchTrial(
            role=role, number=i, adversary=names[i % len(names)], config=settings_of(kind), score=0.4 + 0.01 * i,
            steps=100, confirmed=i >= searched - 2,
        )
        for role in ROLES for i in range(searched)
    ]  # fmt: skip
    return AuditResult(
        battery="test-v1",
        adversaries={name: {**settings_of(kind), "scope": scope} for name in names},
        not_applicable={"whole-body probe": "the model has no body"},
        budgets=BUDGETS,
        seeds=list(range(seeds)),
        shots=None,
        benign_task="digits[0-4]",
        restricted_task="digits[5-9]",
        adversary_samples=337,
        test_samples=100,
        chance=0.2,
        benign=Side(original=0.981, immunized=0.954, chance=0.1),
        curves=curves,
        by_budget=comparison.rows(),
        flags=list(flags),
        cost_target=0.542,
        costs=costs(comparison, 0.542, sizes, flops),
        search=search,
        side_effects=[
            SideEffect(
                task="digits[0-4]",
                kind="benign",
                by_budget=comparison.rows(),
                lost=0.012,
                interval=Interval(low=-0.01, high=0.034),
            ),
            SideEffect(task="faces", kind="transfer", by_budget=comparison.rows(), lost=0.2, interval=None),
        ],
        verdict=Verdict(
            label=label,
            sentence=f"The sentence of a verdict that {label}.",
            reasons=["First reason & more.", "Second reason."],
            threat_model="An adversary with 337 samples, and nothing else.",
            thresholds=Thresholds(),
            retained=None if label == "invalid" else 0.13,
            retained_interval=None if label == "invalid" else Interval(low=0.04, high=0.25),
            area=0.021,
            original_area=0.3,
        ),
    )


def make_immunization(events: int = 1, completed: bool = True) -> ImmunizationResult:
    return ImmunizationResult(
        defense="sophon",
        config={"loss": "ice", "gamma": None, "learning_rates": [0.001, 0.01], "guard": True},
        history={
            "iteration": [float(i) for i in range(1, 21)],
            "suppression_loss": [None if i == 7 else 2.0 / (i + 1) for i in range(20)],
            "benign_score": [0.97 if i % 5 == 4 else None for i in range(20)],
        },
        events=[Event(iteration=7 + i, message=f"event number {i} <b>") for i in range(events)],
        completed=completed,
    )


def make_result(**parts: Any) -> RunResult:
    audit = parts.get("audit")
    models = {
        "original": ModelFacts(name="cnn", parameters=25045, sha256="a1" * 32),
        "immunized": ModelFacts(name="cnn", parameters=25045, sha256="b2" * 32, file_sha256="c3" * 32),
    }
    datasets = {
        part: TaskFacts(name=f"{part} data", sha256=digest * 32, train=600, test=200, classes=5)
        for part, digest in (("benign", "d4"), ("restricted", "e5"))
    }
    facts: dict[str, Any] = {
        "kind": "run",
        "title": "A test of the report",
        "recipe": {"title": "A test", "defense": {"name": "sophon", "learning_rates": (0.001, 0.01)}},
        "seed": 17,
        "tables": tables(audit) if audit is not None else {},
        "provenance": Provenance(
            command=["holdfast", "run", "a recipe"],
            started="2026-01-02T03:04:05+00:00",
            holdfast="0.1.0",
            python="3.12.1",
            platform="Linux x86_64",
            packages={"torch": "2.99.1", "numpy": "2.98.2"},
            git_commit="f6" * 20,
            device="cpu",
            threads=2,
            tasks=datasets,
            models=models,
        ),
        "timing": {"immunize": 12.34, "audit": 56.78},
    }
    return RunResult.model_validate(facts | parts)
