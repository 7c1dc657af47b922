"""A search for adversaries: Optuna looks through the joint space, and begins with what anybody would try first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.finetuning import FineTuning
from holdfast.adversaries.undo.moves import UNDO
from holdfast.training import Strategy

NONE = "none"
SCALES = ("fold", "balance", "rescale")
"""The moves that undo every trick of scale at once: of statistics, of units, of layers."""
MOVES: dict[str, tuple[str, ...]] = {NONE: (), "scales": SCALES, **{move: (move,) for move in UNDO}}
"""What a search may undo, by name."""

SPACE: dict[str, BaseDistribution] = {
    "initialisation": CategoricalDistribution(("direct", "head", "last-block", "last-half")),
    "scope": CategoricalDistribution(("all", "head", "last-block", "norm", "lora")),
    "optimizer": CategoricalDistribution(("momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw")),
    "learning_rate": FloatDistribution(1e-4, 1.0, log=True),
    "batch_size": CategoricalDistribution((10, 25, 50, 100)),
    "weight_decay": CategoricalDistribution((0.0, 1e-4, 1e-2)),
    "gradient": CategoricalDistribution(("raw", "normalised", "sign")),
    "burn_in": CategoricalDistribution((0, 5, 10)),
    "replay": CategoricalDistribution((0.0, 0.5)),
    "first": CategoricalDistribution(tuple(MOVES)),
    "second": CategoricalDistribution(tuple(MOVES)),
}
"""The joint space. `first` and `second` are undo moves of `MOVES`, made in this order."""

DEFAULT: dict[str, Any] = {
    "initialisation": "head", "scope": "all", "optimizer": "adam", "learning_rate": 1e-2, "batch_size": 50,
    "weight_decay": 0.0, "gradient": "raw", "burn_in": 0, "replay": 0.0, "first": NONE, "second": NONE,
}  # fmt: skip


@dataclass(frozen=True)
class Search:
    """A seeded search; the same trials in the same order whatever they are run on.

    Attributes:
        openings: settings to begin with, each what differs from `DEFAULT`.
        batch: trials that are proposed at once, and may be run at once; results are told in order.
        repeated: how many of each model's best are then repeated, with every seed and on every model.
    """

    openings: tuple[dict[str, Any], ...]
    batch: int = 6
    repeated: int = 3

    def config(self) -> dict[str, Any]:
        """Returns what makes the search what it is; with a seed, it says every trial."""
        return {
            "kind": "search",
            "openings": [{**DEFAULT, **o} for o in self.openings],
            "space": {name: optuna.distributions.distribution_to_json(d) for name, d in SPACE.items()},
            "batch": self.batch,
            "repeated": self.repeated,
        }

    def begin(self, seed: int) -> Searcher:
        """Starts the search against one model."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32, multivariate=True, constant_liar=True, n_startup_trials=len(self.openings) // 2,
        )  # fmt: skip
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for opening in self.openings:
            study.enqueue_trial({**DEFAULT, **opening})
        return Searcher(study)


@dataclass
class Searcher:
    """A search under way: ask for settings, tell how they did."""

    study: optuna.Study
    asked: list[optuna.trial.Trial] = field(default_factory=list)

    def ask(self, count: int) -> list[Adversary]:
        """Proposes adversaries."""
        self.asked = [self.study.ask(SPACE) for _ in range(count)]
        return [adversary(trial.params) for trial in self.asked]

    def tell(self, values: Sequence[float | None]) -> None:
        """Reports how the last proposals did, in their order; larger is better, None: it could not be run."""
        for trial, value in zip(self.asked, values, strict=True):
            usable = value is not None and math.isfinite(value)
            state = optuna.trial.TrialState.COMPLETE if usable else optuna.trial.TrialState.FAIL
            self.study.tell(trial, value if usable else None, state=state)


def adversary(params: dict[str, Any]) -> FineTuning:
    """Builds what a point of the space stands for.

    Example:
        >>> adversary({**DEFAULT, "first": "equalise", "second": "equalise"}).undo
        ('equalise',)
    """
    moves = dict.fromkeys([*MOVES[params["first"]], *MOVES[params["second"]]])
    strategy = Strategy(
        params["initialisation"], params["scope"], params["optimizer"],
        # Three digits: what a name shows is what was run.
        float(f"{params['learning_rate']:.2e}"), params["batch_size"], params["weight_decay"],
        gradient=params["gradient"],
    )  # fmt: skip
    return FineTuning(strategy, undo=tuple(moves), burn_in=params["burn_in"], replay=params["replay"])


ADAPTIVE: Search = Search(
    openings=(
        {"learning_rate": 1e-3},
        {},
        {"initialisation": "direct", "learning_rate": 1e-3},
        {"initialisation": "direct", "optimizer": "momentum", "learning_rate": 1e-2},
        {"optimizer": "momentum", "learning_rate": 1e-1},
        {"optimizer": "adagrad"},
        {"first": "scales", "second": "standardise", "learning_rate": 1e-3},
        {"first": "scales", "second": "standardise", "optimizer": "momentum"},
        {"first": "scales", "second": "whiten", "learning_rate": 1e-3},
        {"first": "scales", "second": "revive", "learning_rate": 1e-3},
        {"first": "scales", "initialisation": "direct", "learning_rate": 1e-3},
        {"first": "rescale", "second": "standardise", "learning_rate": 1e-3},
        {"first": "equalise", "second": "recalibrate", "learning_rate": 1e-3},
        {"first": "revive", "learning_rate": 1e-3},
        {"first": "shrink-perturb"},
        {"first": "activation", "learning_rate": 1e-3},
        {"first": "whiten", "learning_rate": 1e-3},
        {"first": "standardise", "scope": "head"},
        {"first": "reset-worst", "learning_rate": 1e-3},
        {"first": "insert", "learning_rate": 1e-3},
        {"gradient": "normalised", "optimizer": "momentum", "learning_rate": 1e-1},
        {"gradient": "sign", "optimizer": "momentum", "learning_rate": 1e-3},
        {"burn_in": 10, "learning_rate": 1e-3},
        {"replay": 0.5, "learning_rate": 1e-3},
        {"initialisation": "last-block"},
        {"initialisation": "last-half"},
        {"scope": "lora"},
        {"scope": "norm"},
    )
)
"""What an informed adversary tries first: usual fine-tuning, then every undo move, then the search."""
