"""Families of models: each builds the models of one kind of name, such as `timm:NAME`, and has its own file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.runtime.registry import Registry
from holdfast.tasks import Task, Vocabulary
from holdfast.tasks.pipeline_folder import INDEX, is_pipeline, pipeline_index

if TYPE_CHECKING:
    from holdfast.models.spec import ModelSpec
    from holdfast.models.split_model import SplitModel
    from holdfast.models.text_encoders import TextEncoder

Shape = tuple[int, ...]
Values = tuple[float, ...]

CODE: Final = "file.py:FUNCTION"
"""The name under which networks from the user's code are registered."""


@dataclass(frozen=True)
class PipelineSource:
    """The folder of a diffusers pipeline that a network comes from.

    Attributes:
        folder: the folder.
        component: the part of it that is the network, `unet` or `transformer`.
        scale: pixels a side that one place of the network's input stands for.
    """

    folder: str
    component: str
    scale: int

    def found(self, name: str) -> Path:
        """Returns the folder.

        Args:
            name: of the model, for messages.

        Raises:
            HoldfastError: if it is gone.
        """
        folder = Path(self.folder)
        if not is_pipeline(self.folder):
            raise HoldfastError(
                f"{name} needs the other parts of its pipeline, and {self.folder!r} is gone. If the folder was moved, "
                "name it as the model, diffusers:FOLDER, and the file as its weights."
            )
        return folder

    def copy_to(self, folder: Path, name: str) -> None:
        """Copies the index and all parts that it names, except for the network, which must be written beside them.

        Args:
            folder: an existing folder.
            name: of the model, for messages.

        Raises:
            HoldfastError: if the source is gone, or is this folder.
        """
        source = self.found(name)
        if source.resolve() == folder.resolve():
            raise HoldfastError(f"{str(folder)!r} is the folder that {name} was loaded from; choose another one.")
        for part in pipeline_index(source):
            if part != self.component and (source / part).is_dir():
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
        shutil.copyfile(source / INDEX, folder / INDEX)


@dataclass(frozen=True)
class Built:
    """A network with its settings.

    Attributes:
        network: with its own weights, if its name stands for trained ones.
        rebuild: the spec that builds the same architecture with fresh weights, without fetching or reading any.
        head: dotted name of the head; None: `SplitModel.of` finds it.
        norm: mean and std of the input normalisation, or twice None.
        foreign: whether its structure is unknown, so that a forward pass has to show it.
        scheduler: the configuration of its scheduler, if it is a denoiser.
        text: the frozen text encoder, if it is a text-to-image model.
        source: of its other parts, if it comes from a text-to-image pipeline.
        kind: the class of model that it becomes, if it is not a `SplitModel` and not a denoiser.
        loaded: whether it already has the weights of the spec.
        code: SHA-256 of the user's code that made it.
        factory: builds it anew, if the family's `build` with `rebuild` cannot.
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
    text: TextEncoder | None = None
    source: PipelineSource | None = None
    kind: type[SplitModel] | None = None
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
        """Returns a spec with the facts about the task that the family needs.

        Raises:
            HoldfastError: if an option of the spec would have no effect.
        """
        return spec

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """Builds the network that a spec names.

        Args:
            spec: its options come from a recipe or a saved file, and may be wrong.
            input_shape: of one input.
            num_outputs: number of logits.
            data_dir: also searched for folders and files.

        Raises:
            HoldfastError: if the model does not exist, or an option is unknown or unusable.
        """
        raise NotImplementedError

    def released_options(self, name: str, task: Task, *, own_head: bool) -> dict[str, Any]:
        """Returns the options with which a name means a model with its own weights.

        Raises:
            HoldfastError: if the model has no weights, or they lack a head for the task that `own_head` requires.
        """
        return {}

    def output_names(self, spec: ModelSpec, built: Built, network: nn.Module) -> tuple[str, ...] | None:
        """Returns the names of a network's outputs from its own files; None if these have none for this head."""
        return None

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """Returns the spec of a folder that this family's `save_pretrained` or its library wrote; else None."""
        return None

    def save_pretrained(self, model: SplitModel, folder: Path) -> None:
        """Writes a folder that the family's own library reads.

        Args:
            model: without an extractor.
            folder: an existing folder.

        Raises:
            HoldfastError: if no library reads such a model.
        """
        raise HoldfastError(
            f"{model.name} is not a model of transformers, timm or diffusers, so no library can read it; write it with "
            "save(FILE), and read it with SplitModel.from_pretrained(FILE, task) or load_model."
        )


FAMILIES: Registry[Family] = Registry("model", "holdfast.models")
"""All families by name; other packages add theirs with an entry point of the group `holdfast.models`."""

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
    """Whether a model's name is that of a function, and not one of timm, Hugging Face or another library.

    Example:
        >>> is_code("nets.py:small"), is_code("package.nets:small"), is_code("timm:resnet18"), is_code("cnn")
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
    """Returns the spec of a model that a library wrote into a folder; None if no family reads the folder."""
    specs = (family.name_of_folder(folder) for family in FAMILIES.values())
    return next((spec for spec in specs if spec is not None), None)


def check_known(spec: ModelSpec, known: Collection[str]) -> None:
    """Refuses options of a spec that its family does not take.

    Raises:
        HoldfastError: naming the first.
    """
    for option in spec.options:
        if option not in known:
            raise unknown(f"option of model {spec.name!r}:", option, known)


def config_in(folder: Path) -> dict[str, Any]:
    """Returns a folder's `config.json`; empty if it is missing, or is not a JSON object."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def for_channels(norm: tuple[Values, Values], input_shape: tuple[int, ...]) -> tuple[Values, Values]:
    """Returns a normalisation for a task's images; for another number of channels, its mean over the channels."""
    mean, std = norm
    if len(mean) in (1, input_shape[0]):
        return mean, std
    return (sum(mean) / len(mean),), (sum(std) / len(std),)
