"""Measures how far a battery undoes each sham defense of the test suite's zoo: scores, and no verdicts.

    python benchmarks/undone_shams.py [--battery standard-v1] [--seeds 2] [--only NAME ...] [--out PAGE.md]

Each sham is attacked as an audit does it: inside the original's code where it has code of its own and its weights fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from holdfast.adversaries import BATTERIES
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, architecture_differences, transplant
from holdfast.runtime.run import Run
from holdfast.tasks.splits import halves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import shams  # the zoo belongs to the tests

Scores = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battery", default="standard-v1")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    benign, restricted = shams.zoo_tasks()
    originals = {norm: shams.zoo_original(norm) for norm in ("batch", "none")}
    base = {norm: scores(model, options.battery, options.seeds) for norm, model in originals.items()}
    rows = []
    for name in options.only or shams.SHAMS:
        original = originals[shams.NORM_OF[name]]
        released = shams.make(name, originals, benign, halves(restricted)[0])
        inside = transplant(released, original) if architecture_differences(released, original) else None
        found = scores(inside or released, options.battery, options.seeds)
        code = "the original's" if inside else "as released"
        rows.append(row(name, code, found, base[shams.NORM_OF[name]]))
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(page(options.battery, options.seeds, rows))


def scores(model: SplitModel, battery: str, seeds: int) -> Scores:
    """Mean scores in % at each budget above 0, by adversary; what diverges counts as 0 from there on."""
    _, restricted = halves(shams.zoo_tasks()[1])
    found = {}
    for adversary in BATTERIES[battery]:
        if adversary.not_applicable(model, restricted) is not None:
            continue
        each = []
        for seed in range(seeds):
            few = restricted.few_shot(shams.SHOTS, seed)
            try:
                curve = adversary.attack(model, few, budgets=shams.BUDGETS, run=Run(), seed=seed)
                each.append([100 * (s or 0) for s in curve.scores[1:]])
            except HoldfastError:  # the released code fails in training
                each.append([0.0] * (len(shams.BUDGETS) - 1))
        found[adversary.name] = [sum(values) / seeds for values in zip(*each, strict=True)]
    return found


def row(name: str, code: str, found: Scores, base: Scores) -> str:
    """One line of the table."""
    best = max(found, key=lambda n: found[n][-1])
    spelled = [" / ".join(f"{v:.0f}" for v in values) for values in (found[best], _best(found), _best(base))]
    return f"| {name} | {code} | `{best}` | {' | '.join(spelled)} |"


def _best(found: Scores) -> list[float]:
    return [max(values) for values in zip(*found.values(), strict=True)]


def page(battery: str, seeds: int, rows: list[str]) -> str:
    """The page."""
    return "\n".join(
        [
            "# Sham defenses, undone",
            "",
            f"What `{battery}` reaches on the sham defenses of `tests/shams.py`: {shams.SHOTS} samples a class, mean",
            f"of {seeds} seeds, test score in % after 5 / 10 / 20 steps. Digits 0 to 6 are benign, 7 to 9 restricted",
            "(chance is 33 %). A sham that has code of its own is attacked inside the original's code where its",
            "weights fit, as audits do beside attacking it as it is. The last two columns are the battery's best at",
            "each budget. They are maxima over the battery on the same test images: they compare a sham with its",
            "original, and are no estimates.",
            "",
            "| sham | code | strongest after 20 steps | its scores | best on the sham | best on the original |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Made by `benchmarks/undone_shams.py`; verdicts are by `benchmarks/shams.py`.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
