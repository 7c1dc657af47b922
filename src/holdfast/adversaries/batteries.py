"""Batteries: the adversaries of an audit, as a named and frozen list, as a search, or as your own list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Final

from holdfast.adversaries.base import KINDS, Adversary
from holdfast.adversaries.search_space import Search
from holdfast.errors import HoldfastError, unknown
from holdfast.runtime.registry import Registry
from holdfast.training import Precision, Strategy

CUSTOM: Final = "custom"
"""Name of a battery that is passed as a list of adversaries."""

BATTERIES: Final[Registry[tuple[Adversary, ...]]] = Registry("battery", "holdfast.adversaries")
"""Adversaries by the name of their battery."""

SEARCHES: Final[Registry[Search]] = Registry("search", "holdfast.adversaries")
"""Batteries that search for adversaries, against each model separately."""


def register_battery(name: str, adversaries: Sequence[Adversary] | Search) -> None:
    """Registers a battery or a search; called by the module, in this folder or of an entry point, that defines it.

    Args:
        name: an unused name; a published battery never changes.
        adversaries: each with a different name.

    Raises:
        HoldfastError: for a name that is taken, or a list that `battery` refuses.
    """
    if name == CUSTOM:
        raise HoldfastError(f"{CUSTOM!r} is the name of batteries that are passed as a list; choose another name.")
    if isinstance(adversaries, Search):
        SEARCHES.register(name)(adversaries)
    else:
        BATTERIES.register(name)(_checked(name, adversaries))


def list_batteries() -> list[str]:
    """Returns the names of all batteries, searches included.

    Example:
        >>> list_batteries()
        ['adaptive-causal-v1', 'adaptive-v1', 'adaptive-v2', 'causal-quick-v1', 'causal-v1', 'causal-v2',
         'generation-v1', 'language-v1', 'probes-v1', 'quick-v1', 'quick-v2', 'side-effects-v1', 'standard-v1',
         'standard-v2', 'text-to-image-quick-v1', 'text-to-image-v1']
    """
    return sorted([*BATTERIES, *SEARCHES])


def list_adversaries() -> list[str]:
    """Returns the kinds of adversaries, as `build` takes them.

    Example:
        >>> list_adversaries()
        ['directional-ablation', 'dreambooth', 'few-shot-prompt', 'finetuning', 'probe', 'textual-inversion',
         'unlabelled']
    """
    return list(KINDS)


def battery(which: str | Sequence[Adversary]) -> tuple[Adversary, ...] | Search:
    """Returns a battery.

    Args:
        which: a name, or the adversaries themselves.

    Raises:
        HoldfastError: for an unknown name, or a list that is empty, has other elements than adversaries, or has two
            adversaries with the same name.

    Example:
        >>> len(battery("quick-v1")), len(battery(battery("quick-v1")[:3]))
        (8, 3)
    """
    if not isinstance(which, str):
        return _checked(CUSTOM, which)
    if which in SEARCHES:
        return SEARCHES[which]
    if which not in BATTERIES:
        raise unknown("battery", which, list_batteries())
    return BATTERIES[which]


def battery_name(which: str | Sequence[Adversary]) -> str:
    """Returns the name of a battery for results: "custom" for a list of adversaries."""
    return which if isinstance(which, str) else CUSTOM


def battery_config(adversaries: Sequence[Adversary] | Search) -> dict[str, Any]:
    """Returns the settings of a battery for results: those of the search, or of each adversary by name."""
    return adversaries.config() if isinstance(adversaries, Search) else {a.name: a.config() for a in adversaries}


def _checked(name: str, adversaries: Sequence[Adversary]) -> tuple[Adversary, ...]:
    if not isinstance(adversaries, Sequence):
        raise HoldfastError(
            f"The battery {name!r} is of type {type(adversaries).__name__}; expected the name of a battery "
            f"({', '.join(list_batteries())}) or a list of adversaries."
        )
    if not adversaries:
        raise HoldfastError(f"The battery {name!r} is empty; give at least one adversary.")
    names: set[str] = set()
    for i, adversary in enumerate(adversaries):
        if not isinstance(adversary, Adversary):
            raise HoldfastError(
                f"Entry {i} of the battery {name!r} is {adversary!r}; expected an adversary, such as "
                "FineTuning(Strategy('head'))."
            )
        if adversary.name in names:
            raise HoldfastError(
                f"Two adversaries of the battery {name!r} are called {adversary.name!r}; give one another `name`."
            )
        names.add(adversary.name)
    return tuple(adversaries)


def trained_with(adversary: Adversary, precision: Precision, micro_batch: int = 0) -> Adversary:
    """Returns an adversary that trains in another precision, or on parts of a batch, with the name that belongs to it.

    Args:
        adversary: one that has a strategy; others are returned as they are.
        precision: see `Strategy.precision`.
        micro_batch: see `Strategy.micro_batch`; 0: as the adversary has it.

    Example:
        >>> trained_with(battery("causal-quick-v1")[1], "bf16", 4).name
        'direct+all adamw 0.001 b16 bf16 in parts of 4'
    """
    strategy = getattr(adversary, "strategy", None)
    if not isinstance(strategy, Strategy) or not is_dataclass(adversary):
        return adversary
    wanted = replace(strategy, precision=precision, micro_batch=micro_batch or strategy.micro_batch)
    return adversary if wanted == strategy else replace(adversary, strategy=wanted, name="")


def listed(name: str) -> tuple[Adversary, ...]:
    """Returns the adversaries of a battery that is a list, not a search.

    Raises:
        HoldfastError: for an unknown name, or a search.

    Example:
        >>> len(listed("quick-v1"))
        8
    """
    adversaries = battery(name)
    if isinstance(adversaries, Search):
        raise HoldfastError(f"{name} is a search, and a list of adversaries is needed here: {', '.join(BATTERIES)}.")
    return adversaries


def build(config: dict[str, Any]) -> Adversary:
    """Builds an adversary from its `config()`, which results contain.

    Args:
        config: the settings; missing ones have their defaults.

    Raises:
        HoldfastError: for an unknown kind, setting or value.

    Example:
        >>> build({"kind": "finetuning", "initialisation": "head", "undo": ["revive"]}).name
        'initFC+all adam 0.001 b50, revive'
    """
    return KINDS.lookup(str(config.get("kind", ""))).from_config(config)
