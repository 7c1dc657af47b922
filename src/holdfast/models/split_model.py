"""A network split into a body and a head."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.blocks import Block, copy_layers, split_blocks
from holdfast.models.extractor import AppendedFactory, ExtractedHead
from holdfast.models.introspection import Appended, Head, duplicate, every_tensor, is_head, logits_of, outline
from holdfast.models.weights import check_tensors, fitted, read_weights
from holdfast.models.wrappers import plain
from holdfast.results import ImmunizationResult, ModelFacts
from holdfast.runtime.devices import device_of, dtype_of, widest
from holdfast.runtime.storage import save_tensors, tensors_sha256
from holdfast.tasks import Task, Vocabulary


class SplitModel(nn.Module):
    """A classifier as Holdfast sees it: input normalisation, a network, and the name of its last layer.

    Where you do not know the last layer, `SplitModel.of` finds it. The state dict of `network` is the model's published
    one: normalisation adds no entries, so weights load into and out of the plain architecture.

    Args:
        network: maps normalised inputs to logits of shape (N, classes), or (N, classes, 1, 1); or to something that
            holds them as `logits`, or as its first tensor.
        head: dotted name of the layer that makes the logits; an `nn.Linear`, or a 1x1 `nn.Conv2d`.
        name: shown in reports.
        mean: subtracted from inputs in [0, 1], one value a channel (or one for all); None: nothing is normalised.
        std: divides them afterwards.
        factory: builds the same architecture anew, with weights from torch's global generator; used for the scratch
            control. Without it, every layer must have `reset_parameters`. To be sent to other processes, it must be
            picklable: an object or a function of a module, not a lambda.
        spec: JSON-able description from which the architecture can be rebuilt; travels with saved weights.
        channels_last: hand images over in channels-last layout, which is faster; False for code that cannot take it.

    Attributes:
        notes: what a reader of an audit should know of how the model was taken apart; in sentences.
        code: SHA-256 of the source file that made the network, where somebody's own code did.
        vocabulary: of a language model, what the ids mean that it reads; None: it is none, or not known.
        fresh_head: whether pretrained weights came without a head, so that it is still to be trained.
        immunization: how `holdfast.immunize` made the weights, and whether it gave up; None: it did not make them. It
            stays on copies, and is not written with the weights: a released file should not tell how it was made.

    Raises:
        HoldfastError: if the head is missing or is of another kind, or mean and std do not fit together.

    Example:
        >>> model = SplitModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), head="2")
        >>> model.num_outputs, model.features(torch.zeros(3, 4)).shape
        (2, torch.Size([3, 8]))
    """

    answers_with: ClassVar[str] = "vector"
    """Which tasks it is for; see `Task.answers_with`."""

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
        super().__init__()
        self.network = network
        self.head_name = head
        self.name = name
        self.factory = factory
        self.spec = spec
        self.channels_last = channels_last
        self.notes: tuple[str, ...] = ()
        self.code: str | None = None
        self.vocabulary: Vocabulary | None = None
        self.fresh_head = False
        self.immunization: ImmunizationResult | None = None
        self.precision: torch.dtype | None = None
        """What inputs are cast to; None: the first parameter's."""
        self._check_head()
        if (mean is None) != (std is None):
            raise HoldfastError("Give mean and std of the input normalisation together, or neither.")
        for key, values in (("mean", mean), ("std", std)):
            buffer = None if values is None else torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(key, buffer, persistent=False)
        self.mean: Tensor | None
        self.std: Tensor | None
        if self.std is not None and not bool((self.std > 0).all()):
            raise HoldfastError(
                f"std of the input normalisation is {self.std.flatten().tolist()}; expected numbers above 0."
            )

    @classmethod
    def of(cls, network: nn.Module, task: Task, *, head: str | None = None, name: str = "model", **more: Any) -> Self:
        """Wraps any network: finds its head by passing made-up inputs of a task's shape through a copy.

        The head is the last layer that ran, is linear (an `nn.Linear`, or a 1x1 `nn.Conv2d`) and makes as many outputs
        as the network. If there is none, the whole network becomes the body, and a linear layer that is the identity
        is appended as the head; `notes` says so.

        Args:
            network: see `SplitModel`.
            task: its input shape is used.
            head: dotted name of the head, where the one that would be found is not the one that is meant.
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
        found = plain(network, name, head)
        network, head = found.network, found.head or head
        seen = outline(network, task.input_shape, name, ids=ids)
        layout = {"channels_last": seen.channels_last, **more}
        if head is None and seen.head is None:
            model = cls(Appended(network, seen.num_outputs), "head", name=name, **layout)
            if model.factory is not None:
                model.factory = AppendedFactory(model.factory, seen.num_outputs)
            model.notes = (
                *found.notes,
                f"No layer of {name} was found to make its logits; the whole network is the body, and a linear layer, "
                "at first the identity, was appended as the head.",
            )
            return model
        model = cls(network, head or str(seen.head), name=name, **layout)
        model.notes = found.notes
        return model

    def made_plain(self) -> SplitModel:
        """Returns this model as attacks and defenses need it; `notes` say what was changed, and nothing is in place.

        Networks are taken out of wrappers such as `torch.compile` and `DataParallel`, adapters are merged, and half
        precision becomes float32; see `holdfast.models.wrappers`.

        Raises:
            HoldfastError: for what cannot be made plain, such as a quantised network.
        """
        found = plain(self.network, self.name, self.head_name)
        if found.network is self.network:
            return self
        model = copy.copy(self)
        model._modules, model._buffers = dict(self._modules), dict(self._buffers)
        model.network = found.network
        model.head_name = found.head or self.head_name
        model._check_head()
        model.notes += tuple(note for note in found.notes if note not in self.notes)
        return _channels_last(model)

    def _check_head(self) -> None:
        try:
            head = self.network.get_submodule(self.head_name)
        except AttributeError as error:
            layers = [n for n, m in self.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            raise HoldfastError(
                f"{self.name}: there is no layer {self.head_name!r} to use as the head; the last ones are "
                f"{layers[-3:]}."
            ) from error
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise HoldfastError(
                f"{self.name}: the head {self.head_name!r} is {type(head).__name__}; expected Linear or Conv2d."
            )
        if not is_head(head):
            raise HoldfastError(
                f"{self.name}: the head {self.head_name!r} is {head}; as a head it must be 1x1, ungrouped."
            )

    @property
    def head(self) -> Head:
        """The layer that makes the logits."""
        head = self.network.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear | nn.Conv2d)
        return head

    @property
    def num_outputs(self) -> int:
        """Number of logits."""
        head = self.head
        return head.out_features if isinstance(head, nn.Linear) else head.out_channels

    @property
    def device(self) -> torch.device:
        """Where the network is; of a network without tensors, the CPU."""
        return device_of(self.network)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the network computes in, by its first weights, even if they are buffers."""
        return dtype_of(self.network)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, classes) for inputs as a task yields them, cast to the network's precision.

        Token ids (int64) are handed over as they are.
        """
        if x.dtype == torch.int64:
            return logits_of(self.network(x))
        x = x.to(self.precision or self.dtype)
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if x.dim() == 4 and self.channels_last:
            # Channels last: convolutions of small networks run 2 to 3 times faster on a CPU.
            x = x.contiguous(memory_format=torch.channels_last)
        return logits_of(self.network(x))

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head receives, flattened to (N, D); see `with_features`."""
        return self.with_features(x)[1]

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits, and what the head receives, flattened to (N, D), of one forward pass.

        Raises:
            HoldfastError: if the network does not use its head.
        """
        caught: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(
            lambda _, args, named: caught.append((*args, *named.values())[0]), with_kwargs=True
        )
        try:
            logits = self(x)
        finally:
            hook.remove()
        if not caught:
            raise HoldfastError(f"{self.name}: the network does not run its head {self.head_name!r}; name another.")
        return logits, caught[0].flatten(1)

    def reset_head(self, num_outputs: int | None = None) -> None:
        """Replaces the head by a fresh one (torch's default initialisation, from its global generator)."""
        old = self.head
        width = num_outputs or self.num_outputs
        like: dict[str, Any] = {
            "device": old.weight.device,
            "dtype": old.weight.dtype,
            "bias": old.bias is not None,
        }
        new = (
            nn.Linear(old.in_features, width, **like)
            if isinstance(old, nn.Linear)
            else nn.Conv2d(old.in_channels, width, 1, **like)
        )
        self.put_head(new)

    def put_head(self, head: nn.Module) -> None:
        """Puts a layer in the head's place."""
        parent, _, leaf = self.head_name.rpartition(".")
        setattr(self.network.get_submodule(parent), leaf, head)

    def insert_extractor(self, theta: Tensor) -> float:
        """Puts the linear map z -> z theta before the head and its inverse into the head: outputs stay what they were.

        What is inserted is one layer named like the head with `.0` behind it, and the head becomes `.1`. A second
        extractor is merged into the first.

        Args:
            theta: invertible, shape (D, D), float64.

        Returns:
            The condition number of theta: outputs change by about this times the precision of float64.

        Raises:
            HoldfastError: if theta has another shape or cannot be inverted.

        Example:
            >>> model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
            >>> x = torch.ones(1, 4)
            >>> before = model(x)
            >>> kappa = model.insert_extractor(torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64))
            >>> torch.allclose(model(x), before, atol=1e-6), model.head_name
            (True, '2.1')
        """
        head = self.head
        width = head.weight.shape[1]
        if theta.shape != (width, width):
            raise HoldfastError(
                f"{self.name}: the extractor has shape {tuple(theta.shape)}; the head takes {width} features, so "
                f"({width}, {width}) is expected."
            )
        sigma = torch.linalg.svdvals(torch.nan_to_num(theta, 0.0, 0.0, 0.0))
        if not bool(theta.isfinite().all()) or sigma[-1] <= width * torch.finfo(theta.dtype).eps * sigma[0]:
            raise HoldfastError(f"{self.name}: the extractor cannot be inverted; the head could not make up for it.")
        with torch.no_grad():
            plain = head.weight.flatten(1).to(theta).T
            if not self.has_extractor:
                self.add_extractor()
            layer = self._extractor_layer()
            first = layer.weight.view(width, width).to(theta, copy=True).T
            layer.weight.copy_((first @ theta).T.reshape_as(layer.weight))
            if layer.bias is not None:  # an eraser: what is before the new one cannot be inverted
                layer.bias.copy_(layer.bias @ theta.to(layer.bias))
                solved = torch.linalg.solve(theta, plain)
            else:
                # The inverse of what was stored, not of what was meant: rounding must not change the outputs.
                rounded = layer.weight.view(width, width).to(theta).T
                solved = torch.linalg.solve(rounded, first @ plain)
            self.head.weight.copy_(solved.T.reshape_as(head.weight))
        return float(sigma[0] / sigma[-1])

    def insert_eraser(self, projection: Tensor, shift: Tensor) -> None:
        """Puts the affine map z -> z P + c before the head, which stays as it is: what P maps to zero is gone.

        Unlike `insert_extractor`, P need not be invertible, and the outputs change by what is erased. The layers are
        named in the same way; behind an extractor, the two are merged into one layer.

        Args:
            projection: P, shape (D, D), float64.
            shift: c, shape (D,), float64.

        Raises:
            HoldfastError: if a shape is another one, or a value is not finite.

        Example:
            >>> model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
            >>> first = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
            >>> model.insert_eraser(first, torch.tensor([0.0, 7.0], dtype=torch.float64))
            >>> model.features(torch.ones(1, 4))[:, 1].item(), model.spec, model.head_name
            (7.0, None, '2.1')
        """
        width = self.head.weight.shape[1]
        if projection.shape != (width, width) or shift.shape != (width,):
            raise HoldfastError(
                f"{self.name}: the eraser has shapes {tuple(projection.shape)} and {tuple(shift.shape)}; the head "
                f"takes {width} features, so ({width}, {width}) and ({width},) are expected."
            )
        if not bool(projection.isfinite().all() and shift.isfinite().all()):
            raise HoldfastError(f"{self.name}: the eraser has values that are not finite.")
        self.expect_extractor("affine")
        layer = self._extractor_layer()
        with torch.no_grad():
            first = layer.weight.view(width, width).to(projection).T
            layer.weight.copy_((first @ projection).T.reshape_as(layer.weight))
            assert layer.bias is not None
            layer.bias.copy_(layer.bias.to(projection) @ projection + shift)

    def expect_extractor(self, extractor: bool | str) -> None:
        """Makes room for the extractor that saved weights have; one that is there already stays.

        Args:
            extractor: as `spec` has it: True for a linear one, "affine" for an eraser, False for none.
        """
        if not extractor:
            return
        if not self.has_extractor:
            self.add_extractor()
        layer = self._extractor_layer()
        if extractor == "affine" and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
            if self.spec is not None:
                self.spec = {**self.spec, "extractor": "affine"}

    def add_extractor(self) -> None:
        """Puts an identity layer before the head, for `insert_extractor` or for weights that have one."""
        head = self.head
        width = head.weight.shape[1]
        device = head.weight.device
        dtype = widest(device)
        like: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        # skip_init: nothing is drawn, so that the global generator is left alone.
        layer: Head = (
            nn.utils.skip_init(nn.Conv2d, width, width, 1, **like)  # type: ignore[no-untyped-call]
            if isinstance(head, nn.Conv2d)
            else nn.utils.skip_init(nn.Linear, width, width, **like)  # type: ignore[no-untyped-call]
        )
        with torch.no_grad():
            layer.weight.copy_(torch.eye(width).view_as(layer.weight))
        parent, _, leaf = self.head_name.rpartition(".")
        setattr(self.network.get_submodule(parent), leaf, ExtractedHead(layer, head.to(dtype)))
        self.head_name = f"{self.head_name}.1"
        if self.spec is not None:
            self.spec = {**self.spec, "extractor": True}

    def _extractor_layer(self) -> Head:
        layer = self.network.get_submodule(self.head_name.removesuffix("1") + "0")
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    @property
    def has_extractor(self) -> bool:
        """Whether the layer before the head was inserted by `insert_extractor` or `insert_eraser`."""
        return isinstance(self.network.get_submodule(self.head_name.rpartition(".")[0]), ExtractedHead)

    def blocks(self) -> list[Block]:
        """Returns the body as a row of blocks, each a list of (dotted name in `network`, module).

        The rule stands in `holdfast.models.blocks`. An inserted extractor belongs to the last block.

        Example:
            >>> from holdfast.models import load_model
            >>> from holdfast.tasks import load_task
            >>> [block[0][0] for block in load_model("cnn", load_task("digits[0-4]")).blocks()]
            ['body.0', 'body.4', 'body.9']
        """
        if not self.has_extractor:
            return split_blocks(self.network, self.head_name)
        place = self.head_name.rpartition(".")[0]
        blocks = split_blocks(self.network, place) or [[]]
        blocks[-1].append((f"{place}.0", self._extractor_layer()))
        return blocks

    def reinitialise(self, layers: Iterable[str], reference: SplitModel) -> None:
        """Gives layers the values that they have in a fresh model (see `fresh`), in place.

        Args:
            layers: dotted names in `network`; an inserted extractor, which a fresh model does not have, becomes the
                identity, and whatever else was put before the head stays.
            reference: a fresh model of the same architecture.

        Raises:
            HoldfastError: if the reference has nothing to copy from.
        """
        inserted = f"{self.head_name.rpartition('.')[0]}.0" if self.head_name != reference.head_name else None
        for name in layers:
            if name != inserted:
                copy_layers(self.network, reference.network, [name])
                continue
            if not self.has_extractor:
                continue
            layer = self._extractor_layer()
            with torch.no_grad():
                layer.weight.copy_(torch.eye(len(layer.weight)).view_as(layer.weight))
                if layer.bias is not None:
                    layer.bias.zero_()

    def clone(self) -> SplitModel:
        """Returns a deep copy whose training leaves this model alone."""
        return duplicate(self)

    def __getstate__(self) -> dict[str, Any]:
        # The factory first: what unpickles it in another process imports the code that the network's classes are of.
        return {"factory": self.factory, **self.__dict__}

    def fresh(self) -> SplitModel:
        """Returns a copy with newly initialised weights, from torch's global generator: the scratch control.

        Raises:
            HoldfastError: naming the layer, if there is no factory and a layer cannot initialise itself.
        """
        model = self.clone()
        model.immunization = None
        if self.factory is not None:
            network = plain(self.factory(), self.name).network.to(self.device)
            model.network = network if dtype_of(network) == self.dtype else network.to(self.dtype)
            if self.has_extractor:
                model.head_name = self.head_name.removesuffix(".1")
            if model.num_outputs != self.num_outputs:
                model.reset_head(self.num_outputs)
            return _channels_last(model)
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
        """Says why `fresh` cannot be had, or None if it can."""
        if self.factory is not None:
            return None
        for name, module in self.network.named_modules():
            if _has_own_tensors(module) and not hasattr(module, "reset_parameters"):
                return f"layer {name or '(root)'!r} ({type(module).__name__}) cannot be initialised anew"
        return None

    def facts(self, file_sha256: str | None = None) -> ModelFacts:
        """Returns name, size and a hash of the weights (and buffers), for the provenance of a result.

        Tensors that a state dict leaves out are hashed as well, and so is the source of somebody's own code.
        """
        state = {**dict(every_tensor(self.network)), **self.network.state_dict()}
        digest = tensors_sha256(state, self.code or "")
        count = sum(p.numel() for p in self.parameters())
        return ModelFacts(
            name=self.name, parameters=count, sha256=digest, file_sha256=file_sha256, notes=list(self.notes)
        )

    def save(self, path: Path | str) -> str:
        """Writes the network's state dict as safetensors, with the spec in its header; returns the file's SHA-256.

        Folders on the way are made. Values are written in the precision that the network has; one that was loaded
        from half precision has float32.

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

    def reading(self) -> list[Any]:
        """Returns what outputs depend on beside the network, as plain values: how inputs are normalised."""
        return [None if v is None else v.flatten().tolist() for v in (self.mean, self.std)]

    def export(self, folder: Path | str) -> Path | None:
        """Writes the model as the library that it is of would, into a folder of its own; None: there is none such."""
        return None

    def load(self, path: Path | str, keep_outputs: Sequence[int] | None = None) -> None:
        """Loads weights from a safetensors file, strictly; `notes` say what was understood.

        Of a model in several files, the index (`model.safetensors.index.json`) or any of them is named. Names with what
        wrappers put before them (`module.`, `_orig_mod.`, ...) are understood where then all fit.

        Args:
            path: the file.
            keep_outputs: those of its head that this model's stand for, in order; None: all.

        Raises:
            HoldfastError: if the file is missing, is a pickle, its tensors are not this architecture's, or its head
                has no such output.
        """
        found = read_weights(Path(path))
        own, target = self.network.state_dict(), self.network
        if isinstance(target, Appended) and found.tensors.keys() == target.body.state_dict().keys():
            own, target = target.body.state_dict(), target.body  # weights from before the head was appended
        found = fitted(found, own)
        tensors = dict(found.tensors)
        if keep_outputs is not None:
            tensors |= self._kept_outputs(tensors, keep_outputs)
        hint = ""
        head = tensors.get(f"{self.head_name}.weight")
        if head is not None and head.dim() and head.shape[0] != self.num_outputs:
            hint = (
                f" Its head is for {head.shape[0]} classes, and the task has {self.num_outputs}: keep the right "
                "classes of the task with NAME[...], or the right outputs of the head with keep_outputs (in a recipe)."
            )
        check_tensors(str(path), tensors, own, self.name, hint)
        target.load_state_dict(tensors, strict=True)
        self.immunization = None
        self.notes += tuple(note for note in found.notes if note not in self.notes)

    def _kept_outputs(self, tensors: Mapping[str, Tensor], wanted: Sequence[int]) -> dict[str, Tensor]:
        names = [n for n in (f"{self.head_name}.weight", f"{self.head_name}.bias") if n in tensors]
        there = len(tensors[names[0]]) if names else 0
        wrong = [i for i in wanted if not 0 <= i < there]
        if wrong or len(wanted) != self.num_outputs or len(set(wanted)) != len(wanted):
            what = f"there is no output {wrong[0]}" if wrong else f"it names {len(set(wanted))} different ones"
            raise HoldfastError(
                f"{self.name}: keep_outputs is {list(wanted)[:12]}; {what}. The weights' head has {there} outputs, and "
                f"the task {self.num_outputs} classes: give the number of one output for each class, from 0 on."
            )
        return {n: tensors[n][list(wanted)] for n in names}


def _has_own_tensors(module: nn.Module) -> bool:
    return any(True for _ in [*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _channels_last(model: SplitModel) -> SplitModel:
    if model.channels_last and any(p.dim() == 4 for p in model.parameters()):
        model.to(memory_format=torch.channels_last)
    return model
