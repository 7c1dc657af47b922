"""Attacks whose steps do not depend on how features or layers are scaled."""

from __future__ import annotations

import pytest

from holdfast.adversaries import FineTuning, Probe
from holdfast.training import Strategy
from zoo import case
from zoo.measure import best
from zoo.settings import NAIVE


def test_newton_does_not_care_how_features_are_conditioned(zoo_originals, run):
    """A layer of condition number 1e6 before the head slows descent on raw features, and changes no Newton step."""
    released = case("ill-conditioned-insert")
    restricted = released.setting.restricted
    curves = {
        solver: [
            Probe(solver).attack(m, restricted, budgets=(0, 1, 5), run=run) for m in (released.original, released.model)
        ]
        for solver in ("newton", "lbfgs")
    }
    own, slowed = curves["newton"]
    assert slowed.losses[1:] == pytest.approx(own.losses[1:], rel=1e-6)
    assert slowed.scores[1] > 0.9
    assert curves["lbfgs"][1].losses[2] > 3 * curves["lbfgs"][0].losses[2]


@pytest.mark.parametrize("gradient", ["layerwise", "orthogonal"])
def test_layerwise_steps_do_not_care_how_layers_are_scaled(gradient, zoo_originals):
    """Layers scaled against each other stop plain descent; with steps relative to each layer they train as before."""
    released = case("rescaled-pairs")
    attack = FineTuning(Strategy("head", "all", "sgd", 5e-2, 50, gradient=gradient))
    own, plain = (best(attacks, released.model, released.setting, seeds=2).score for attacks in ((attack,), NAIVE))
    assert own > plain + 0.15
