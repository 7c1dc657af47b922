"""Models from the user's code: `package.module:function`, or `path/to/file.py:function`.

This runs the code, which you must trust as much as this program.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import wrappers
from holdfast.models.families import source_files
from holdfast.models.family import CODE, FAMILIES, Built, Family, Shape, Values, register
from holdfast.models.introspection import first_line
from holdfast.models.labels import names_of
from holdfast.models.spec import ModelSpec
from holdfast.models.split_model import SplitModel


@dataclass(frozen=True)
class Code:
    """A function that makes a network; a process that unpickles this object imports it.

    Attributes:
        source: a module's dotted name, or the absolute path of a file.
        function: its name there; dotted for an attribute of a class.
    """

    source: str
    function: str

    @classmethod
    def named(cls, name: str) -> Code:
        """Returns the code of a name without running it; a path becomes absolute.

        Raises:
            HoldfastError: if the file does not exist, or the name lacks a part.
        """
        source, _, function = name.rpartition(":")
        if not source or not function:
            raise HoldfastError(
                f"{name!r} does not name a function; write package.module:function or file.py:function."
            )
        if not _is_file(source):
            return cls(source, function)
        path = Path(source).expanduser().resolve()
        if not path.is_file():
            raise HoldfastError(f"{name!r}: the file {str(path)!r} does not exist.")
        return cls(str(path), function)

    @property
    def label(self) -> str:
        """The name without the file's folder, as reports show it."""
        return f"{Path(self.source).name if _is_file(self.source) else self.source}:{self.function}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that unpickles this needs the module, which defines the network's classes, before the network.
        return _imported, (self.source, self.function)

    @property
    def sha256(self) -> str:
        """Hash of the source file and the files that it imports beside it; without a file, of the module's name.

        See `holdfast.models.families.source_files`. Files that the code opens are not included.
        """
        path = getattr(self.module(), "__file__", None)
        if path:
            return source_files.sha256(Path(path), self.source)
        return hashlib.sha256(self.source.encode()).hexdigest()

    def module(self) -> ModuleType:
        """Imports the module, or runs the file (once a process).

        Raises:
            HoldfastError: if it does not exist, or raises.
        """
        try:
            with _undisturbed():
                module = _from_file(Path(self.source)) if _is_file(self.source) else _from_name(self.source)
        except HoldfastError:
            raise
        except SystemExit as error:
            raise HoldfastError(
                f"{self.label!r} ends the program when it is imported (sys.exit, or argparse); put a script's actions "
                'under `if __name__ == "__main__":`.'
            ) from error
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if _is_file(self.source) or not f"{self.source}.".startswith(f"{missing}."):
                raise self._failed("cannot be imported", error) from error
            near = difflib.get_close_matches(
                self.source.lower(), [f.removesuffix(":NAME") for f in FAMILIES if f.endswith(":NAME")], n=1, cutoff=0.5
            )
            raise HoldfastError(
                f"{self.label!r}: there is no module {missing!r} here; "
                + (f"did you mean {near[0]}:{self.function}? Otherwise " if near else "")
                + f"give a file as path/to/file.py:{self.function}."
            ) from error
        except ImportError as error:
            hint = ""
            if "relative import" in str(error):
                hint = " Name it by its package, package.module:function, in the folder that contains the package."
            raise HoldfastError(f"{self._failed('cannot be imported', error)}{hint}") from error
        except Exception as error:
            raise self._failed("cannot be imported", error) from error
        self._refuse_changed(module)
        return module

    def _refuse_changed(self, module: ModuleType) -> None:
        """Refuses code that was changed after this process imported it: Python would run the old code."""
        path = getattr(module, "__file__", None)
        if path is None or not Path(path).is_file() or source_files.is_installed(Path(path)):
            return
        now = source_files.sha256(Path(path), self.source)
        if _IMPORTED.setdefault(path, now) != now:
            raise HoldfastError(
                f"{self.label!r}, or a file that it imports beside it, was changed after this process imported it; "
                "start a new process, which runs the new code."
            )

    def build(self, input_shape: tuple[int, ...], num_outputs: int, options: dict[str, Any]) -> nn.Module | SplitModel:
        """Calls the function: with `input_shape` and `num_outputs` if it takes them, and with the options.

        Raises:
            HoldfastError: if the function does not exist, does not take the options, raises, or returns no module.
        """
        function = self._find()
        sizes = {"input_shape": input_shape, "num_outputs": num_outputs}
        parameters = _parameters(function)
        given = {**{k: v for k, v in sizes.items() if k in parameters}, **options}
        try:
            with _undisturbed():
                made = function(**given)
        except HoldfastError:
            raise
        except SystemExit as error:
            raise HoldfastError(f"{self.label!r} ended the program (sys.exit) when it was called.") from error
        except Exception as error:
            raise self._failed(f"raised when it was called with {given or 'no arguments'}", error) from error
        if not isinstance(made, nn.Module):
            kind = f"the class {made.__name__}" if isinstance(made, type) else type(made).__name__
            raise HoldfastError(f"{self.label!r} returned {kind}; expected a torch.nn.Module.{_hint(made, self.label)}")
        return made

    def _find(self) -> Callable[..., Any]:
        function: Any = self.module()
        for part in self.function.split("."):
            if not hasattr(function, part):
                names = [n for n, v in vars(function).items() if callable(v) and not n.startswith("_")]
                raise unknown(f"function in {self.label.rpartition(':')[0]!r}:", self.function, names)
            function = getattr(function, part)
        if not callable(function):
            raise HoldfastError(
                f"{self.label!r} is {type(function).__name__}; expected a function that returns a network."
            )
        return function  # type: ignore[no-any-return]

    def _failed(self, what: str, error: Exception) -> HoldfastError:
        return HoldfastError(f"{self.label!r} {what}: {type(error).__name__}: {first_line(error)}.")


def loaded_layers(first: nn.Module, again: nn.Module) -> list[str]:
    """Returns the layers whose weights are not fresh, from two networks built under different seeds.

    A function that builds a network may also load its weights. A layer counts if it has a parameter that is the same
    in both networks and not constant.

    Example:
        >>> loaded_layers(nn.Linear(2, 2), nn.Linear(2, 2))
        []
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> loaded_layers(layer, layer)
        ['0']
    """
    before = dict(first.named_parameters())
    same = [(n, p) for n, p in again.named_parameters() if n in before and torch.equal(p, before[n])]
    return list(dict.fromkeys(n.rpartition(".")[0] for n, p in same if (p != p.flatten()[:1]).any()))


def renew(network: nn.Module, layers: list[str], name: str) -> None:
    """Initialises layers anew: the scratch control must not have loaded weights.

    Raises:
        HoldfastError: naming the layer, if it cannot initialise itself.
    """
    for dotted in layers:
        layer = network.get_submodule(dotted)
        if not hasattr(layer, "reset_parameters"):
            raise HoldfastError(
                f"{name} returns the same weights in every call, and layer {dotted or '(root)'!r} "
                f"({type(layer).__name__}) has no reset_parameters: the scratch control needs fresh weights. Let the "
                "function return an untrained network, and give its weights as .safetensors (--weights)."
            )
        initialise: Callable[[], None] = layer.reset_parameters  # type: ignore[assignment]
        initialise()


def _hint(made: Any, label: str) -> str:
    """A hint about an object that was returned instead of a network."""
    if isinstance(made, type):
        return " Let it return an object of the class, not the class itself."
    if made is None:
        return " Is there a `return` at its end?"
    if isinstance(made, Mapping) and made and all(isinstance(v, Tensor) for v in made.values()):
        return (
            f" This is a state dict: return the network, and give these as .safetensors ({label} --weights FILE), or "
            "load them into it."
        )
    parts = made.values() if isinstance(made, Mapping) else made if isinstance(made, list | tuple) else ()
    if any(isinstance(part, nn.Module) for part in parts):
        return " Return only the network in it."
    if isinstance(getattr(made, "model", None), nn.Module):
        return " Return its `model`."
    return ""


def _is_file(source: str) -> bool:
    return source.endswith(".py")


_IMPORTED: dict[str, str] = {}
"""Hash of the code by its file, at its first import in this process."""


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores torch's global settings, which the user's code may change, so that later code is not affected."""
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
        if torch.get_default_device() != before[2]:
            torch.set_default_device(before[2])


def _imported(source: str, function: str) -> Code:
    code = Code(source, function)
    code.module()
    return code


_FOLDERS: set[Path] = set()
"""Folders of the files that were run."""


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Puts a folder first on Python's path, and afterwards last."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _from_name(name: str) -> ModuleType:
    with _first_on_path(Path.cwd()):
        return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    """Runs a file as a module whose name depends only on its path, so that pickled classes are found."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _refuse_twins(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look up their module
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _FOLDERS.add(path.parent)
    return module


def _refuse_twins(path: Path) -> None:
    """Refuses a file next to a module whose name another file's neighbour already has.

    Python keeps one module a name: this file would silently import the other's.
    """
    for twin in sorted(path.parent.iterdir()):
        taken = Path(getattr(sys.modules.get(twin.stem), "__file__", None) or "")
        home = taken.parent.parent if taken.name == "__init__.py" else taken.parent
        if home in _FOLDERS and home != path.parent:
            raise HoldfastError(
                f"{str(path)!r} is beside {twin.name!r}, and another file that was run is beside {str(taken)!r}: "
                "Python keeps one module a name, and would mix them up. Rename one of the two."
            )


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a function in C has no signature
        return []


@register(CODE)
class CodeFamily(Family):
    """Networks that a function of the user's code returns."""

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`; this runs the code."""
        code = Code.named(spec.name)
        made = code.build(input_shape, num_outputs, spec.options)
        norm: tuple[Values | None, Values | None] | None
        head: str | None = None
        if isinstance(made, SplitModel):
            split = made.unwrapped()
            network, head, notes = split.network, split.head_name, split.notes
            mean, std = (None if v is None else tuple(v.flatten().tolist()) for v in (split.mean, split.std))
            norm = (mean, std)
        else:
            plain = wrappers.unwrapped(made, code.label, spec.head)
            network, notes = plain.network, plain.notes
            norm = _own_normalisation(network) if len(input_shape) == 3 else None
        return Built(
            network,
            spec.model_copy(update={"name": code.label}),
            head,
            norm or (None, None),
            foreign=True,
            code=code.sha256,
            factory=_CodeFactory(code, input_shape, num_outputs, spec.options),
            notes=notes,
        )

    def output_names(self, spec: ModelSpec, built: Built, network: nn.Module) -> tuple[str, ...] | None:
        """See `Family.output_names`."""
        return names_of(network)


@dataclass(frozen=True)
class _CodeFactory:
    """Calls the user's function again, and initialises the layers whose weights it loads."""

    code: Code
    input_shape: tuple[int, ...]
    num_outputs: int
    options: dict[str, Any]

    def __call__(self) -> nn.Module:
        state = torch.get_rng_state()
        twice = [self._network() for _ in "ab"]
        if any(renewed := loaded_layers(*twice)):
            torch.set_rng_state(state)  # the function may have set its own seed instead of ours
            renew(twice[1], renewed, self.code.label)
        return twice[1]

    def _network(self) -> nn.Module:
        made = self.code.build(self.input_shape, self.num_outputs, self.options)
        return wrappers.unwrapped(made.network if isinstance(made, SplitModel) else made, self.code.label).network


def _own_normalisation(network: nn.Module) -> tuple[Values, Values] | None:
    """Mean and std in a network's configuration, in timm's format; None if they are missing or unusable."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(network, attribute, None)
        values = [config.get(key) if isinstance(config, Mapping) else None for key in ("mean", "std")]
        if all(isinstance(v, list | tuple) and v for v in values):
            mean, std = (tuple(map(float, v)) for v in values if v is not None)
            return mean, std
    return None
