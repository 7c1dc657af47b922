"""A search for adversaries: Optuna explores a space of settings, starting from common attacks.

A search may first read the red flags of the audited model: the moves that answer a flag are then its first trials,
against every model, so that the controls get the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.finetuning import FineTuning
from holdfast.training import Strategy

NONE = "none"
SCALES = ("fold", "balance", "rescale")
"""Moves that together undo unusual scales of statistics, units and layers."""
MOVES: dict[str, tuple[str, ...]] = {
    NONE: (),
    "scales": SCALES,
    **{
        move: (move,)
        for move in (
            "thaw", "recalibrate", "fold", "rescale", "balance", "equalise", "revive", "shrink-perturb", "activation",
            "whiten", "standardise", "reset-worst", "insert",
        )
    },
}  # fmt: skip
"""Undo moves of a search, by name. The list is fixed, because the trials of a published search depend on it."""

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
"""The search space. `first` and `second` are undo moves of `MOVES`, made in this order."""

DEFAULT: dict[str, Any] = {
    "initialisation": "head", "scope": "all", "optimizer": "adam", "learning_rate": 1e-2, "batch_size": 50,
    "weight_decay": 0.0, "gradient": "raw", "burn_in": 0, "replay": 0.0, "first": NONE, "second": NONE,
}  # fmt: skip


Params = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """A seeded search: the same trials in the same order on any executor.

    Attributes:
        openings: the first trials, each as its differences from `default`.
        batch: number of trials proposed at once, which may run in parallel; their results are reported in order.
        repeated: how many of the best trials against each model are then repeated with every seed on every model.
        space: the settings that are searched, with their values.
        default: a point of the space.
        make: builds the adversary of a point.
        answers: openings by the name of the red flag that they answer; they come before the others, and not at all
            without the flag.
        opened: at most so many openings are tried; None: all.
        unpruned: number of first trials that run to the last budget, whatever they score. Such trials on small networks
            are trained together, see `holdfast.adversaries.batched`.
        floor: scores below count as this, so that a mean over budgets does not hang on a score of -1e9. Where models
            from scratch stay below it, their trials are all alike, and nothing is searched for.
    """

    openings: tuple[Params, ...]
    batch: int = 6
    repeated: int = 3
    space: Mapping[str, BaseDistribution] = field(default_factory=lambda: SPACE)
    default: Mapping[str, Any] = field(default_factory=lambda: DEFAULT)
    make: Callable[[Params], Adversary] = field(default_factory=lambda: adversary)
    answers: Mapping[str, tuple[Params, ...]] = field(default_factory=dict)
    opened: int | None = None
    unpruned: int = 0
    floor: float = 0.0

    def config(self) -> dict[str, Any]:
        """Returns the settings of the search; together with the seed they determine every trial."""
        answers = {flag: [{**self.default, **o} for o in own] for flag, own in self.answers.items()}
        younger = {"answers": answers, "opened": self.opened, "unpruned": self.unpruned, "floor": self.floor}
        return {
            "kind": "search",
            "openings": [{**self.default, **o} for o in self.openings],
            "space": {name: optuna.distributions.distribution_to_json(d) for name, d in self.space.items()},
            "batch": self.batch,
            "repeated": self.repeated,
            **{name: value for name, value in younger.items() if value},
        }

    def reading(self, flags: Sequence[str]) -> Search:
        """Returns this search with the answers to some red flags as its first openings, each flag's in turn.

        Example:
            >>> plan = Search(({"burn_in": 5}, {}), answers={"Dead units": ({"first": "revive"},)}, opened=2)
            >>> plan.reading(["Frozen weights", "Dead units"]).openings
            ({'first': 'revive'}, {'burn_in': 5})
        """
        answered = [opening for flag in flags for opening in self.answers.get(flag, ())]
        points: dict[tuple[Any, ...], Params] = {}
        for opening in (*answered, *self.openings):
            points.setdefault(tuple(sorted({**self.default, **opening}.items())), opening)
        return replace(self, openings=tuple(points.values())[: self.opened], answers={})

    def begin(self, seed: int) -> Searcher:
        """Starts the search against one model."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32, multivariate=True, constant_liar=True, n_startup_trials=len(self.openings) // 2,
        )  # fmt: skip
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for opening in self.openings:
            study.enqueue_trial({**self.default, **opening})
        return Searcher(study, self)


@dataclass
class Searcher:
    """A running search: ask for adversaries, then tell their results."""

    study: optuna.Study
    plan: Search
    asked: list[optuna.trial.Trial] = field(default_factory=list)

    def ask(self, count: int) -> list[Adversary]:
        """Proposes adversaries."""
        self.asked = [self.study.ask(dict(self.plan.space)) for _ in range(count)]
        return [self.plan.make(trial.params) for trial in self.asked]

    def tell(self, values: Sequence[float | None]) -> None:
        """Reports the results of the last proposals, in order; larger is better; None: the trial could not run."""
        for trial, value in zip(self.asked, values, strict=True):
            usable = value is not None and math.isfinite(value)
            state = optuna.trial.TrialState.COMPLETE if usable else optuna.trial.TrialState.FAIL
            self.study.tell(trial, value if usable else None, state=state)


def adversary(params: dict[str, Any]) -> FineTuning:
    """Builds the adversary of a point of the space.

    Example:
        >>> adversary({**DEFAULT, "first": "equalise", "second": "equalise"}).undo
        ('equalise',)
    """
    moves = dict.fromkeys([*MOVES[params["first"]], *MOVES[params["second"]]])
    strategy = Strategy(
        params["initialisation"], params["scope"], params["optimizer"],
        # Three digits, so that the name shows the exact rate.
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
"""The search `adaptive-v1`: common fine-tuning, then every undo move, then free exploration."""
