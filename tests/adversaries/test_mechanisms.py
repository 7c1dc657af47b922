"""Each sham of `mechanisms.py` keeps the benign score, stops plain fine-tuning, and falls to its own move."""

from __future__ import annotations

import pytest
import torch

from holdfast.adversaries import FineTuning, Probe
from holdfast.tasks.splits import halves
from holdfast.training import Strategy
from mechanisms import MECHANISMS, faint
from shams import SHOTS, make, zoo_tasks

ADAM = Strategy("head", "all", "adam", 1e-3, 50)
PLAIN = (FineTuning(ADAM), FineTuning(Strategy("direct", "all", "momentum", 1e-2, 50)))
OWN = {
    "small-weights": FineTuning(ADAM, undo=("prune",)),
    "low-bits": FineTuning(ADAM, undo=("round-bf16",)),
    "by-brightness": FineTuning(ADAM, undo=("stretch-inputs",)),
    "cliff": FineTuning(ADAM, benign_floor=0.8),
    "dead-layer": FineTuning(ADAM, undo=("widen",)),
}
"""The move that undoes each."""
BUDGETS = (0, 15, 30)


def best(adversary, victim, restricted, benign, run):
    """Mean over two seeds of the best score so far."""
    curves = [
        adversary.attack(victim, restricted.few_shot(SHOTS, s), budgets=BUDGETS, run=run, seed=s, benign=benign)
        for s in range(2)
    ]
    return sum(max(score or 0.0 for score in curve.scores) for curve in curves) / 2


@pytest.mark.parametrize("name", MECHANISMS)
def test_falls_to_its_own_move(name, zoo_originals, run):
    benign, whole = zoo_tasks()
    original = zoo_originals["none"]
    defender, restricted = (faint(t) if name == "by-brightness" else t for t in halves(whole))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MECHANISMS[name](original, benign, defender).eval()
    assert benign.score(model) > benign.score(original) - 0.05

    plain = max(best(adversary, model, restricted, benign, run) for adversary in PLAIN)
    wanted = best(PLAIN[0], original, restricted, benign, run)
    assert plain < wanted - 0.2
    assert best(OWN[name], model, restricted, benign, run) > plain + 0.15


def test_newton_does_not_care_how_features_are_conditioned(zoo_originals, run):
    """A layer of condition number 1e6 before the head slows descent on raw features, and changes no Newton step."""
    benign, whole = zoo_tasks()
    original, restricted = zoo_originals["none"], halves(whole)[1]
    released = make("ill-conditioned-insert", zoo_originals, benign, restricted)
    curves = {
        solver: [Probe(solver).attack(m, restricted, budgets=(0, 1, 5), run=run) for m in (original, released)]
        for solver in ("newton", "lbfgs")
    }
    own, slowed = curves["newton"]
    assert slowed.losses[1:] == pytest.approx(own.losses[1:], rel=1e-6)
    assert slowed.scores[1] > 0.9
    assert curves["lbfgs"][1].losses[2] > 3 * curves["lbfgs"][0].losses[2]


def test_layerwise_steps_do_not_care_how_layers_are_scaled(zoo_originals, run):
    """Layers scaled against each other stop plain descent; with steps relative to each layer they train as before."""
    benign, whole = zoo_tasks()
    restricted = halves(whole)[1]
    released = make("rescaled-pairs", zoo_originals, benign, restricted)
    plain = max(best(a, released, restricted, benign, run) for a in PLAIN)
    for gradient in ("layerwise", "orthogonal"):
        attack = FineTuning(Strategy("head", "all", "sgd", 5e-2, 50, gradient=gradient))
        assert best(attack, released, restricted, benign, run) > plain + 0.15, gradient
