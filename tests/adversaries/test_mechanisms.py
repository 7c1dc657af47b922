"""Each sham of `mechanisms.py` keeps the benign score, stops plain fine-tuning, and falls to its own move."""

from __future__ import annotations

import pytest
import torch

from holdfast.adversaries import FineTuning
from holdfast.tasks.splits import halves
from holdfast.training import Strategy
from mechanisms import MECHANISMS, faint
from shams import SHOTS, zoo_tasks

ADAM = Strategy("head", "all", "adam", 1e-3, 50)
HIGH = Strategy("head", "all", "adam", 1e-2, 50)
PLAIN = (FineTuning(ADAM), FineTuning(HIGH), FineTuning(Strategy("direct", "all", "momentum", 1e-2, 50)))
OWN = {
    "small-weights": FineTuning(ADAM, undo=("prune",)),
    "low-bits": FineTuning(ADAM, undo=("round-bf16",)),
    "by-brightness": FineTuning(ADAM, undo=("stretch-inputs",)),
    "cliff": FineTuning(ADAM, benign_floor=0.8),
}
"""The move that undoes each."""
BUDGETS = (0, 10, 20, 40)


@pytest.mark.parametrize("name", MECHANISMS)
def test_falls_to_its_own_move(name, zoo_originals, run):
    benign, whole = zoo_tasks()
    original = zoo_originals["none"]
    defender, restricted = (faint(t) if name == "by-brightness" else t for t in halves(whole))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MECHANISMS[name](original, benign, defender).eval()
    assert benign.score(model) > benign.score(original) - 0.05

    def best(adversary, victim):
        curves = [
            adversary.attack(victim, restricted.few_shot(SHOTS, s), budgets=BUDGETS, run=run, seed=s, benign=benign)
            for s in range(2)
        ]
        return sum(max(score or 0.0 for score in curve.scores) for curve in curves) / 2

    plain = max(best(adversary, model) for adversary in PLAIN)
    wanted = max(best(adversary, original) for adversary in PLAIN)
    assert plain < wanted - 0.2
    assert best(OWN[name], model) > plain + 0.2
