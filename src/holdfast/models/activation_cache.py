"""The frozen part of a network before the first trained block: its activations are computed once and kept.

A module does not say in which order its layers run. So the network is not cut: it runs as a whole, but every frozen
module returns a stored output at once. The last of them returns the kept activations; those before it return their
output for one sample, repeated for the batch, which no layer reads. A skip connection around the last one would read
it, and then the outputs differ: this is checked once, on some samples, and such a network is refused.

Later blocks may read the inputs themselves, for example to find padding. Then the inputs are kept as well.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.models.introspection import duplicate
from holdfast.models.split_model import SplitModel
from holdfast.tasks import Task
from holdfast.tasks.base import Split

AGREEMENT = 1e-4
"""Largest allowed difference, relative to the largest value, between outputs with and without kept activations."""
_BATCH = 250


class FrozenActivations:
    """The activations of a network's frozen blocks, and a way to run the rest of the network from them.

    Args:
        model: on its device; left as it is.
        frozen: the first blocks of `SplitModel.blocks`, which are not trained.
        samples: inputs for the check, as a task yields them; at least two different ones. The stored outputs of the
            frozen modules are those of the first sample, and are checked on the others.

    Attributes:
        shape: of one sample's activations.

    Raises:
        ValueError: saying why this network's activations cannot be kept.
    """

    def __init__(self, model: SplitModel, frozen: Sequence[Sequence[tuple[str, nn.Module]]], samples: Tensor) -> None:
        names = [name for block in frozen for name, _ in block]
        if not names:
            raise ValueError("no block of its body is frozen")
        self._model, self._names, self._last = duplicate(model).eval(), names, ""
        others = samples[(samples != samples[:1]).flatten(1).any(1)]
        if not len(others):
            raise ValueError("the samples for the check are all the same")
        self._inputs, self._reads = samples[:1], not samples.is_floating_point()
        with _uncut(self._model.network):
            self._templates = self._ran(samples[:1])
        self.shape = tuple(self._templates[self._last].shape[1:])
        if not self._agrees(others):
            self._reads = True
            if not self._agrees(others):
                raise ValueError("later blocks read more than the output of the last frozen one")

    @torch.no_grad()
    def _agrees(self, samples: Tensor) -> bool:
        """Whether kept activations give the same logits and features."""
        wanted = torch.cat([t.flatten() for t in self._model.with_features(samples)])
        try:
            outputs = torch.cat([t.flatten() for t in self.outputs(self._model, self.activations(samples))])
        except (RuntimeError, IndexError, TypeError):  # outputs of a shape that the rest cannot take
            return False
        return bool(((outputs - wanted).abs().max() <= AGREEMENT * wanted.abs().max()).item())

    @torch.no_grad()
    def _ran(self, x: Tensor) -> dict[str, Tensor]:
        """The output of each frozen module; sets `_last`, the one that ran last."""
        caught: dict[str, Tensor] = {}

        def catcher(name: str) -> Any:
            def catch(_: nn.Module, __: Any, output: Any) -> None:
                if not isinstance(output, Tensor) or output.shape[:1] != x.shape[:1]:
                    raise ValueError(f"{name!r} does not return a tensor with one row a sample")
                if name in caught:
                    raise ValueError(f"{name!r} runs more than once")
                caught[name], self._last = output, name

            return catch

        hooks = [self._model.network.get_submodule(n).register_forward_hook(catcher(n)) for n in self._names]
        try:
            self._model.features(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not caught:
            raise ValueError("its frozen blocks do not run")
        return caught

    def activations(self, x: Tensor) -> Tensor:
        """Returns the last frozen module's output for inputs, shape (N, ...), in the network's precision.

        If the inputs are kept as well, each row is both, flattened: shape (N, A).
        """
        with _uncut(self._model.network):
            kept = self._ran(x)[self._last]
        return torch.cat([kept.flatten(1), x.flatten(1).to(kept)], 1) if self._reads else kept

    def outputs(self, model: SplitModel, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and features of a model with the same frozen blocks, from activations; with their graph.

        Args:
            model: in training or evaluation mode.
            activations: as `activations` returns them.
        """
        with self.answering(model.network, activations) as x:
            return model.with_features(x)

    @contextlib.contextmanager
    def answering(self, network: nn.Module, activations: Tensor) -> Iterator[Tensor]:
        """Lets the frozen modules of a network return activations; yields the inputs that it has to be run on."""
        count, inside = len(activations), math.prod(self.shape)
        x = self._inputs.expand(count, *self._inputs.shape[1:])
        if self._reads:
            x = activations[:, inside:].to(self._inputs).reshape(x.shape)
            activations = activations[:, :inside].reshape(count, *self.shape)
        with _uncut(network), self._replaced(network, activations):
            yield x

    @contextlib.contextmanager
    def _replaced(self, network: nn.Module, activations: Tensor) -> Iterator[None]:
        layers = {name: network.get_submodule(name) for name in self._templates}
        own = {name: vars(layer)["forward"] for name, layer in layers.items() if "forward" in vars(layer)}
        for name, layer in layers.items():
            template = self._templates[name]
            output = activations if name == self._last else template.expand(len(activations), *template.shape[1:])
            layer.forward = _returning(output)
        try:
            yield
        finally:
            for name, layer in layers.items():
                del layer.forward
                if name in own:  # a patch of the user's
                    layer.forward = own[name]

    def remainder(self, model: SplitModel) -> SplitModel:
        """Returns a model's trained blocks and head as a model of their own, whose inputs are activations.

        Its network is a `Remainder`, which holds the given model itself, not a copy.
        """
        return SplitModel(
            Remainder(self, model),
            f"model.network.{model.head_name}",
            name=model.name,
            factory=lambda: Remainder(self, model.fresh()),
            channels_last=model.channels_last,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenActivations:
        return self  # it does not change, so copies of a remainder share it

    def size(self, task: Task, split: Split) -> int:
        """Returns the bytes that the activations of a split take."""
        width = math.prod(self.shape) + self._reads * self._inputs.numel()
        return task.size(split) * self._templates[self._last].element_size() * width

    def task(self, task: Task, split: Split) -> Task:
        """Returns a task on the activations of one split; inputs of the other split are NaN and take no memory."""
        parts = [self.activations(b.x).cpu() for b in task.sweep(split, _BATCH, device=self._model.device)]
        kept = torch.cat(parts)
        other = task.size("test" if split == "train" else "train")
        missing = torch.full((1, *kept.shape[1:]), math.nan, dtype=kept.dtype).expand(other, *kept.shape[1:])
        return task.with_inputs(kept, missing) if split == "train" else task.with_inputs(missing, kept)


class Remainder(nn.Module):
    """The network of `FrozenActivations.remainder`.

    Args:
        prefix: made the activations.
        model: runs from them; shared, not copied.
    """

    def __init__(self, prefix: FrozenActivations, model: SplitModel) -> None:
        super().__init__()
        self.prefix, self.model = prefix, model

    def forward(self, activations: Tensor) -> Tensor:
        """Returns logits, shape (N, classes)."""
        with self.prefix.answering(self.model.network, activations) as x:
            logits: Tensor = self.model(x)
            return logits


def _returning(value: Tensor) -> Any:
    return lambda *_, **__: value


@contextlib.contextmanager
def _uncut(network: nn.Module) -> Iterator[None]:
    """Keeps the padding of sentences, so that the activations of all batches have one shape."""
    cutting = [m for m in network.modules() if getattr(m, "cuts", False)]
    for module in cutting:
        setattr(module, "cuts", False)  # noqa: B010
    try:
        yield
    finally:
        for module in cutting:
            setattr(module, "cuts", True)  # noqa: B010
