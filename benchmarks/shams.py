"""Audits every sham defense of the test suite's zoo, and writes what the verdicts were.

    python benchmarks/shams.py [--battery standard-v1] [--seeds 10] [--only NAME ...] [--out PAGE.md]

Without names, these are the shams of vision. A sham keeps its benign score, looks resistant to usual fine-tuning, and
is not. None may be called `resists`.
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
from holdfast.results.reason_texts import reason
from holdfast.runtime.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo import ZOO, case  # the zoo belongs to the tests


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
    rows = []
    for name in options.only or [name for name, sham in ZOO.items() if sham.domain == "vision"]:
        built = case(name)
        setting = built.setting
        spec = AuditSpec(
            battery=options.battery, budgets=setting.budgets, seeds=options.seeds, shots=setting.shots,
            trials=options.trials, side_effects=False,
        )  # fmt: skip
        begin = time.perf_counter()
        result = audit(
            built.model, built.original, benign=setting.benign, restricted=setting.restricted, spec=spec, run=Run(),
            executor=options.executor,
        )  # fmt: skip
        rows.append(row(name, result))
        print(f"{rows[-1]}  {time.perf_counter() - begin:.0f} s", flush=True)
    resisting = [r for r in rows if "`resists`" in r]
    text = table(options.battery, options.seeds, rows)
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
    why = " (control)" if verdict.label == "invalid" and "The original" in "".join(map(reason, verdict.reasons)) else ""
    return f"| {name} | `{verdict.label}`{why} | {100 * high:+.1f} | {share} | {best} | {flags} |"


def table(battery: str, seeds: int, rows: list[str]) -> str:
    """The page."""
    return "\n".join(
        [
            f"Battery {battery}, {seeds} seeds; tasks, samples and budgets are those of each sham's setting.",
            "",
            "| sham | verdict | largest advantage | retained | best adversary | critical flags |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
