"""Registries: open sets whose members register where they are defined, here and in other packages."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from holdfast.errors import HoldfastError, unknown

Member = TypeVar("Member")


class Registry(Mapping[str, Member]):
    """The members of an open set, by name.

    A member of Holdfast's own is one file of `package`: every module of the folder is imported on first use. Another
    package declares an entry point of the group `package`, whose value is a module that registers its members:

        [project.entry-points."holdfast.defenses"]
        noise = "my_package.noise"

    Args:
        what: one member, for messages: "defense".
        package: the folder with the members, as `holdfast.defenses`.
        group: of entry points; None: `package`.

    Example:
        >>> shapes: Registry[type] = Registry("shape", "holdfast.shapes")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> shapes._loaded = True  # the folder does not exist
        >>> shapes["square"] is Square, list(shapes)
        (True, ['square'])
    """

    def __init__(self, what: str, package: str, *, group: str | None = None) -> None:
        self.what, self.package, self.group = what, package, group or package
        self._members: dict[str, Member] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Member], Member]:
        """Returns a decorator that registers a member.

        Raises:
            HoldfastError: if another member has this name.
        """

        def added(member: Member) -> Member:
            known = self._members.get(name)
            # A module that is imported again, as a doctest or under `__main__`, registers its member once more.
            if known is not None and _place(known) != _place(member):
                raise HoldfastError(
                    f"Two members of {self.package} are called {name!r}: {_place(known)} and {_place(member)}; "
                    "rename one."
                )
            self._members[name] = member
            return member

        return added

    def lookup(self, name: str) -> Member:
        """Returns a member by name.

        Raises:
            HoldfastError: for a name that is not registered; the message suggests the nearest names.
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
        """Imports all modules that register members."""
        if self._loaded:
            return
        self._loaded = True  # set before the imports, which may look up members themselves
        try:
            self._import_members()
        except BaseException:
            self._loaded = False  # the next use tries again instead of using a part of the members
            raise

    def _import_members(self) -> None:
        folder = import_module(self.package)
        for module in pkgutil.walk_packages(folder.__path__, f"{self.package}."):
            import_module(module.name)
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:  # the code of another package may raise anything
                package = point.dist.name if point.dist is not None else point.value
                raise HoldfastError(
                    f"The package {package!r} offers a {self.what} ({point.name} = {point.value}) that cannot be "
                    f"imported: {type(error).__name__}: {error}. Repair or uninstall it."
                ) from error


def _place(member: object) -> str:
    return f"{getattr(member, '__module__', '')}.{getattr(member, '__qualname__', repr(member))}"
