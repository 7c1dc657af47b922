"""The registered defenses, and building one from its name and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from holdfast.defenses.base import Defense
from holdfast.errors import unknown
from holdfast.runtime.argument_checks import plain, readable, refuse_truth_as_number
from holdfast.runtime.registry import Registry

Kind = TypeVar("Kind", bound=type[Defense])

DEFENSES: Final[Registry[type[Defense]]] = Registry("defense", "holdfast.defenses")
"""All defenses by name, including those of other packages."""


def register_defense(kind: Kind) -> Kind:
    """Registers a defense under its class attribute `name`; use it as a decorator, above `@dataclass`.

    Raises:
        HoldfastError: if another defense has this name.
    """
    return DEFENSES.register(kind.name)(kind)  # type: ignore[return-value]


def list_defenses() -> list[str]:
    """Returns the names of all defenses, sorted.

    Example:
        >>> list_defenses()[:4]
        ['concept-erasure', 'condition', 'deep-condition', 'deep-imma']
    """
    return list(DEFENSES)


def build_defense(settings: Mapping[str, Any]) -> Defense:
    """Builds a defense from its name and hyper-parameters.

    Raises:
        HoldfastError: for an unknown name or key (with a suggestion), or a value of the wrong type.

    Example:
        >>> build_defense({"name": "sophon", "steps": 5}).config()["steps"]
        5
    """
    options: dict[str, Any] = {str(key): plain(value) for key, value in settings.items()}
    name = str(options.pop("name", None))
    kind = DEFENSES.lookup(name)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise unknown(f"setting of defense {name!r}:", key, known)
    try:
        defense = TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        raise readable(error, f"defense {name!r}", None) from error
    refuse_truth_as_number(options, defense, f"defense {name!r}")
    return defense
