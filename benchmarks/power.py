"""How often an audit finds an advantage that is there, for defenses of known effect.

An original has 300 steps of training. A defense that takes all but the first N of them back is of known effect: what
a model of N steps is worth to an attacker. 300 is a defense that does nothing, 0 would be one that leaves nothing (the
null of `false_alarms.py`). There are two originals: one was trained on the benign digits, as that of the false alarms,
the other on all digits, as those of the zoo are, and is worth more. The true advantage of each model is not printed
anywhere, so it is the mean over all of its audits, which have other samples, batches and controls each; its standard
error is given.

    python benchmarks/power.py ROWS.jsonl --battery standard-v2 [--steps 3 10 30 300] [--audits 12] [--part 1/2]
    python benchmarks/power.py ROWS.jsonl --battery standard-v2 --knows all [...]
    python benchmarks/power.py ROWS.jsonl --battery standard-v2 --page

Each audit is a line of ROWS.jsonl, and one that is there is not done again. Writes docs/results/power-BATTERY.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from false_alarms import LABELS, Row, audited, of_audits, original, row

from holdfast.auditing.spec import AuditSpec
from holdfast.models import ModelSpec, SplitModel
from holdfast.tasks import load_task

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo.settings import taught  # the zoo belongs to the tests

ORIGINALS = {"benign": "the benign digits", "all": "all digits"}
"""What an original was trained on."""


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):+.1f} ± {error:.1f}"


def line(rows: list[Row]) -> str:
    """What audits of one model found, as a line of the table."""
    counts = Counter(r["label"] for r in rows)
    cells = [
        str(rows[0]["steps"]),
        str(len(rows)),
        spread([r["mean"] for r in rows]),
        f"{100 * mean(r['benign'] for r in rows):.0f} %",
        *(str(counts[label]) for label in LABELS),
        f"{sum(r['low'] > 0 for r in rows)}",
        f"{mean(r['half'] for r in rows):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """What audits of the models of one original found."""
    by_steps = {steps: [r for r in rows if r["steps"] == steps] for steps in sorted({r["steps"] for r in rows})}
    return f"""\
| steps | audits | advantage, points | benign score | {" | ".join(LABELS)} | band above 0 | half the band |
|---|---|---|---|{"---|" * len(LABELS)}---|---|
{chr(10).join(map(line, by_steps.values()))}"""


def page(rows: list[Row], spec: AuditSpec, command: str, *, planned: int) -> str:
    """What was counted, as a page of the documentation."""
    few = f" {planned} audits were planned; {len(rows)} say little about shares." if len(rows) < planned else ""
    tables = "\n\n".join(
        f"## Trained on {ORIGINALS[knows]}\n\n{table([r for r in rows if r['knows'] == knows])}"
        for knows in ORIGINALS
        if any(r["knows"] == knows for r in rows)
    )
    return f"""# Power of {spec.battery}

How often an audit finds an advantage that is there. The original is the built-in CNN for the digits 0 to 6 after 300
steps of training; restricted are the digits 7 to 9, {spec.shots} samples a class; budgets
{", ".join(map(str, spec.budgets))}; {spec.seeds} seeds an audit. The audited model is the one after the steps in the
first column: a defense that takes the rest of the training back. Each audit has other samples, batches and controls, so
the mean of the advantages that they measure, over the budgets above 0, is close to the true one (± standard error).
The rule about the benign score is lifted, so that the statistics decide.

{tables}

"Band above 0" counts audits whose band lies above zero at some budget. An audit that is `invalid` could not
decide.{few}

```console
$ {command}
```

{sum(r["seconds"] for r in rows):.0f} seconds in all, by the clock, on cores that other jobs may share.
"""


def model(knows: str, steps: int) -> SplitModel:
    """A model of the digits 0 to 6 after so many steps."""
    if knows == "benign":
        return original(load_task("digits[0-6]"), steps)
    return taught(ModelSpec(name="cnn", options={"depth": 3}), steps)


def options() -> argparse.Namespace:
    """What was given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--battery", default="standard-v2")
    parser.add_argument("--knows", nargs="+", choices=ORIGINALS, default=list(ORIGINALS), help="digits of the original")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 10, 30, 300])
    parser.add_argument("--audits", type=int, default=12, help="of each model")
    of_audits(parser)
    return parser.parse_args()


def main() -> int:
    """Runs, prints and writes; returns the exit code."""
    given = options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tasks = load_task("digits[0-6]"), load_task("digits[7-9]")
    spec = AuditSpec(
        battery=given.battery, budgets=tuple(given.budgets), seeds=given.seeds, shots=given.shots, side_effects=False
    )
    lines = given.rows.read_text().splitlines() if given.rows.exists() else []
    done: dict[tuple[str, int, int], Row] = {(r["knows"], r["steps"], r["audit"]): r for r in map(json.loads, lines)}
    at, of = map(int, given.part.split("/"))
    jobs = list(product(range(given.audits), given.knows, given.steps))
    for audit, knows, steps in () if given.page else jobs[at - 1 :: of]:
        if (knows, steps, audit) in done:
            continue
        begin = time.perf_counter()
        released, whole = model(knows, steps), model(knows, 300)
        # Never the seeds of another model's audits: equal samples would make their means fall together.
        seed = 1_000_000 * list(ORIGINALS).index(knows) + 1000 * steps + audit
        found, _ = audited(seed, released, whole, tasks, spec)
        later = [each.advantage or 0 for each in found.by_budget if each.budget]
        made = row(audit, found, found.verdict.label, time.perf_counter() - begin)
        made |= {"knows": knows, "steps": steps, "mean": 100 * mean(later), "benign": tasks[0].score(released)}
        print(f"{knows} {steps:3} steps {audit:2} {made['label']:8} {found.verdict.sentence}", flush=True)
        done[knows, steps, audit] = made
        with given.rows.open("a") as file:
            file.write(json.dumps(made) + "\n")
    command = f"python benchmarks/power.py {' '.join(sys.argv[1:])}"
    text = page(list(done.values()), spec, command, planned=len(jobs))
    print(text)
    (given.out / f"power-{given.battery}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
