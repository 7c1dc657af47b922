"""How often an audit finds an advantage where none is; `power.py` asks how often it finds one that is there.

Under the null, the audited model is the original's architecture with fresh weights, so whatever an audit finds in its
favour is luck: a verdict of `fails` or `partial` is a false alarm. Each repetition draws everything anew: the fresh
weights, the samples, the batches, the scratch control. Such a model has no benign score either, and every audit with
the default limits must therefore be `invalid`; that rule is lifted for the count, and checked apart on the same trials.

    python benchmarks/false_alarms.py --battery quick-v1
    python benchmarks/false_alarms.py --battery quick-v2 --decide
    python benchmarks/false_alarms.py --battery standard-v2 --audits 60 --rows ROWS.jsonl [--part 1/2]

With `--rows`, each audit is a line of that file, and one that is there is not done again; `--page` writes the page of
those that are there. Prints a table, writes it to docs/results/false-alarms-BATTERY.md (with `--decide`:
false-alarms-BATTERY-decide.md), and exits with 1 if more than one repetition in twenty is a false alarm, or if the rule
about the benign score misses one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from holdfast.auditing.audit import audit
from holdfast.auditing.spec import AuditSpec
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.results import AuditResult, Thresholds
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask, load_task
from holdfast.training import pretrain

WRONG = ("fails", "partial")
LABELS = ("resists", "invalid", "partial", "fails")
LIFTED = Thresholds(max_benign_drop=0.99)
Row = dict[str, Any]


def original(benign: ArrayTask, steps: int = 300) -> SplitModel:
    """A model of the digits 0 to 6 that is a better start for the others than none, the more so the more `steps`."""
    run = Run(seed=0, device=torch.device("cpu"))
    with run.seeded("initialise"):
        fresh = load_model(ModelSpec(name="cnn", options={"depth": 3}), benign)
    return pretrain(fresh, benign, steps=steps, run=run)


def audited(
    seed: int, released: SplitModel | None, model: SplitModel, tasks: tuple[ArrayTask, ArrayTask], spec: AuditSpec
) -> tuple[AuditResult, str]:
    """One audit of a model, or of fresh weights, and the label that the default limits give to the same trials."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(seed=seed, device=torch.device("cpu"), folder=Path(folder))
        with run.seeded("null"):
            given = released or model.fresh()
        lifted, default = (
            audit(given, model, benign=tasks[0], restricted=tasks[1], run=run, spec=s)
            for s in (spec.model_copy(update={"thresholds": LIFTED}), spec)
        )
    return lifted, default.verdict.label


def row(seed: int, found: AuditResult, default: str, seconds: float) -> Row:
    """What the page needs of an audit, advantages and bands in points."""
    later = [r for r in found.by_budget if r.budget]
    bands = [r.interval for r in found.by_budget if r.interval]
    return {
        "audit": seed,
        "label": found.verdict.label,
        "default": default,
        "seeds": len(found.seeds),
        "stopped": found.sequential.stopped if found.sequential else None,
        "advantage": 100 * max(r.advantage or 0 for r in later),
        "low": 100 * max(band.low for band in bands),
        "high": 100 * max(band.high for band in bands),
        "half": 100 * sum((band.high - band.low) / 2 for band in bands) / len(bands),
        "retained": found.verdict.retained,
        "seconds": seconds,
    }


def page(rows: list[Row], spec: AuditSpec, command: str, *, planned: int) -> str:
    """What was counted, as a page of the documentation."""
    counts, rules = (Counter(r[key] for r in rows) for key in ("label", "default"))
    lines = "\n".join(
        f"| {r['audit']} | {r['label']} | {r['seeds']} | {r['advantage']:+.1f} | {r['low']:+.1f} | {r['high']:+.1f} |"
        for r in rows
    )
    decide = " with `--decide`" if spec.decide else ""
    few = f" {planned} were planned; so few say little." if len(rows) < planned else ""
    wrong = sum(counts[label] for label in WRONG)
    return f"""# False alarms of {spec.battery}{decide}

Fresh weights in place of the immunized model: no advantage over training from scratch, whatever the verdict. Each
audit has other fresh weights, samples and batches. The rule about the benign score is lifted in the first row, so
that the statistics decide. The
original is the built-in CNN, trained on the digits 0 to 6; restricted are the digits 7 to 9, {spec.shots} samples a
class; budgets {", ".join(map(str, spec.budgets))}; {_seeds(rows, spec)} an audit; {len(rows)} audits.{few}

| | {" | ".join(LABELS)} |
|---|{"---|" * len(LABELS)}
| the statistics alone | {" | ".join(str(counts[label]) for label in LABELS)} |
| with the default limits | {" | ".join(str(rules[label]) for label in LABELS)} |

False alarms: **{wrong} of {len(rows)}**.
Half the width of the band is {sum(r["half"] for r in rows) / len(rows):.1f} points on average over budgets.
`invalid` in the first row means that the audit could not decide, and says so.

```console
$ {command}
```

{sum(r["seconds"] for r in rows):.0f} seconds in all, by the clock, on a core that other jobs may share. Each audit,
advantages in points of accuracy at the budget where they are highest:

| audit | verdict | seeds | advantage | lower end of the band | upper end |
|---|---|---|---|---|---|
{lines}
"""


def _seeds(rows: list[Row], spec: AuditSpec) -> str:
    """The number of seeds; with `--decide`, how many were added and why it stopped."""
    if not spec.decide:
        return f"{spec.seeds} seeds"
    stops = Counter(r["stopped"] for r in rows if r["stopped"] is not None)
    mean = sum(r["seeds"] for r in rows) / len(rows)
    why = ", ".join(f"{stop} {count}" for stop, count in stops.most_common())
    return f"{spec.seeds} to {spec.most_seeds} seeds, added until the band decides ({mean:.1f} on average; {why}),"


def read(path: Path | None) -> dict[int, Row]:
    """The audits that are there, by number."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return {each["audit"]: each for each in map(json.loads, lines)}


def of_audits(parser: argparse.ArgumentParser) -> None:
    """Adds the options of repeated audits, which `power.py` has as well."""
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 5, 10, 20])
    parser.add_argument("--part", default="1/1", help="such as 1/2: this half of the audits")
    parser.add_argument("--page", action="store_true", help="write the page of the audits that are there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results")


def options() -> argparse.Namespace:
    """What was given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--battery", default="quick-v1")
    parser.add_argument("--audits", type=int, default=20)
    parser.add_argument("--decide", action="store_true", help="add seeds until the band decides, or --max-seeds end")
    parser.add_argument("--max-seeds", type=int, help="four times --seeds by default")
    parser.add_argument("--rows", type=Path)
    of_audits(parser)
    return parser.parse_args()


def main() -> int:
    """Runs, prints and writes; returns the exit code."""
    given = options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tasks = load_task("digits[0-6]"), load_task("digits[7-9]")
    spec = AuditSpec(
        battery=given.battery, budgets=tuple(given.budgets), seeds=given.seeds, shots=given.shots,
        side_effects=False, decide=given.decide, max_seeds=given.max_seeds,
    )  # fmt: skip
    done, model = read(given.rows), original(tasks[0])
    at, of = map(int, given.part.split("/"))
    for seed in () if given.page else range(given.audits)[at - 1 :: of]:
        if seed in done:
            continue
        begin = time.perf_counter()
        result, default = audited(seed, None, model, tasks, spec)
        print(f"{seed:3} {result.verdict.label:8} (default limits: {default}) {result.verdict.sentence}", flush=True)
        done[seed] = row(seed, result, default, time.perf_counter() - begin)
        if given.rows is not None:
            with given.rows.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
    rows = [done[seed] for seed in sorted(done)]
    text = page(
        rows,
        spec,
        f"python benchmarks/false_alarms.py {' '.join(sys.argv[1:])}".strip(),
        planned=given.audits,
    )
    print(text)
    (given.out / f"false-alarms-{given.battery}{'-decide' if given.decide else ''}.md").write_text(text)
    wrong = sum(r["label"] in WRONG for r in rows)
    return int(wrong > len(rows) / 20 or any(r["default"] != "invalid" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
