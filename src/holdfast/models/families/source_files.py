"""The source files of the user's code: the named one, and those that it imports from the folders around it."""

from __future__ import annotations

import ast
import hashlib
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_INSTALLED = ("torch", "torchvision", "timm", "transformers", "diffusers", "holdfast")
"""Packages whose versions are in every result; their sources are not read."""

_PATH = tuple(sys.path)
"""Python's path at the start of the process: later entries are for another file's imports."""

_COMPILED = (".so", ".pyd")


def sha256(path: Path, name: str) -> str:
    """Returns a hash over a source file and the files beside it that it imports, directly or not.

    Files beside it are those in its own folder, or in that of its package, and in other folders on Python's path
    without Python's own modules or installed packages; for an installed package, its own modules. Imports, also those
    inside functions, are read from the sources, without running them.

    Args:
        path: of the file.
        name: of the module; a path for a file that is run by itself.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "nets.py").write_text("from sizes import WIDTH")
        >>> hashes = set()
        >>> for width in "344":
        ...     _ = (folder / "sizes.py").write_text(f"WIDTH = {width}")
        ...     hashes.add(sha256(folder / "nets.py", str(folder / "nets.py")))
        >>> len(hashes)
        2
    """
    digest = hashlib.sha256()
    for label, file in sorted(files(path, name).items()):
        digest.update(f"{label}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def files(path: Path, name: str) -> dict[str, Path]:
    """Returns the source files by their path relative to the folder that they are imported from; see `sha256`."""
    path = path.resolve()
    module = "" if name.endswith(".py") else name
    home = path.parent
    levels = len(module.split(".")) - (0 if path.name == "__init__.py" else 1) if module else 0
    for _ in range(levels):
        home = home.parent
    top = module.partition(".")[0]
    if top in _INSTALLED:
        return {path.name: path}
    own_only = is_installed(home)
    roots = [home] if own_only else [home, *(r for r in _other_roots() if r != home)]
    found: dict[str, Path] = {}
    waiting = [(module, path, home)]
    if module:  # importing a.b.c runs a and a.b
        waiting += [(".".join(module.split(".")[:i]), p, home) for i in range(1, module.count(".") + 1)
                    if (p := _file_of(home, module.split(".")[:i])) is not None]  # fmt: skip
    while waiting:
        current, file, root = waiting.pop()
        label = file.relative_to(root).as_posix()
        if label in found:
            continue
        found[label] = file
        if file.suffix in _COMPILED:
            continue
        for imported in _imports(file, current):
            if own_only and imported[0] != top:
                continue
            waiting += _located(imported, roots)
    return found


def _located(parts: tuple[str, ...], roots: list[Path]) -> Iterator[tuple[str, Path, Path]]:
    """The files of a dotted name and of the packages around it, in the first root that has one of them."""
    if parts[0] in _INSTALLED:
        return
    for root in roots:
        named = [(parts[:length], _file_of(root, parts[:length])) for length in range(1, len(parts) + 1)]
        if any(file is not None for _, file in named):  # a package need not have an __init__.py
            yield from ((".".join(name), file, root) for name, file in named if file is not None)
            return


def _file_of(root: Path, parts: tuple[str, ...] | list[str]) -> Path | None:
    place = root.joinpath(*parts)
    for candidate in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if candidate.is_file():
            return candidate
    if place.parent.is_dir():
        return next((p for s in _COMPILED for p in sorted(place.parent.glob(f"{place.name}.*{s}"))), None)
    return None


def _imports(file: Path, module: str) -> Iterator[tuple[str, ...]]:
    """The dotted names that a source imports; for `from a import b` both `a` and `a.b`, as b may be a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # importing it raises the error
        return
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            if base and all(base):
                yield tuple(base)
            for alias in node.names:
                if base and all(base) and alias.name != "*":
                    yield (*base, alias.name)
        elif isinstance(node, ast.Call) and _calls_import(node):
            named = node.args[0]
            if isinstance(named, ast.Constant) and isinstance(named.value, str) and named.value.strip("."):
                yield tuple(named.value.strip(".").split("."))


def _calls_import(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args)


def is_installed(folder: Path) -> bool:
    """Whether a folder belongs to Python itself, or to installed packages."""
    return any(folder.is_relative_to(place) for place in _installed_places())


@lru_cache(maxsize=1)
def _installed_places() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    named = [paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple({Path(p).resolve() for p in [*named, *site.getsitepackages(), site.getusersitepackages()]})


def _other_roots() -> list[Path]:
    places = [Path(p or ".").resolve() for p in _PATH if p == "" or Path(p).is_dir()]
    return [p for p in dict.fromkeys(places) if not is_installed(p)]
