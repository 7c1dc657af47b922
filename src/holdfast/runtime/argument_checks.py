"""Checks settings written by users and explains errors."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from holdfast.errors import HoldfastError, unknown

Number = TypeVar("Number", int, float)


def plain(value: Any) -> Any:
    """Converts settings to JSON types: NumPy numbers, paths, ranges and tuples become plain values.

    Example:
        >>> plain({"seeds": np.int64(3), "budgets": range(0, 20, 10)})
        {'seeds': 3, 'budgets': [0, 10]}
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(each) for each in value]
    return value


def refuse_truth_as_number(raw: Any, made: Any, what: str, key: str = "") -> None:
    """Refuses `true` where a number is expected, which Python and pydantic would take for 1.

    Args:
        raw: settings as given.
        made: the validated settings.
        what: owner of the settings; begins the message.
        key: dotted key of `raw`.

    Raises:
        HoldfastError: naming the key.
    """
    if isinstance(raw, bool):
        if isinstance(made, int | float) and not isinstance(made, bool):
            raise HoldfastError(f"{what}: {key} is {str(raw).lower()}; expected a number.")
    elif isinstance(raw, Mapping):
        for name, value in raw.items():
            inner = made.get(name) if isinstance(made, Mapping) else getattr(made, str(name), None)
            refuse_truth_as_number(value, inner, what, f"{key}.{name}".strip("."))
    elif isinstance(raw, list | tuple) and isinstance(made, list | tuple):
        for i, (value, inner) in enumerate(zip(raw, made, strict=False)):
            refuse_truth_as_number(value, inner, what, f"{key}.{i}".strip("."))


def readable(error: ValidationError, what: str, schema: type[BaseModel] | None) -> HoldfastError:
    """Turns pydantic's errors into one message that names each key, its error, and the nearest known key.

    Args:
        error: raised by a model or dataclass.
        what: owner of the settings; begins the message.
        schema: model whose keys are suggested for unknown ones.
    """
    parts = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden" and schema is not None:
            parts.append(str(unknown("key", key, _keys_near(schema, item["loc"]))))
        elif item["type"] == "missing":
            parts.append(f"{key} is missing.")
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ").rstrip(".")
            parts.append(f"{key}: {message}." if key else f"{message}.")
        else:
            parts.append(f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}.")
    return HoldfastError(f"{what}: {' '.join(parts)}")


def _keys_near(schema: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Candidates for an unknown key: its siblings if one is similar, else all keys."""
    kind: Any = schema
    for part in place[:-1]:
        fields = getattr(kind, "model_fields", {})
        if part in fields:
            kind = _inside(fields[part].annotation)
    prefix = "".join(f"{part}." for part in place[:-1])
    beside = [prefix + name for name in getattr(kind, "model_fields", {})]
    own = str(place[-1])
    if difflib.get_close_matches(own, [name.removeprefix(prefix) for name in beside], n=1, cutoff=0.5):
        return beside
    return sorted({*_keys(schema), *beside})


def _inside(annotation: Any) -> Any:
    """Returns the schema in an annotation such as `dict[str, Schema]` or `Schema | None`; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = map(_inside, getattr(annotation, "__args__", ()))
    return next((each for each in inner if each is not None), None)


def _keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in schema.model_fields.items():
        keys.append(prefix + name)
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _keys(kind, f"{prefix}{name}.")
    return keys


def split_numbers(text: str, what: str, kind: type[Number]) -> tuple[Number, ...]:
    """Returns the numbers in a text such as `0,10,20`, with or without brackets.

    Args:
        text: numbers with commas between them.
        what: name of the setting; begins the message.
        kind: `int` or `float`.

    Raises:
        HoldfastError: if a part of the text is not a number of this kind.
    """
    try:
        return tuple(kind(part) for part in text.strip("[]() ").split(","))
    except ValueError as error:
        example = (
            "whole numbers with commas, such as 0,10,20" if kind is int else "numbers with commas, such as 0.5,0.4"
        )
        raise HoldfastError(f"{what} {text!r}: expected {example}.") from error


def whole_number(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """Returns a whole number as Python's own type.

    Args:
        name: name of the setting, for the message.
        value: NumPy's integers and floats such as 5.0 are whole numbers; True is not.
        least: smallest allowed value.
        most: largest allowed value; None: no limit.

    Raises:
        HoldfastError: if it is not a whole number, or out of range.

    Example:
        >>> whole_number("seeds", 5.0)
        5
        >>> whole_number("threads", 0, 1, 8)
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: threads is 0; expected a whole number from 1 to 8.
    """
    whole = isinstance(value, float) and value.is_integer()
    if not isinstance(value, bool) and (whole or hasattr(type(value), "__index__")):
        number = int(value) if whole else operator.index(value)
        if least <= number and (most is None or number <= most):
            return number
    upper = f" to {most}" if most is not None else " on"
    raise HoldfastError(f"{name} is {value!r}; expected a whole number from {least}{upper}.")
