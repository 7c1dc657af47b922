"""How the fine-tuning members of `standard-v1` were chosen: a full grid against several victims, then a greedy cover.

    python benchmarks/choose_battery.py measure FOLDER [--setting digits|cifar] [--data DIR] [--part 1/2]
    python benchmarks/choose_battery.py choose FOLDER

`measure` runs every adversary of the grid on every cell (a victim and a number of samples a class) and writes one JSON
line each; what is there already is not run again, and parts may run beside each other. `choose` keeps adding the
adversary that adds most to the best-of-battery score, averaged over cells and budgets, and stops when none adds 0.2
points. The best is over budgets as well, as in an audit: an adversary may stop early.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import get_args

import torch

from holdfast.adversaries import FineTuning
from holdfast.defenses import SignalFrontier, Sophon
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.training import Initialisation, Scope, Strategy, pretrain

RATES = {
    "momentum": (1e-4, 1e-3, 1e-2, 1e-1),
    "nesterov": (1e-3, 1e-2, 1e-1, 1.0),
    "adagrad": (1e-3, 1e-2, 1e-1, 1.0),
    "adadelta": (1e-1, 1.0, 10.0, 100.0),
    "adam": (1e-4, 1e-3, 1e-2, 1e-1),
    "adamw": (1e-4, 1e-3, 1e-2, 1e-1),
}
"""Four rates a decade apart for each optimizer, around the middle of what works for it."""
LEAST_GAIN = 0.002
MOST = 40
Cell = tuple[str, SplitModel, Task]


def grid(setting: str) -> list[FineTuning]:
    """Everything at batches of 50, the middle rates also at 10 and 200; for CIFAR one rate of two optimizers."""
    starts, scopes = get_args(Initialisation), get_args(Scope)
    if setting == "cifar":
        two = (("nesterov", 1e-2), ("adam", 1e-3))
        return [FineTuning(Strategy(i, s, o, r, 20)) for i, s, (o, r) in product(starts, scopes, two)]
    full = [Strategy(i, s, o, r, 50) for i, s, o in product(starts, scopes, RATES) for r in RATES[o]]
    sizes = [
        Strategy(i, "all", o, r, b) for i, o, b in product(("direct", "head"), RATES, (10, 200)) for r in RATES[o][1:3]
    ]
    return [FineTuning(s) for s in [*full, *sizes]]


def digits(run: Run) -> Iterator[Cell]:
    """A trained CNN, the same with two defenses, and a fresh one; 2 to 20 samples a class."""
    benign, restricted = load_task("digits[0-6]"), load_task("digits[7-9]")
    defender, attacker = restricted.halves(0)
    with run.seeded("initialise"):
        fresh = load_model("cnn", benign)
    original = pretrain(fresh, benign, steps=300, run=run)
    brief = Sophon(iterations=60, steps=10, batch_sizes=(20,), learning_rates=(1e-4, 1e-3, 1e-2), guard=False)
    sophon, _ = brief.immunize(original, benign, defender, run=run)
    frontier, _ = SignalFrontier(epsilon=1e-3).immunize(original, benign, defender, run=run)
    victims = (
        ("scratch", fresh, 5),
        ("original", original, 2),
        ("sophon", sophon, 20),
        ("signal-frontier", frontier, 5),
    )
    for name, model, shots in victims:
        yield f"{name}, {shots} shots", model, attacker.few_shot(shots, 0)


def cifar(run: Run, data: Path) -> Iterator[Cell]:
    """ResNet-20 trained on CIFAR-10, and a fresh one, on ten other classes."""
    benign = load_task("cifar10", data_dir=data)
    restricted = load_task("cifar100_objects", data_dir=data).limit_test(200, 0).few_shot(10, 0)
    spec = ModelSpec(name="cifar_resnet", weights="weights/cifar10_resnet20.safetensors")
    original = load_model(spec, benign, data_dir=data)
    with run.seeded("initialise"):
        yield "scratch, 10 shots", original.fresh(), restricted
    yield "original, 10 shots", original, restricted


def measure(folder: Path, setting: str, data: Path | None, part: tuple[int, int]) -> None:
    run = Run(seed=0, device=torch.device("cpu"))
    budgets = (0, 5, 10, 20, 40) if setting == "digits" else (0, 5, 15)
    path = folder / f"{setting}-{part[0]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = {(r["cell"], r["name"]) for r in rows(folder)}
    if setting == "cifar" and data is None:
        raise SystemExit("cifar needs --data: a folder with cifar10.npz, cifar100_objects.npz and weights.")
    cells = list(digits(run)) if data is None or setting == "digits" else list(cifar(run, data))
    adversaries = random.Random(0).sample(whole := grid(setting), len(whole))[part[0] - 1 :: part[1]]
    for adversary in adversaries:  # in random order, so that an interrupted run compares a fair part of the grid
        for cell, model, task in cells:
            key = f"{setting}: {cell}"
            if (key, adversary.name) in done or adversary.not_applicable(model, task) is not None:
                continue
            curve = adversary.attack(model, task, budgets=budgets, run=run)
            row = {"cell": key, "name": adversary.name, "config": adversary.config(), "scores": curve.scores[1:]}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def choose(folder: Path) -> None:
    """Prints the greedy cover of each setting, and what each value of a factor reaches alone."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    factors: dict[str, list[str]] = {}
    for row in rows(folder):
        best = [max((s or 0.0) for s in row["scores"][: i + 1]) for i in range(len(row["scores"]))]
        found.setdefault(row["cell"].split(":")[0], {}).setdefault(row["name"], {})[row["cell"]] = best
        factors[row["name"]] = [str(row["config"][k]) for k in ("initialisation", "scope", "optimizer")]
    for setting, by_name in found.items():
        counts = Counter(cell for scores in by_name.values() for cell in scores)
        # Every adversary must be compared on the same cells; an interrupted run has some that few were tried on.
        cells = sorted(c for c, n in counts.items() if n >= 0.8 * len(by_name))
        table = {
            name: torch.tensor([scores[c] for c in cells], dtype=torch.float64)
            for name, scores in by_name.items()
            if all(c in scores for c in cells)
        }
        everything = torch.stack(list(table.values())).amax(0)
        print(f"\n{setting}: {len(table)} adversaries on {', '.join(c.split(': ')[1] for c in cells)}")
        print(f"best of all: {_percent(everything.mean())}; by cell {[_percent(v) for v in everything.mean(1)]}")
        covered = torch.zeros_like(everything)
        for position in range(1, MOST + 1):
            name, score = max(((n, t.maximum(covered).mean()) for n, t in table.items()), key=lambda x: float(x[1]))
            gain = score - covered.mean()
            if gain < LEAST_GAIN:
                break
            covered = covered.maximum(table[name])
            print(f"| {position} | `{name}` | {_percent(covered.mean())} | {_percent(gain)} |")
        print(f"by cell {[_percent(v) for v in covered.mean(1)]}")
        for i, factor in enumerate(("initialisation", "scope", "optimizer")):
            for value in dict.fromkeys(f[i] for f in factors.values()):
                only = [t for n, t in table.items() if factors[n][i] == value]
                if only:
                    best, name = max((float(table[n].mean()), n) for n in table if factors[n][i] == value)
                    alone = torch.stack(only).amax(0).mean()
                    print(f"| {factor} `{value}` | {_percent(alone)} | `{name}` {100 * best:.1f} |")


def _percent(value: torch.Tensor) -> str:
    return f"{100 * float(value):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "choose"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", choices=("digits", "cifar"), default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--part", default="1/1", help="such as 1/2: this half of the grid")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "choose":
        choose(given.folder)
        return
    at, of = map(int, given.part.split("/"))
    measure(given.folder, given.setting, given.data, (at, of))


if __name__ == "__main__":
    main()
