"""The zoo is worth something only if its members look as they claim: as good as the original, and resistant."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from holdfast.adversaries import FineTuning
from holdfast.errors import HoldfastError
from holdfast.runtime.run import Run
from holdfast.tasks.splits import halves
from holdfast.training import Strategy
from shams import BUDGETS, NORM_OF, SHAMS, SHOTS, make, zoo_tasks

NAIVE = (
    FineTuning(Strategy("direct", "all", "momentum", 1e-2, 50)),
    FineTuning(Strategy("direct", "all", "adam", 1e-3, 50)),
)
PROBE = (FineTuning(Strategy("head", "head", "momentum", 1e-1, 50)),)
DESCENT = NAIVE[:1]
AGAINST = {
    "ill-conditioned-insert": PROBE,
    **dict.fromkeys(
        ("saturated-head", "saturated-logits", "huge-in-training", "noise-in-training", "exploding-gradient"), DESCENT
    ),
}
"""Where a sham stops plain gradient descent only, as Adam does not care how long a gradient is."""
SECOND_GUARD = {"frozen", "huge-weight-norm", "hidden-in-buffers"}
"""Nothing stops an adversary there but a script that trains the parameters that it finds; ours thaws first."""


@cache
def _tasks():
    benign, restricted = zoo_tasks()
    return benign, *halves(restricted)


def naive_best(model, battery=NAIVE, seeds=3):
    """Best mean over seeds of the score after the last budget: whoever is naive does not stop early."""
    run, (_, _, restricted) = Run(seed=0, device=torch.device("cpu")), _tasks()
    means = []
    for adversary in battery:
        last = []
        for seed in range(seeds):
            try:
                scores = adversary.attack(
                    model, restricted.few_shot(SHOTS, seed), budgets=BUDGETS, run=run, seed=seed
                ).scores
            except HoldfastError:  # a foreign forward pass may fail
                scores = [None]
            last.append(scores[-1] or 0.0)
        means.append(sum(last) / seeds)
    return max(means)


@pytest.fixture(scope="module")
def original_best(zoo_originals):
    return {(norm, b): naive_best(model, b) for norm, model in zoo_originals.items() for b in (NAIVE, DESCENT, PROBE)}


@pytest.mark.parametrize("name", SHAMS)
def test_a_sham_keeps_the_benign_score_and_looks_resistant(name, zoo_originals, original_best):
    benign, defender, _ = _tasks()
    original = zoo_originals[NORM_OF[name]]
    model = make(name, zoo_originals, benign, defender)
    assert benign.score(model) > benign.score(original) - 0.03
    assert benign.score(copy.deepcopy(model)) == pytest.approx(benign.score(model), abs=0.02)  # adversaries copy
    if name not in SECOND_GUARD:
        battery = AGAINST.get(name, NAIVE)
        assert naive_best(model, battery) < original_best[NORM_OF[name], battery] - 0.1


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_there_is_an_advantage_to_pretend_away(norm, zoo_originals):
    run, original = Run(seed=0, device=torch.device("cpu")), zoo_originals[norm]
    with run.seeded("scratch"):
        fresh = original.fresh()
    battery = [FineTuning(Strategy("head", "all", "adagrad", 1e-2, 50))]
    assert naive_best(original, battery) > naive_best(fresh, battery) + 0.08


def test_making_a_sham_leaves_the_original_alone(zoo_originals):
    benign, defender, _ = _tasks()
    before = {norm: model.facts().sha256 for norm, model in zoo_originals.items()}
    for name in SHAMS:
        make(name, zoo_originals, benign, defender)
    assert {norm: model.facts().sha256 for norm, model in zoo_originals.items()} == before
