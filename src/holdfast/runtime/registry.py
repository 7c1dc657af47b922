"""Registries: extensible sets whose members register themselves, in Holdfast and in other packages."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from holdfast.errors import HoldfastError, unknown

Member = TypeVar("Member")


class Registry(Mapping[str, Member]):
    """The members of an extensible set, by name.

    Each built-in member is a module in the folder `package`, whose modules are all imported on first use. Other packages
    declare an entry point in the group `package` that names a module which registers members:

        [project.entry-points."holdfast.defenses"]
        noise = "my_package.noise"

    Args:
        what: noun for one member in messages, such as "defense".
        package: package with the members, such as `holdfast.defenses`; also the group of entry points.

    Example:
        >>> shapes: Registry[type] = Registry("shape", "holdfast.shapes")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> shapes._loaded = True  # the package does not exist
        >>> shapes["square"] is Square, list(shapes)
        (True, ['square'])
    """

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._members: dict[str, Member] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Member], Member]:
        """Returns a decorator that registers a member.

        Raises:
            HoldfastError: if another member has the same name.
        """

        def added(member: Member) -> Member:
            known = self._members.get(name)
            # A module imported twice, as a doctest or as `__main__`, registers its member again.
            if known is not None and _place(known) != _place(member):
                raise HoldfastError(
                    f"{_place(known)} and {_place(member)} are both registered as the {self.what} {name!r}; rename one."
                )
            self._members[name] = member
            return member

        return added

    def lookup(self, name: str) -> Member:
        """Returns a member by name.

        Raises:
            HoldfastError: if the name is not registered; the message suggests the nearest name.
        """
        self._load()
        if name not in self._members:
            raise unknown(self.what, name, self)
        return self._members[name]

    def __getitem__(self, name: str) -> Member:
        self._load()
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._members))

    def __len__(self) -> int:
        self._load()
        return len(self._members)

    def _load(self) -> None:
        """Imports every module that may register members."""
        if self._loaded:
            return
        self._loaded = True  # before the imports, which may look up members themselves
        folder = import_module(self.package)
        for module in pkgutil.walk_packages(folder.__path__, f"{self.package}."):
            import_module(module.name)
        for point in entry_points(group=self.package):
            try:
                point.load()
            except Exception as error:  # other packages may raise anything
                self._loaded = False
                package = point.dist.name if point.dist is not None else point.value
                raise HoldfastError(
                    f"The package {package!r} offers a {self.what} ({point.name} = {point.value}) that cannot be "
                    f"imported: {type(error).__name__}: {error}. Mend or uninstall it."
                ) from error


def _place(member: object) -> str:
    return f"{getattr(member, '__module__', '')}.{getattr(member, '__qualname__', repr(member))}"
