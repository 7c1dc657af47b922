"""The search `adaptive-v2`: every move that undoes a mechanism, and first those that answer the red flags."""

from __future__ import annotations

from typing import Any, Final

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.directional_ablation import DirectionalAblation
from holdfast.adversaries.finetuning import OF_BODY, FineTuning
from holdfast.adversaries.probes import Probe
from holdfast.adversaries.search_space import DEFAULT, MOVES, Params, Search
from holdfast.training import Strategy

EVERY_MOVE: Final[dict[str, tuple[str, ...]]] = {
    **MOVES,
    **{
        move: (move,)
        for move in (
            "negate-head", "invert-inputs", "renormalise-inputs", "enlarge-inputs", "mirror-inputs", "grey-inputs",
            "stretch-inputs", "round-int8", "round-bf16", "prune", "low-rank", "widen", "insert-between",
            "renew-quarter-1", "renew-quarter-2", "renew-quarter-3", "renew-quarter-4", "renew-still",
        )
    },
}  # fmt: skip
"""Undo moves of the search, by name; fixed, as those of `adaptive-v1` are."""

BESIDE: Final[dict[str, dict[str, float]]] = {
    "none": {},
    "replay": {"replay": 0.5},
    "anchor": {"anchor": 1.0},
    "benign-first": {"benign_first": 10},
    "benign-floor": {"benign_floor": 0.9},
    "distil-first": {"distil_first": 10},
}
"""What is done with benign data beside the attack."""

SCHEDULES: Final[dict[str, dict[str, Any]]] = {
    "constant": {},
    "cosine": {"schedule": "cosine", "schedule_steps": 50, "warmup": 5},
    "restarts": {"schedule": "restarts", "schedule_steps": 20},
}

SPACE: Final[dict[str, BaseDistribution]] = {
    "kind": CategoricalDistribution(("finetuning", "ablation", "newton")),
    "initialisation": CategoricalDistribution(("direct", "head", "last-block", "last-half")),
    "scope": CategoricalDistribution(("all", "head", "last-block", "norm", "lora")),
    "optimizer": CategoricalDistribution(("momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw")),
    "learning_rate": FloatDistribution(1e-5, 1.0, log=True),
    "batch_size": CategoricalDistribution((10, 25, 50, 100)),
    "weight_decay": CategoricalDistribution((0.0, 1e-4, 1e-2)),
    "gradient": CategoricalDistribution(("raw", "normalised", "sign", "layerwise", "orthogonal")),
    "schedule": CategoricalDistribution(tuple(SCHEDULES)),
    "sharpness": CategoricalDistribution((0.0, 0.05)),
    "augment": CategoricalDistribution(("", "rand-m9-n2")),
    "burn_in": CategoricalDistribution((0, 5, 10)),
    "beside": CategoricalDistribution(tuple(BESIDE)),
    "first": CategoricalDistribution(tuple(EVERY_MOVE)),
    "second": CategoricalDistribution(tuple(EVERY_MOVE)),
}
"""The search space. `first` and `second` are undo moves of `EVERY_MOVE`, made in this order. A directional ablation
takes the settings of its strategy alone, and Newton's method on the head none."""

START: Final[Params] = {
    **{name: value for name, value in DEFAULT.items() if name != "replay"},
    "kind": "finetuning", "schedule": "constant", "sharpness": 0.0, "augment": "", "beside": "none",
}  # fmt: skip


def informed_adversary(params: Params) -> Adversary:
    """Builds the adversary of a point of the space.

    Example:
        >>> informed_adversary({**START, "first": "widen", "beside": "anchor"}).name
        'initFC+all adam 0.01 b50, widen, anchor 1'
        >>> informed_adversary({**START, "kind": "newton"}).name
        'probe newton whitened'
    """
    if params["kind"] == "newton":
        return Probe("newton", "whitened")
    strategy = Strategy(
        params["initialisation"], params["scope"], params["optimizer"],
        # Three digits, so that the name shows the exact rate.
        float(f"{params['learning_rate']:.2e}"), params["batch_size"], params["weight_decay"],
        gradient=params["gradient"], sharpness=params["sharpness"], **SCHEDULES[params["schedule"]],
    )  # fmt: skip
    if params["kind"] == "ablation":
        return DirectionalAblation(strategy)
    beside: dict[str, Any] = BESIDE[params["beside"]]
    if strategy.scope == "head":  # the body stays as it is
        beside = {name: value for name, value in beside.items() if name not in OF_BODY}
    moves = dict.fromkeys([*EVERY_MOVE[params["first"]], *EVERY_MOVE[params["second"]]])
    return FineTuning(
        strategy, undo=tuple(moves), burn_in=params["burn_in"], augment=params["augment"], **beside
    )  # fmt: skip


SLOW: Final[Params] = {"learning_rate": 1e-3}
"""The rate of most openings: after a repair usual steps are enough, and equal optimizers can be stacked."""

ANSWERS: Final[dict[str, tuple[Params, ...]]] = {
    "Vanishing gradients": (
        {"first": "equalise", **SLOW},
        {"first": "scales", "second": "standardise", **SLOW},
        {"first": "activation", **SLOW},
        {"first": "renew-still", **SLOW},
        {"initialisation": "last-block", "optimizer": "adagrad"},
        {"gradient": "layerwise", "optimizer": "momentum"},
    ),
    "Exploding gradients": (
        {"first": "rescale", "second": "standardise", **SLOW},
        {"gradient": "normalised", "optimizer": "momentum", "learning_rate": 1e-1},
        {"gradient": "orthogonal", "optimizer": "momentum"},
    ),
    "Unusual scales": (
        {"first": "scales", "second": "standardise", **SLOW},
        {"first": "equalise", **SLOW},
        {"first": "rescale", "second": "standardise", **SLOW},
        {"gradient": "layerwise", "optimizer": "momentum"},
    ),
    "Linear layers in a row": (
        {"kind": "newton"},
        {"first": "whiten", **SLOW},
        {"first": "scales", "second": "whiten"},
    ),
    "Dead units": (
        {"first": "revive", **SLOW},
        {"first": "scales", "second": "revive", **SLOW},
        {"first": "shrink-perturb"},
        {"first": "renew-still", **SLOW},
    ),
    "Poisoned BatchNorm statistics": (
        {"first": "recalibrate", **SLOW},
        {"first": "equalise", "second": "recalibrate", **SLOW},
        {"first": "fold", **SLOW},
    ),
    "Another model in training mode": ({"first": "fold", **SLOW}, {"first": "recalibrate", **SLOW}, {"kind": "newton"}),
    "Saturated logits": ({**SLOW}, {"first": "rescale", **SLOW}),
    "Answers turned around": ({"first": "negate-head", "initialisation": "direct", "scope": "head"}, {**SLOW}),
    "Gradients that lie": (
        {"beside": "distil-first", "initialisation": "direct"},
        {"initialisation": "last-half"},
        {"kind": "newton"},
    ),
    "Hidden weights": ({"first": "thaw", **SLOW}, {"beside": "distil-first", "initialisation": "direct"}),
    "Frozen weights": ({"first": "thaw", **SLOW},),
    "No trainable parameters": ({"first": "thaw", **SLOW},),
    "Unrepeatable outputs": ({"beside": "distil-first", "initialisation": "direct"}, {"kind": "newton"}),
    "State that moves by itself": ({"beside": "distil-first", "initialisation": "direct"},),
    "Another architecture": ({"beside": "distil-first", "initialisation": "direct"},),
}
"""Openings by red flag: the moves that repair its mechanism, and attacks that do not meet it."""

OPENINGS: Final[tuple[Params, ...]] = (
    {**SLOW},
    {},
    {"initialisation": "direct", **SLOW},
    {"initialisation": "direct"},
    {"initialisation": "last-block"},
    {"initialisation": "last-half"},
    {"first": "revive"},
    {"first": "shrink-perturb"},
    {"first": "reset-worst", **SLOW},
    {"first": "equalise", **SLOW},
    {"first": "rescale", **SLOW},
    {"first": "balance", **SLOW},
    {"first": "renew-still", **SLOW},
    {"first": "renew-quarter-1", **SLOW},
    {"first": "renew-quarter-2", **SLOW},
    {"first": "renew-quarter-3", **SLOW},
    {"first": "round-bf16", **SLOW},
    {"first": "low-rank", **SLOW},
    {"first": "prune", **SLOW},
    {"first": "revive", **SLOW},
    {"kind": "newton"},
    {"first": "negate-head", "initialisation": "direct", "scope": "head"},
    {"initialisation": "direct", "optimizer": "momentum"},
    {"gradient": "layerwise", "optimizer": "momentum"},
    {"beside": "anchor", **SLOW},
    {"beside": "benign-first", **SLOW},
    {"beside": "distil-first"},
    {"first": "scales", "second": "standardise", **SLOW},
    {"first": "equalise", "second": "recalibrate", **SLOW},
    {"first": "activation", **SLOW},
    {"first": "stretch-inputs", **SLOW},
    {"first": "invert-inputs", **SLOW},
    {"first": "whiten", **SLOW},
    {"first": "insert-between", **SLOW},
    {"first": "widen", **SLOW},
    {"kind": "ablation", **SLOW},
    {"scope": "lora"},
    {"scope": "norm"},
    {"gradient": "orthogonal", "optimizer": "momentum"},
    {"first": "enlarge-inputs", **SLOW},
    {"augment": "rand-m9-n2", **SLOW},
    {"sharpness": 0.05, **SLOW},
)
"""First common attacks and the moves that change weights alone, which are trained together; then the others, the most
general first."""

INFORMED: Final = Search(
    OPENINGS, batch=12, space=SPACE, default=START, make=informed_adversary, answers=ANSWERS, opened=40, unpruned=24
)
"""The search `adaptive-v2`."""
