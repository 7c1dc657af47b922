"""Every defense by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from holdfast.defenses import DEFENSES, Defense
from holdfast.errors import unknown
from holdfast.runtime.validation import plain, readable, refuse_truth_as_number


def build_defense(settings: Mapping[str, Any]) -> Defense:
    """Builds a defense from its name and hyper-parameters.

    Raises:
        HoldfastError: for an unknown name or key (with a suggestion), or a value of the wrong type.

    Example:
        >>> build_defense({"name": "sophon", "steps": 5}).config()["steps"]
        5
    """
    options: dict[str, Any] = {str(key): plain(value) for key, value in settings.items()}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in DEFENSES:
        raise unknown("defense", str(name), DEFENSES)
    kind = DEFENSES[name]
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise unknown(f"setting of defense {name!r}:", key, known)
    try:
        made = TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        raise readable(error, f"defense {name!r}", None) from error
    refuse_truth_as_number(options, made, f"defense {name!r}")
    return made
