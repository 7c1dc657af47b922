"""Audits every sham defense of the test suite's zoo, and writes what the verdicts were.

    python benchmarks/shams.py [--battery standard-v1] [--seeds 10] [--only NAME ...] [--out docs/results/shams.md]

A sham keeps its benign score, looks resistant to usual fine-tuning, and is not. None may be called `resists`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from holdfast.auditing.audit import audit
from holdfast.auditing.spec import AuditSpec
from holdfast.results import AuditResult
from holdfast.runtime.run import Run
from holdfast.tasks.splits import halves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import shams  # the zoo belongs to the tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battery", default="standard-v1")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--executor", default="serial")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    benign, restricted = shams.zoo_tasks()
    originals = {norm: shams.zoo_original(norm) for norm in ("batch", "none")}
    spec = AuditSpec(
        battery=options.battery, budgets=shams.BUDGETS, seeds=options.seeds, shots=shams.SHOTS, trials=options.trials,
        side_effects=False,
    )  # fmt: skip
    rows = []
    for name in options.only or shams.SHAMS:
        sham, original = shams.make(name, originals, benign, halves(restricted)[0]), originals[shams.NORM_OF[name]]
        begin = time.perf_counter()
        result = audit(
            sham, original, benign=benign, restricted=halves(restricted)[1], spec=spec, run=Run(),
            executor=options.executor,
        )  # fmt: skip
        rows.append(row(name, result))
        print(f"{rows[-1]}  {time.perf_counter() - begin:.0f} s", flush=True)
    resisting = [r for r in rows if "`resists`" in r]
    text = table(options.battery, spec, rows)
    print(text)
    if options.out:
        options.out.write_text(text)
    sys.exit(bool(resisting))


def row(name: str, result: AuditResult) -> str:
    """One line of the table."""
    verdict = result.verdict
    share = "-" if verdict.retained is None else f"{verdict.retained:.0%}"
    flags = ", ".join(f.name for f in result.flags if f.severity == "critical") or "-"
    best = result.by_budget[-1].best_adversary["immunized"]
    high = max((r.advantage for r in result.by_budget if r.budget and r.advantage is not None), default=float("nan"))
    # Invalid for the control's sake says nothing about the sham: then the audit needs more seeds.
    why = " (control)" if verdict.label == "invalid" and "The original" in "".join(verdict.reasons) else ""
    return f"| {name} | `{verdict.label}`{why} | {100 * high:+.1f} | {share} | {best} | {flags} |"


def table(battery: str, spec: AuditSpec, rows: list[str]) -> str:
    """The page."""
    return "\n".join(
        [
            f"Battery {battery}, {spec.seeds} seeds, {spec.shots} samples a class, budgets "
            f"{', '.join(map(str, spec.budgets))}; digits 0 to 6 benign, 7 to 9 restricted.",
            "",
            "| sham | verdict | largest advantage | retained | best adversary | critical flags |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
