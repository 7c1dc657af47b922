"""IMMA made against fine-tuning, DreamBooth or Textual Inversion, each attacked by all of them.

    python benchmarks/imma_methods.py RUN --data DIR

RUN is a finished run of the recipe text-to-image/digits, whose original is immunized anew with the recipe's settings of
IMMA. Prints, for each method, the benign error, and the error on the restricted digits before any step and after 10 and
50 steps of each adversary of `text-to-image-quick-v1`, with one seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from holdfast.adversaries import listed
from holdfast.defenses import build_defense
from holdfast.experiments import recipe as recipes
from holdfast.models import SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.tasks.splits import halves

BUDGETS = (0, 10, 50)
METHODS: dict[str, dict[str, Any]] = {
    "fine-tuning": {},
    "dreambooth": {"method": "dreambooth"},
    "textual-inversion": {
        "method": "textual-inversion",
        "adaptation": {"optimizer": "adamw", "learning_rate": 0.05, "batch_size": 16},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe: Any = recipes.load("text-to-image/digits")
    (setting,) = recipe.settings.values()
    run = Run(seed=0, device=torch.device("cpu"), quiet=True)
    benign, restricted = (load_task(spec, data_dir=given.data) for spec in (setting.benign, setting.restricted))
    original = load_model(setting.model, benign)
    (weights,) = (given.run / "checkpoints" / "originals").glob("*.safetensors")
    original.network.load_state_dict(load_file(weights))
    defender, adversary = halves(restricted)
    few = adversary.few_shot(recipe.shots, 0)
    report("original", original, 0.0, benign, few, run)
    for name, change in METHODS.items():
        begin = time.process_time()
        defense = build_defense({**recipe.defenses["IMMA"], **change})
        model, _ = defense.immunize(original, benign, defender, run=run)
        report(name, model, time.process_time() - begin, benign, few, run)


def report(name: str, model: SplitModel, seconds: float, benign: Task, few: Task, run: Run) -> None:
    """Prints a line of JSON."""
    errors = {}
    for attack in listed("text-to-image-quick-v1"):
        curve = attack.attack(model, few, budgets=BUDGETS, run=run, seed=0, benign=benign)
        errors[attack.name] = [None if s is None else round((1 - s) * few.chance, 4) for s in curve.scores]
    row = {"against": name, "benign": round(benign.score(model), 4), "seconds": round(seconds), "errors": errors}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
