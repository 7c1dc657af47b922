"""Reading YAML and JSON strictly: YAML 1.2 scalars, no key twice, nothing executed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import yaml

from holdfast.errors import HoldfastError

MAX_NODES = 100_000
"""Most values in a document after its aliases are expanded; a few lines of aliases can expand to billions."""


def recipe_names() -> list[str]:
    """Returns the names of the recipes in the package, such as `quickstart` and `language/audit`."""
    root = resources.files("holdfast") / "recipes"
    folders = {"": root} | {f"{entry.name}/": entry for entry in root.iterdir() if entry.is_dir()}
    files = [f"{prefix}{entry.name}" for prefix, folder in folders.items() for entry in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Returns the YAML of a recipe in the package."""
    return (resources.files("holdfast") / "recipes" / f"{name}.yaml").read_text()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema, and an error for repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute

    def get_single_node(self) -> yaml.Node | None:
        """Composes the document and checks it before `<<` merges the keys of several mappings."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._check(node, {})
        return node

    def _check(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Returns the number of values in a node; refuses repeated keys and recursive aliases."""
        size = sizes.get(id(node))
        if size == 0:
            raise HoldfastError(
                f"the anchor in line {node.start_mark.line + 1} contains an alias of itself; write the value out"
            )
        if size is not None:
            return size
        sizes[id(node)], size, seen = 0, 1, dict[Any, int]()
        for each in node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []:
            key, *parts = each if isinstance(each, tuple) else (None, each)
            if isinstance(key, yaml.ScalarNode):
                value = "<<" if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key)
                line = key.start_mark.line + 1
                if value in seen:
                    raise HoldfastError(
                        f"the key {key.value!r} is given twice, in line {seen[value]} and in line {line}; keep one"
                    )
                seen[value] = line
            size += sum(self._check(part, sizes) for part in parts)
        if size > MAX_NODES:
            raise HoldfastError(f"with its aliases written out it has more than {MAX_NODES} values")
        sizes[id(node)] = size
        return size

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Returns an integer: `010` is ten, `0o10` eight, `0x10` sixteen."""
        text = str(self.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """Returns a floating-point number; `.inf` and `.nan` are written with the dot."""
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def read_yaml(text: str, what: str) -> Any:
    """Parses YAML 1.2; nothing in it can be executed.

    Args:
        text: one document.
        what: beginning of an error message.

    Raises:
        HoldfastError: if it is not valid, repeats a key, contains a number that is not finite, or contains itself.

    Example:
        >>> read_yaml("{seed: 010, rate: 1e-3, name: no, ratio: 1:30}", "It")
        {'seed': 10, 'rate': 0.001, 'name': 'no', 'ratio': '1:30'}
        >>> read_yaml("{seeds: 20, seeds: 3}", "Recipe 'my.yaml'")
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: Recipe 'my.yaml' is not valid YAML: the key 'seeds' is given twice, in line 1
        and in line 1; keep one.
    """
    try:
        content = yaml.load(text.removeprefix("\ufeff"), _Loader)
        _refuse_not_finite(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # HoldfastError is a ValueError
        reason = str(error) or type(error).__name__
        raise HoldfastError(f"{what} is not valid YAML: {reason.rstrip('.')}.") from error
    return content


def read_json(text: str | bytes) -> Any:
    """Parses JSON, and refuses repeated keys and NaN, which Python's parser accepts.

    Args:
        text: one document.

    Raises:
        ValueError: if it is not valid.

    Example:
        >>> read_json('{"seed": 1}')
        {'seed': 1}
        >>> read_json('{"seed": 1, "seed": 2}')
        Traceback (most recent call last):
            ...
        ValueError: the key 'seed' is given twice
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} is given twice")
        mapping[key] = value
    return mapping


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _refuse_not_finite(value: Any, key: str = "") -> None:
    """Refuses infinity and NaN, which as a limit or a rate would silently disable something."""
    if isinstance(value, float) and not math.isfinite(value):
        raise HoldfastError(f"{key or 'it'} is {value}; expected a finite number")
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for inner, each in inside:
        _refuse_not_finite(each, f"{key}.{inner}".strip("."))
