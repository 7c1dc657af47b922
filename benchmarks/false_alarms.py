"""How often an audit calls a model worse than it is, where the truth is known: the model is no better than scratch.

Under the null, the model in question is the original's architecture with fresh weights, so whatever an audit finds in
its favour is luck: a verdict of `fails` or `partial` is a false alarm. Each repetition draws everything anew: the fresh
weights, the samples, the batches, the scratch control. Such a model has no benign score either, and every audit with
the default limits must therefore be `invalid`; that rule is lifted for the count, and checked apart on the same trials.

    python benchmarks/false_alarms.py --battery quick-v1
    python benchmarks/false_alarms.py --battery quick-v2 --decide

Prints a table, writes it to docs/results/false-alarms-BATTERY.md (with `--decide`: false-alarms-BATTERY-decide.md), and
exits with 1 if more than one repetition in twenty is a false alarm, or if the rule about the benign score misses one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from holdfast.auditing.audit import audit
from holdfast.auditing.spec import AuditSpec
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.results import AuditResult, Thresholds
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask, load_task
from holdfast.training import pretrain

WRONG = ("fails", "partial")
LIFTED = Thresholds(max_benign_drop=0.99)


def original(benign: ArrayTask) -> SplitModel:
    """A model of the digits 0 to 6 that is a better start for the others than none."""
    run = Run(seed=0, device=torch.device("cpu"))
    with run.seeded("initialise"):
        fresh = load_model(ModelSpec(name="cnn", options={"depth": 3}), benign)
    return pretrain(fresh, benign, steps=300, run=run)


def null(seed: int, model: SplitModel, tasks: tuple[ArrayTask, ArrayTask], spec: AuditSpec) -> tuple[AuditResult, str]:
    """One audit of fresh weights, and the label that the default limits give to the same trials."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(seed=seed, device=torch.device("cpu"), folder=Path(folder))
        with run.seeded("null"):
            fresh = model.fresh()
        lifted, default = (
            audit(fresh, model, benign=tasks[0], restricted=tasks[1], run=run, spec=s)
            for s in (spec.model_copy(update={"thresholds": LIFTED}), spec)
        )
    return lifted, default.verdict.label


def table(found: list[AuditResult], defaults: list[str], spec: AuditSpec, command: str, seconds: float) -> str:
    """What was counted, as a page of the documentation."""
    counts, rules = Counter(r.verdict.label for r in found), Counter(defaults)
    wrong = sum(counts[label] for label in WRONG)
    halves = [(r.interval.high - r.interval.low) / 2 for a in found for r in a.by_budget if r.interval]
    rows = "\n".join(
        f"| {seed} | {a.verdict.label} | {len(a.seeds)} "
        f"| {100 * max(r.advantage or 0 for r in a.by_budget if r.budget):+.1f} "
        f"| {100 * max(r.interval.low for r in a.by_budget if r.interval):+.1f} "
        f"| {100 * max(r.interval.high for r in a.by_budget if r.interval):+.1f} |"
        for seed, a in enumerate(found)
    )
    labels = ("resists", "invalid", "partial", "fails")
    return f"""# False alarms of {spec.battery}{" with `--decide`" if spec.decide else ""}

Fresh weights in place of the immunized model: no advantage over training from scratch, whatever the verdict. The
original is the built-in CNN, trained on the digits 0 to 6; restricted are the digits 7 to 9, {spec.shots} samples a
class; budgets {", ".join(map(str, spec.budgets))}; {_seeds(found, spec)} an audit; {len(found)} audits, each with other
fresh weights, samples and batches. The rule about the benign score is lifted in the first row, so that the statistics
decide.

| | {" | ".join(labels)} |
|---|{"---|" * len(labels)}
| the statistics alone | {" | ".join(str(counts[label]) for label in labels)} |
| with the default limits | {" | ".join(str(rules[label]) for label in labels)} |

False alarms: **{wrong} of {len(found)}**. Half the width of the band is {100 * sum(halves) / len(halves):.1f} points on
average over budgets. `invalid` in the first row means that the audit could not decide, and says so.

```console
$ {command}
```

{seconds:.0f} seconds on one core. Each audit, advantages in points of accuracy at the budget where they are highest:

| audit | verdict | seeds | advantage | lower end of the band | upper end |
|---|---|---|---|---|---|
{rows}
"""


def _seeds(found: list[AuditResult], spec: AuditSpec) -> str:
    """The number of seeds; with `--decide`, how many were added and why it stopped."""
    if not spec.decide:
        return f"{spec.seeds} seeds"
    stops = Counter(a.sequential.stopped for a in found if a.sequential is not None)
    mean = sum(len(a.seeds) for a in found) / len(found)
    why = ", ".join(f"{stop} {count}" for stop, count in stops.most_common())
    return f"{spec.seeds} to {spec.most_seeds} seeds, added until the band decides ({mean:.1f} on average; {why}),"


def main() -> int:
    """Runs, prints and writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--battery", default="quick-v1")
    parser.add_argument("--audits", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--decide", action="store_true", help="add seeds until the band decides, or --max-seeds end")
    parser.add_argument("--max-seeds", type=int, help="four times --seeds by default")
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 5, 10, 20])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tasks = load_task("digits[0-6]"), load_task("digits[7-9]")
    spec = AuditSpec(
        battery=options.battery, budgets=tuple(options.budgets), seeds=options.seeds, shots=options.shots,
        side_effects=False, decide=options.decide, max_seeds=options.max_seeds,
    )  # fmt: skip
    begin = time.perf_counter()
    found, defaults = [], []
    model = original(tasks[0])
    for seed in range(options.audits):
        result, default = null(seed, model, tasks, spec)
        print(f"{seed:3} {result.verdict.label:8} (default limits: {default}) {result.verdict.sentence}", flush=True)
        found.append(result)
        defaults.append(default)
    command = f"python benchmarks/false_alarms.py {' '.join(sys.argv[1:])}".strip()
    page = table(found, defaults, spec, command, time.perf_counter() - begin)
    print(page)
    name = f"false-alarms-{options.battery}{'-decide' if options.decide else ''}.md"
    (options.out / name).write_text(page)
    wrong = sum(r.verdict.label in WRONG for r in found)
    return int(wrong > options.audits / 20 or any(label != "invalid" for label in defaults))


if __name__ == "__main__":
    sys.exit(main())
