"""The model that defenses, adversaries and audits work on: a split network that can be renewed, saved and loaded."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.extractor import ExtractorNetwork
from holdfast.models.family import Family, family_of
from holdfast.models.introspection import Appended, AppendedFactory, every_tensor, outline
from holdfast.models.weights import check_tensors, fitted, read_weights
from holdfast.models.wrappers import unwrapped
from holdfast.results import ImmunizationResult, ModelFacts
from holdfast.runtime.devices import dtype_of
from holdfast.runtime.storage import save_tensors, tensors_sha256, writable_folder
from holdfast.tasks import Task, Vocabulary


class SplitModel(ExtractorNetwork):
    """A classifier: input normalisation, a network, and the name of its last layer.

    `SplitModel.of` finds the last layer if you do not know it. The state dict of `network` is the model's published
    one: normalisation adds no entries, so weights load into and out of the plain architecture.

    Args:
        network: maps normalised inputs to logits of shape (N, classes) or (N, classes, 1, 1), or to an object that
            holds them as `logits` or as its first tensor.
        head: dotted name of the layer that makes the logits; an `nn.Linear`, or a 1x1 `nn.Conv2d`.
        name: shown in reports.
        mean: subtracted from inputs in [0, 1], one value a channel (or one for all); None: inputs are not normalised.
        std: divides them afterwards.
        factory: builds the same architecture anew, with weights from torch's global generator; used for the scratch
            control. Without it, every layer must have `reset_parameters`. To be sent to other processes, it must be
            picklable: an object or a function of a module, not a lambda.
        spec: JSON-able description from which the architecture can be rebuilt; it is saved with the weights.
        channels_last: pass images in channels-last layout, which is faster; False for code that cannot take it.

    Attributes:
        notes: how the model was split and changed when it was loaded, in sentences for readers of an audit.
        code: SHA-256 of the user's code that made the network; None: a library's code did.
        vocabulary: what a language model's token ids mean; None: it reads no text, or the vocabulary is unknown.
        tokenizer: where its tokenizer is (a folder, or a name on the Hub); None: it reads no text, or it is unknown.
        fresh_head: whether pretrained weights came without a head, which still has to be trained.
        immunization: how `holdfast.immunize` made the weights, and whether it gave up; None: it did not make them. It
            stays on copies, and is not written with the weights: a released file should not reveal its defense.

    Raises:
        HoldfastError: if the head is missing or has another kind, or mean and std do not fit together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = SplitModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), head="2")
        >>> model.num_outputs, model.features(torch.zeros(3, 4)).shape
        (2, torch.Size([3, 8]))
    """

    answers_with: ClassVar[str] = "vector"
    """The kind of its outputs, which decides the tasks that it fits; see `Task.answers_with`."""

    def __init__(
        self,
        network: nn.Module,
        head: str,
        *,
        name: str = "model",
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
        factory: Callable[[], nn.Module] | None = None,
        spec: dict[str, Any] | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(network, head, name=name, mean=mean, std=std, channels_last=channels_last)
        self.factory = factory
        self.spec = spec
        self.notes: tuple[str, ...] = ()
        self.code: str | None = None
        self.vocabulary: Vocabulary | None = None
        self.tokenizer: str | None = None
        self.fresh_head = False
        self.immunization: ImmunizationResult | None = None

    @classmethod
    def of(cls, network: nn.Module, task: Task, *, head: str | None = None, name: str = "model", **more: Any) -> Self:
        """Wraps any network: finds its head by passing made-up inputs of a task's shape through a copy.

        The head is the last linear layer that ran (an `nn.Linear`, or a 1x1 `nn.Conv2d`) and has as many outputs as the
        network. Without such a layer, the whole network becomes the body, and a linear layer that is the identity is
        appended as the head; `notes` says so.

        Args:
            network: see `SplitModel`.
            task: gives the input shape.
            head: dotted name of the head, if it is another layer than the one that would be found.
            name: shown in reports.
            more: further arguments of `SplitModel`.

        Raises:
            HoldfastError: if the network cannot be copied or cannot take such inputs, or has no such head.

        Example:
            >>> from holdfast.tasks import load_task
            >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 5), nn.Softplus())
            >>> SplitModel.of(network, load_task("digits[0-4]")).head_name
            '3'
        """
        ids = None if task.vocabulary is None else task.vocabulary.size
        plain = unwrapped(network, name, head)
        network, head = plain.network, plain.head or head
        shown = outline(network, task.input_shape, name, ids=ids)
        layout = {"channels_last": shown.channels_last, **more}
        if head is None and shown.head is None:
            model = cls(Appended(network, shown.num_outputs), "head", name=name, **layout)
            if model.factory is not None:
                model.factory = AppendedFactory(model.factory, shown.num_outputs)
            model.notes = (
                *plain.notes,
                f"No layer of {name} was found to make its logits; the whole network is the body, and a linear layer, "
                "at first the identity, was appended as the head.",
            )
            return model
        model = cls(network, head or str(shown.head), name=name, **layout)
        model.notes = plain.notes
        return model

    def unwrapped(self) -> SplitModel:
        """Returns this model in the form that adversaries and defenses need; changes are made in a copy, with `notes`.

        Networks are taken out of wrappers such as `torch.compile` and `DataParallel`, adapters are merged, and half
        precision becomes float32; see `holdfast.models.wrappers`.

        Raises:
            HoldfastError: for a network that cannot be unwrapped, such as a quantised one.
        """
        plain = unwrapped(self.network, self.name, self.head_name)
        if plain.network is self.network:
            return self
        model = copy.copy(self)
        model._modules, model._buffers = dict(self._modules), dict(self._buffers)
        model.network = plain.network
        model.head_name = plain.head or self.head_name
        model._check_head()
        model.notes += tuple(note for note in plain.notes if note not in self.notes)
        return model.in_memory_format()

    @property
    def context(self) -> int | None:
        """The largest number of tokens that a language model reads; None: no limit is known, or it reads no tokens."""
        return None

    @property
    def known_tokens(self) -> int | None:
        """The number of token ids that a language model has embeddings for; None: unknown, or it reads no tokens."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        # The factory first: another process that unpickles it imports the code of the network's classes.
        return {"factory": self.factory, **self.__dict__}

    def fresh(self) -> SplitModel:
        """Returns a copy with newly initialised weights, from torch's global generator: the scratch control.

        Raises:
            HoldfastError: naming the layer, if there is no factory and a layer cannot initialise itself.
        """
        model = self.clone()
        model.immunization = None
        if self.factory is not None:
            network = unwrapped(self.factory(), self.name).network.to(self.device)
            model.network = network if dtype_of(network) == self.dtype else network.to(self.dtype)
            if self.has_extractor:
                model.head_name = self.head_name.removesuffix(".1")
            if model.num_outputs != self.num_outputs:
                model.reset_head(self.num_outputs)
            return model.in_memory_format()
        reason = self.not_renewable()
        if reason is not None:
            raise HoldfastError(f"{self.name}: {reason}, which the scratch control needs; give the model a factory.")
        for module in model.network.modules():
            if _has_own_tensors(module):
                module.reset_parameters()  # type: ignore[operator]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    def not_renewable(self) -> str | None:
        """Returns why `fresh` would fail, or None if it works."""
        if self.factory is not None:
            return None
        for name, module in self.network.named_modules():
            if _has_own_tensors(module) and not hasattr(module, "reset_parameters"):
                return f"layer {name or '(root)'!r} ({type(module).__name__}) cannot be initialised anew"
        return None

    def facts(self, file_sha256: str | None = None) -> ModelFacts:
        """Returns name, size and a hash of the weights (and buffers), for the provenance of a result.

        The hash covers tensors that a state dict leaves out, and the source of the user's code.
        """
        state = {**dict(every_tensor(self.network)), **self.network.state_dict()}
        digest = tensors_sha256(state, self.code or "")
        count = sum(p.numel() for p in self.parameters())
        return ModelFacts(
            name=self.name, parameters=count, sha256=digest, file_sha256=file_sha256, notes=list(self.notes)
        )

    def input_settings(self) -> list[Any]:
        """Returns the settings beside the network that outputs depend on, as plain values: the input normalisation."""
        return [None if v is None else v.flatten().tolist() for v in (self.mean, self.std)]

    def save(self, path: Path | str) -> str:
        """Writes the network's state dict as safetensors, with the spec in its header; returns the file's SHA-256.

        Missing folders are created. Values are written in the network's precision, which is float32 if it was loaded
        from half precision.

        Raises:
            HoldfastError: if the file cannot be written.
        """
        path = Path(path)
        if path.is_dir():
            raise HoldfastError(
                f"{str(path)!r} is a folder; name the file in it, such as {str(path / 'model.safetensors')!r}."
            )
        save_tensors(path, self.network.state_dict(), {"model": self.spec} if self.spec else {})
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def save_pretrained(self, folder: Path | str, *, merge_extractor: bool = False) -> Path:
        """Writes the model in its own library's format, which the library reads without Holdfast.

        Models of `hf:` become a folder for `from_pretrained` of transformers, with the tokenizer or preprocessor;
        models of `timm:` one for `timm.create_model("local-dir:FOLDER", pretrained=True)`; denoisers one for
        `from_pretrained` of a diffusers pipeline. Weights are written to the bit.

        No library reads an extractor or eraser that a defense inserted before the head. Merging it into the head keeps
        the outputs, up to rounding, but undoes the immunization: the body is then the original's. So this needs
        `merge_extractor`.

        Args:
            folder: created if it does not exist.
            merge_extractor: write the model without its extractor, see `without_extractor`.

        Returns:
            The folder.

        Raises:
            HoldfastError: if no library reads such a model, or its extractor may not or cannot be merged.
        """
        family = family_of(str(self.spec["name"])) if self.spec is not None else Family()
        if self.has_extractor and not merge_extractor:
            raise HoldfastError(
                f"{self.name}: a defense inserted a layer before the head, which no other library reads. Write the "
                "model with save(FILE), which Holdfast reads; merge_extractor=True writes it without that layer, and "
                "so without its immunization."
            )
        model = self.without_extractor()
        folder = writable_folder(Path(folder))
        family.save_pretrained(model, folder)
        return folder

    @classmethod
    def from_pretrained(cls, place: Path | str, task: Task, **more: Any) -> SplitModel:
        """Loads a model that `save_pretrained`, its own library or `save` wrote.

        Args:
            place: a folder of transformers, timm or a diffusers pipeline, or a folder with a `model.safetensors` that
                Holdfast saved, or that file.
            task: sizes the model; see `holdfast.load_model`.
            more: further arguments of `holdfast.load_model`.

        Raises:
            HoldfastError: if the model does not exist, or does not fit the task.
        """
        from holdfast.models.loading import load_folder  # which imports this module

        return load_folder(place, task, **more)

    def load(self, path: Path | str, keep_outputs: Sequence[int] | None = None) -> None:
        """Loads weights from a safetensors file, strictly; `notes` say how their names were read.

        For a model in several files, give the index (`model.safetensors.index.json`) or one of them. Prefixes of
        wrappers (`module.`, `_orig_mod.`, ...) are removed if all names then fit.

        Args:
            path: the file.
            keep_outputs: the outputs of its head that this model's outputs are, in order; None: all.

        Raises:
            HoldfastError: if the file is missing or a pickle, its tensors do not fit this architecture, or its head
                lacks an output.
        """
        weights = read_weights(Path(path))
        own, target = self.network.state_dict(), self.network
        if isinstance(target, Appended) and weights.tensors.keys() == target.body.state_dict().keys():
            own, target = target.body.state_dict(), target.body  # weights from before the head was appended
        weights = fitted(weights, own)
        tensors = dict(weights.tensors)
        if keep_outputs is not None:
            tensors |= self._kept_outputs(tensors, keep_outputs)
        hint = ""
        head, fitting = (t.get(f"{self.head_name}.weight") for t in (tensors, own))
        if head is not None and fitting is not None and head.dim() and head.shape[:1] != fitting.shape[:1]:
            hint = (
                f" Its head is for {head.shape[0]} classes, and the task has {self.num_outputs}: keep the right "
                "classes of the task with NAME[...], or the right outputs of the head with keep_outputs (in a recipe)."
            )
        check_tensors(str(path), tensors, own, self.name, hint)
        target.load_state_dict(tensors, strict=True)
        self.immunization = None
        self.notes += tuple(note for note in weights.notes if note not in self.notes)

    def _kept_outputs(self, tensors: Mapping[str, Tensor], wanted: Sequence[int]) -> dict[str, Tensor]:
        names = [n for n in (f"{self.head_name}.weight", f"{self.head_name}.bias") if n in tensors]
        available = len(tensors[names[0]]) if names else 0
        wrong = [i for i in wanted if not 0 <= i < available]
        if wrong or len(wanted) != self.num_outputs or len(set(wanted)) != len(wanted):
            what = f"there is no output {wrong[0]}" if wrong else f"it names {len(set(wanted))} different ones"
            raise HoldfastError(
                f"{self.name}: keep_outputs is {list(wanted)[:12]}; {what}. The weights' head has {available} outputs, "
                f"and the task {self.num_outputs} classes: give the number of one output for each class, from 0 on."
            )
        return {n: tensors[n][list(wanted)] for n in names}


def _has_own_tensors(module: nn.Module) -> bool:
    return any(True for _ in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
