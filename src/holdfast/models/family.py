"""Families of models: each reads one kind of names, such as `timm:NAME`, and registers in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.runtime.registry import Registry
from holdfast.tasks import Task, Vocabulary

if TYPE_CHECKING:
    from holdfast.models.spec import ModelSpec
    from holdfast.models.split_model import SplitModel

Values = tuple[float, ...]

CODE: Final = "file.py:FUNCTION"
"""The name under which networks from the user's code are registered."""


@dataclass(frozen=True)
class Built:
    """A network, and what is known of it.

    Attributes:
        network: with its own weights, if its name stands for some.
        rebuild: the spec that builds the same architecture with fresh weights, without fetching or reading any.
        head: dotted name of the head; None: it is still to be found.
        norm: mean and std of the input normalisation, or twice None.
        foreign: whether nothing is known about its code.
        scheduler: the configuration of its scheduler, if it is a denoiser.
        loaded: whether the weights of the spec are in it.
        code: SHA-256 of the user's code that made it.
        factory: builds it anew, where the family's `build` with `rebuild` would not.
        notes: see `SplitModel`.
        vocabulary: see `SplitModel`.
        tokenizer: see `SplitModel`.
        fresh_head: see `SplitModel`.
    """

    network: nn.Module
    rebuild: ModelSpec
    head: str | None = None
    norm: tuple[Values | None, Values | None] = (None, None)
    foreign: bool = False
    scheduler: Mapping[str, Any] | None = None
    loaded: bool = False
    code: str | None = None
    factory: Callable[[], nn.Module] | None = None
    notes: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    tokenizer: str | None = None
    fresh_head: bool = False


class Family:
    """How the models of one library, or one built-in architecture, are built, read and written.

    A family derives from this class and is registered under the name of one architecture, or under `PREFIX:NAME`, which
    stands for all names with that prefix. Only `build` is required.
    """

    def __repr__(self) -> str:
        return type(self).__qualname__

    def for_task(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """Returns a spec with what the family needs to know of the task.

        Raises:
            HoldfastError: if an option of the spec would have no effect.
        """
        return spec

    def build(
        self, spec: ModelSpec, input_shape: tuple[int, ...], num_outputs: int, data_dir: Path | str | None
    ) -> Built:
        """Builds the network that a spec names.

        Args:
            spec: its options are those that a recipe or a saved file gave, and may be wrong.
            input_shape: of one input.
            num_outputs: number of logits.
            data_dir: also searched for folders and files.

        Raises:
            HoldfastError: if there is no such model, or an option is unknown or unusable.
        """
        raise NotImplementedError

    def released_options(self, name: str, task: Task, *, own_head: bool) -> dict[str, Any]:
        """Returns the options that make a name stand for a model with its own weights.

        Raises:
            HoldfastError: if the model has none, or they lack a head for the task that `own_head` requires.
        """
        return {}

    def output_names(self, spec: ModelSpec, built: Built, network: nn.Module) -> tuple[str, ...] | None:
        """Returns the names of a network's outputs in its own files; None if they say none for this head."""
        return None

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """Returns the spec of a folder that this family's `save_pretrained` or its library wrote; None: of another."""
        return None

    def save_pretrained(self, model: SplitModel, folder: Path) -> None:
        """Writes a folder that the family's own library reads.

        Args:
            model: without an extractor.
            folder: exists, and is writable.

        Raises:
            HoldfastError: if no library reads such a model.
        """
        raise HoldfastError(
            f"{model.name} is not a model of transformers, timm or diffusers, so no library has a from_pretrained for "
            "it; write it with save(FILE), and read it with SplitModel.from_pretrained(FILE, task) or load_model."
        )


FAMILIES: Registry[Family] = Registry("model", "holdfast.models")
"""All families by name; other packages add to them by an entry point of the group `holdfast.models`."""

F = TypeVar("F", bound=Family)


def register(name: str) -> Callable[[type[F]], type[F]]:
    """Returns a decorator that registers a family.

    Args:
        name: of one architecture, or `PREFIX:NAME` for all names with a prefix.
    """

    def added(family: type[F]) -> type[F]:
        FAMILIES.register(name)(family())
        return family

    return added


def list_models() -> list[str]:
    """Returns the names of all models, sorted; NAME and FUNCTION stand for any name of that library or file.

    Example:
        >>> [name for name in list_models() if ":" in name]
        ['diffusers:NAME', 'file.py:FUNCTION', 'hf:NAME', 'timm:NAME']
    """
    return list(FAMILIES)


def is_code(name: str) -> bool:
    """Whether a model's name says where a function is, and is not a name of timm, Hugging Face or another library.

    Example:
        >>> is_code("nets.py:small"), is_code("mine.nets:small"), is_code("timm:resnet18"), is_code("cnn")
        (True, True, False, False)
    """
    return ":" in name and f"{name.partition(':')[0]}:NAME" not in FAMILIES


def family_of(name: str) -> Family:
    """Returns the family that a model's name belongs to.

    Raises:
        HoldfastError: for a name without ":" that is not registered.
    """
    if is_code(name):
        return FAMILIES[CODE]
    key = f"{name.partition(':')[0]}:NAME" if ":" in name else name
    if key not in FAMILIES:
        raise unknown("model", name, FAMILIES)
    return FAMILIES[key]


def folder_spec(folder: Path) -> ModelSpec | None:
    """Returns the spec of a model that a library wrote into a folder; None if no family knows the folder."""
    found = (family.name_of_folder(folder) for family in FAMILIES.values())
    return next((spec for spec in found if spec is not None), None)


def for_channels(norm: tuple[Values, Values], input_shape: tuple[int, ...]) -> tuple[Values, Values]:
    """Returns a normalisation for images of a task; if they have other channels, the mean over the known ones."""
    mean, std = norm
    if len(mean) in (1, input_shape[0]):
        return mean, std
    return (sum(mean) / len(mean),), (sum(std) / len(std),)
