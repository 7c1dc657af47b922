"""Audits every sham defense of the test suite's zoo, and writes what the verdicts were.

    python benchmarks/shams.py ROWS.jsonl [--battery standard-v2] [--seeds 5] [--only NAME ...] [--out PAGE.md]

Without names, these are all shams: of vision, and of language and denoising, each of which takes minutes. A sham keeps
its benign score, looks resistant to usual fine-tuning, and is not. None may be called `resists`; then it exits with 1.

Each audit is a line of ROWS.jsonl, and one that is there is not done again. Shams of one setting have the same
controls, which are attacked once; weights that are the original's in the original's code count as these.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.auditing.audit import audit
from holdfast.auditing.spec import AuditSpec
from holdfast.auditing.trials import Trial, TrialContext
from holdfast.results import AuditResult, Curve
from holdfast.results.reason_texts import reason
from holdfast.runtime.executors import Executor
from holdfast.runtime.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo import ZOO, case  # the zoo belongs to the tests

Row = dict[str, Any]


@dataclass(frozen=True)
class Remembering(Executor):
    """Runs trials one after another; those against the same model of a setting are run once.

    Attributes:
        setting: of the sham that is audited; adversaries, samples and budgets are those of the setting.
        known: curves by setting, attacked model, adversary and seed.
    """

    name: str = "remembering"
    setting: str = ""
    known: dict[tuple[str, str, str, int], Curve] = field(default_factory=dict)

    def run(self, work: Callable[..., Any], context: Any, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Executor.run`; the jobs are batches of trials."""
        for index, job in enumerate(jobs):
            keys = [self._key(context, trial) for trial in job.values]
            new = [trial for trial, key in zip(job.values, keys, strict=True) if key not in self.known]
            curves = iter(work(context, replace(job, values=tuple(new))) if new else ())
            found = [self._renamed(self.known[key], trial) if key in self.known else next(curves)
                     for trial, key in zip(job.values, keys, strict=True)]  # fmt: skip
            self.known.update({key: curve for key, curve in zip(keys, found, strict=True) if key is not None})
            yield index, found

    def _key(self, context: TrialContext, trial: Trial) -> tuple[str, str, str, int] | None:
        """None for the sham itself."""
        attacked = trial.role
        if attacked == "immunized":
            inside = context.transplanted
            if not trial.transplanted or inside is None or inside.facts().sha256 != context.original.facts().sha256:
                return None
            attacked = "original"
        return self.setting, attacked, trial.adversary.name, trial.seed

    @staticmethod
    def _renamed(curve: Curve, trial: Trial) -> Curve:
        return curve.model_copy(update={"adversary": trial.name, "role": trial.role})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--battery", default="standard-v2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--part", default="1/1", help="such as 1/2: this half of the shams")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    at, of = map(int, options.part.split("/"))
    done = read(options.rows)
    controls = Remembering()
    names = options.only or list(ZOO)
    for name in names[at - 1 :: of]:
        if name not in done:
            done[name] = audited(name, options, controls)
            with options.rows.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            print(shown(done[name]), f"{done[name]['seconds']:.0f} s", flush=True)
    text = page([done[name] for name in ZOO if name in done], options)
    print(text)
    if options.out:
        options.out.write_text(text)
    sys.exit(any(row["verdict"] == "resists" for row in done.values()))


def read(path: Path) -> dict[str, Row]:
    """The rows that are there, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def audited(name: str, options: argparse.Namespace, controls: Remembering) -> Row:
    """One audit, with the default thresholds."""
    built = case(name)
    setting = built.setting
    spec = AuditSpec(
        battery=options.battery, budgets=setting.budgets, seeds=options.seeds, shots=setting.shots,
        trials=options.trials, side_effects=False,
    )  # fmt: skip
    begin = time.process_time()
    executor = replace(controls, setting=built.sham.setting)
    result = audit(
        built.model, built.original, benign=setting.benign, restricted=setting.restricted, spec=spec, run=Run(),
        executor=executor if isinstance(spec.plan(), tuple) else "serial",
    )  # fmt: skip
    return row(name, result, time.process_time() - begin)


def row(name: str, result: AuditResult, seconds: float) -> Row:
    """What the page needs of an audit."""
    verdict = result.verdict
    reasons = "".join(map(reason, verdict.reasons))
    return {
        "name": name,
        "verdict": verdict.label,
        # Invalid for the control's sake says nothing about the sham: then the audit needs more seeds.
        "control": verdict.label == "invalid" and "The original" in reasons,
        "retained": verdict.retained,
        "advantage": max((r.advantage for r in result.by_budget if r.budget and r.advantage is not None), default=None),
        "best": result.by_budget[-1].best_adversary["immunized"],
        "flags": [f.name for f in result.flags if f.severity == "critical"],
        "reasons": [reason(each) for each in verdict.reasons],
        "seeds": len(result.seeds),
        "seconds": seconds,
    }


def shown(row: Row) -> str:
    """One line of the table."""
    share = "-" if row["retained"] is None else f"{row['retained']:.0%}"
    high = "-" if row["advantage"] is None else f"{100 * row['advantage']:+.1f}"
    label = f"`{row['verdict']}`{' (control)' if row['control'] else ''}"
    flags, sham = ", ".join(row["flags"]) or "-", ZOO[row["name"]]
    name = f"{row['name']}{' (later)' if sham.held_out else ''}"
    return f"| {name} | {sham.mechanism} | {label} | {high} | {share} | {row['best']} | {flags} |"


def page(rows: list[Row], options: argparse.Namespace) -> str:
    """The page."""
    counts = Counter(row["verdict"] for row in rows)
    labels = ", ".join(f"{counts[label]} `{label}`" for label in ("resists", "invalid", "partial", "fails"))
    seeds = ", ".join(map(str, sorted({row["seeds"] for row in rows})))
    control = sum(row["control"] for row in rows)
    later = sum(ZOO[row["name"]].held_out for row in rows)
    domains = Counter(ZOO[row["name"]].domain for row in rows)
    apart = ", ".join(f"{count} of {domain}" for domain, count in domains.items())
    lines = "\n".join(map(shown, rows))
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"""# Verdicts on shams by {options.battery}

`python benchmarks/shams.py ROWS.jsonl --battery {options.battery} --seeds {options.seeds}`:
{len(rows)} of {len(ZOO)} shams ({apart}), {seeds} seeds, {minutes:.0f} minutes of a core; tasks, samples and
budgets are those of each sham's setting. {later} of them, *(later)*, were made after the battery was chosen.
Verdicts: {labels}.
*(control)*: {control} audits are invalid because the original's own advantage is not certain with so few seeds,
whatever the sham does.

| sham | mechanism | verdict | largest advantage | retained | best adversary | critical flags |
|---|---|---|---|---|---|---|
{lines}
"""


if __name__ == "__main__":
    main()
