"""A network split into a body and a head, and the checks that refuse what cannot be split, trained or scored."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.execution import load_tensors, save_tensors
from holdfast.models.blocks import Block, copy_layers, split_blocks
from holdfast.results import ModelFacts
from holdfast.tasks import Task

Head = nn.Linear | nn.Conv2d


class ExtractedHead(nn.Sequential):
    """A head with a linear extractor before it: layers `0` and `1`; see `SplitModel.insert_extractor`.

    Both compute in float64, whatever the network does: an extractor may be so badly conditioned, and is so on purpose,
    that float32 would change the benign outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's outputs, in the dtype of x."""
        extractor, head = self
        inside = extractor(x.to(next(extractor.parameters()).dtype))
        outputs: Tensor = head(inside.to(next(head.parameters()).dtype))
        return outputs.to(x.dtype)


class SplitModel(nn.Module):
    """A classifier as Holdfast sees it: input normalisation, a network, and the name of its last layer.

    The state dict of `network` is the model's published one: normalisation adds no entries, so weights load into and
    out of the plain architecture.

    Args:
        network: maps normalised inputs to logits of shape (N, classes).
        head: dotted name of the layer that makes the logits; an `nn.Linear`, or a 1x1 `nn.Conv2d`.
        name: shown in reports.
        mean: subtracted from inputs in [0, 1], one value a channel (or one for all); None: nothing is normalised.
        std: divides them afterwards.
        factory: builds the same architecture anew, with weights from torch's global generator; used for the scratch
            control. Without it, every layer must have `reset_parameters`.
        spec: JSON-able description from which the architecture can be rebuilt; travels with saved weights.

    Raises:
        HoldfastError: if the head is missing or is of another kind, or mean and std do not fit together.

    Example:
        >>> model = SplitModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), head="2")
        >>> model.num_outputs, model.features(torch.zeros(3, 4)).shape
        (2, torch.Size([3, 8]))
    """

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
    ) -> None:
        super().__init__()
        self.network = network
        self.head_name = head
        self.name = name
        self.factory = factory
        self.spec = spec
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
        if isinstance(head, nn.Conv2d) and (head.kernel_size != (1, 1) or head.groups != 1):
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

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, classes) for inputs as a task yields them, cast to the network's precision."""
        x = x.to(self.precision or next(self.network.parameters()).dtype)
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if x.dim() == 4:
            # Channels last: convolutions of small networks run 2 to 3 times faster on a CPU.
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(x)
        return logits.flatten(1)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head receives, flattened to (N, D)."""
        return self.with_features(x)[1]

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and features of one forward pass."""
        caught: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            logits = self(x)
        finally:
            hook.remove()
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
            if self.has_extractor:
                first = self._extractor_layer().weight.view(width, width).to(theta).T
                plain, theta = first @ plain, first @ theta
            else:
                self.add_extractor()
            stored = self._extractor_layer().weight
            stored.copy_(theta.T.reshape_as(stored))
            # The inverse of what was stored, not of what was meant: rounding must not change the outputs.
            rounded = stored.view(width, width).to(theta).T
            self.head.weight.copy_(torch.linalg.solve(rounded, plain).T.reshape_as(head.weight))
        return float(sigma[0] / sigma[-1])

    def add_extractor(self) -> None:
        """Puts an identity layer before the head, for `insert_extractor` or for weights that have one."""
        head = self.head
        width = head.weight.shape[1]
        device = head.weight.device
        dtype = head.weight.dtype if device.type == "mps" else torch.float64  # which has no float64
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
        """Whether the layer before the head was inserted by `insert_extractor`."""
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
                identity.
            reference: a fresh model of the same architecture.

        Raises:
            HoldfastError: if the reference has nothing to copy from.
        """
        extractor = f"{self.head_name.rpartition('.')[0]}.0" if self.has_extractor else None
        for name in layers:
            if name != extractor:
                copy_layers(self.network, reference.network, [name])
                continue
            weight = self._extractor_layer().weight
            with torch.no_grad():
                weight.copy_(torch.eye(len(weight)).view_as(weight))

    def clone(self) -> SplitModel:
        """Returns a deep copy whose training leaves this model alone."""
        return copy.deepcopy(self)

    def fresh(self) -> SplitModel:
        """Returns a copy with newly initialised weights, from torch's global generator: the scratch control.

        Raises:
            HoldfastError: naming the layer, if there is no factory and a layer cannot initialise itself.
        """
        model = self.clone()
        if self.factory is not None:
            reference = next(self.parameters())
            model.network = self.factory().to(device=reference.device, dtype=reference.dtype)
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
        """Returns name, size and a hash of the weights (and buffers), for the provenance of a result."""
        digest = hashlib.sha256()
        state = self.network.state_dict()
        for name in sorted(state):
            value = state[name].detach().cpu().contiguous()
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        count = sum(p.numel() for p in self.parameters())
        return ModelFacts(name=self.name, parameters=count, sha256=digest.hexdigest(), file_sha256=file_sha256)

    def save(self, path: Path) -> str:
        """Writes the network's state dict as safetensors, with the spec in its header; returns the file's SHA-256."""
        save_tensors(path, self.network.state_dict(), {"model": self.spec} if self.spec else {})
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def load(self, path: Path) -> None:
        """Loads weights from a safetensors file, strictly.

        Raises:
            HoldfastError: if the file is missing, is a pickle, or its tensors are not this architecture's.
        """
        tensors, _ = load_tensors(path)
        own = self.network.state_dict()
        problems = [f"no {n!r}" for n in own if n not in tensors]
        problems += [f"unexpected {n!r}" for n in tensors if n not in own]
        problems += [
            f"{n!r} is {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
            for n in own
            if n in tensors and own[n].shape != tensors[n].shape
        ]
        # Quantised weights are integers that mean something only with their scales, which are stored elsewhere.
        problems += [
            f"{n!r} holds {str(tensors[n].dtype).removeprefix('torch.')}, and floating-point numbers were expected"
            for n in own
            if n in tensors and own[n].is_floating_point() and not tensors[n].is_floating_point()
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            head = tensors.get(f"{self.head_name}.weight")
            hint = (
                f" Its head is for {head.shape[0]} classes, and the task has {self.num_outputs}: "
                "keep the right ones with NAME[...]."
                if head is not None and head.shape[0] != self.num_outputs
                else ""
            )
            raise HoldfastError(f"{str(path)!r} does not fit {self.name}: {'; '.join(problems[:4])}{more}.{hint}")
        self.network.load_state_dict(tensors, strict=True)


def _has_own_tensors(module: nn.Module) -> bool:
    return any(True for _ in [*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _channels_last(model: SplitModel) -> SplitModel:
    if any(p.dim() == 4 for p in model.parameters()):
        model.to(memory_format=torch.channels_last)
    return model


def check_same_architecture(model: SplitModel, original: SplitModel) -> None:
    """Refuses a model that is no other weights for the original's architecture: their scores would not compare.

    An inserted extractor is allowed: it is a defense's, and part of what is audited.

    Raises:
        HoldfastError: naming the tensor, the head or the normalisation that differs.
    """
    own, other = (_shapes(m) for m in (model, original))
    problems = [f"only the original has {n!r}" for n in other if n not in own]
    problems += [f"only it has {n!r}" for n in own if n not in other]
    problems += [f"{n!r} is {own[n]} instead of {other[n]}" for n in own if n in other and own[n] != other[n]]
    if _plain_head(model) != _plain_head(original):
        problems.append(f"its head is {model.head_name!r} instead of {original.head_name!r}")
    for name in ("mean", "std"):
        mine, theirs = (_plain(getattr(m, name)) for m in (model, original))
        if mine != theirs:
            problems.append(f"its input {name} is {mine} instead of {theirs}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise HoldfastError(
            f"{model.name} is another architecture than the original ({original.name}): {'; '.join(problems[:4])}"
            f"{more}. An audit compares weights of one architecture; give the original from before the immunization."
        )


def _plain_head(model: SplitModel) -> str:
    return model.head_name.removesuffix(".1") if model.has_extractor else model.head_name


def _shapes(model: SplitModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights as they would be without an extractor."""
    plain, inserted = _plain_head(model), model.head_name.removesuffix("1") + "0."
    return {
        (name.replace(model.head_name, plain, 1) if name.startswith(f"{model.head_name}.") else name): tuple(
            value.shape
        )
        for name, value in model.network.state_dict().items()
        if not (model.has_extractor and name.startswith(inserted))
    }


def _plain(values: Tensor | None) -> list[float] | None:
    return None if values is None else [round(v, 6) for v in values.flatten().tolist()]


def check_fits(model: SplitModel, task: Task, *, own_task: bool, finite: bool = True) -> None:
    """Refuses, with the reason, a model that cannot be trained or scored on a task.

    Args:
        model: on any device; two samples of the task are passed through it in evaluation mode.
        task: the task it is to work on.
        own_task: whether the model's outputs must be this task's classes (its benign task), or may be more (a
            restricted task that a fresh head will serve).
        finite: whether its outputs must be finite.

    Raises:
        HoldfastError: no trainable parameters, inputs of another shape, another class count, non-finite outputs.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise HoldfastError(
            f"{model.name} has no trainable parameters; un-freeze what may be trained (requires_grad_)."
        )
    device = next(model.parameters()).device
    batch = next(iter(task.batches("test", 2, device=device)))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(batch.x)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HoldfastError(
            f"{model.name} cannot take the inputs of task {task.name!r}, shape {task.input_shape}: "
            f"{reason}. For images, set the task's image_size and channels to what the model "
            "expects."
        ) from error
    finally:
        model.train(training)
    if logits.dim() != 2 or logits.shape[1] != model.num_outputs:
        raise HoldfastError(
            f"{model.name} returns {tuple(logits.shape)} for 2 inputs; its head {model.head_name!r} says (2, "
            f"{model.num_outputs})."
        )
    if own_task and model.num_outputs != task.num_outputs:
        raise HoldfastError(
            f"{model.name} has {model.num_outputs} outputs and its task {task.name!r} {task.num_outputs} classes; "
            "they must agree. Keep the right classes with NAME[...], or build the model for this task."
        )
    if finite and not bool(logits.isfinite().all()):
        raise HoldfastError(
            f"{model.name} returns values that are not finite on task {task.name!r}; its weights are unusable."
        )
