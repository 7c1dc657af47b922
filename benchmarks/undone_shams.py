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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo import ZOO, Setting, case  # the zoo belongs to the tests
from zoo.settings import SHOTS

Scores = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battery", default="standard-v1")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base: dict[str, Scores] = {}
    rows = []
    for name in options.only or [name for name, sham in ZOO.items() if sham.setting in ("batch", "none")]:
        built = case(name)
        original, released, setting = built.original, built.model, built.setting
        if built.sham.setting not in base:
            base[built.sham.setting] = scores(original, setting, options.battery, options.seeds)
        inside = transplant(released, original) if architecture_differences(released, original) else None
        found = scores(inside or released, setting, options.battery, options.seeds)
        code = "the original's" if inside else "as released"
        rows.append(row(name, code, found, base[built.sham.setting]))
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(page(options.battery, options.seeds, rows))


def scores(model: SplitModel, setting: Setting, battery: str, seeds: int) -> Scores:
    """Mean scores in % at each budget above 0, by adversary; what diverges counts as 0 from there on."""
    found = {}
    for adversary in BATTERIES[battery]:
        if adversary.not_applicable(model, setting.restricted) is not None:
            continue
        each = []
        for seed in range(seeds):
            try:
                curve = adversary.attack(
                    model, setting.few(seed), budgets=setting.budgets, run=Run(), seed=seed, benign=setting.benign
                )
                each.append([100 * (s or 0) for s in curve.scores[1:]])
            except HoldfastError:  # the released code fails in training
                each.append([0.0] * (len(setting.budgets) - 1))
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
            f"What `{battery}` reaches on the sham defenses of `tests/zoo`: {SHOTS} samples a class, mean",
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
