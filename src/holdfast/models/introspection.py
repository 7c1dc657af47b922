"""Networks of any origin: their logits, their head, and all their tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.runtime.devices import device_of, dtype_of

Head = nn.Linear | nn.Conv2d
M = TypeVar("M", bound=nn.Module)


class Appended(nn.Module):
    """A network without a head: all of it is the body, and a linear layer after it is the head.

    The layer is the identity at first, so that the network's outputs do not change.

    Args:
        body: returns logits, in any of the forms that `logits_of` takes.
        num_outputs: how many.

    Example:
        >>> network = Appended(nn.Flatten(), 3)
        >>> network(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[1.0, 2.0, 3.0]]
    """

    def __init__(self, body: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.body = body
        like: dict[str, Any] = {"device": device_of(body), "dtype": dtype_of(body)}
        # skip_init draws no random numbers, so the global generator stays as it is.
        self.head = nn.utils.skip_init(nn.Linear, num_outputs, num_outputs, **like)  # type: ignore[no-untyped-call]
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        logits: Tensor = self.head(logits_of(self.body(x)))
        return logits


@dataclass(frozen=True)
class AppendedFactory:
    """Builds a network anew and appends a head to it; see `SplitModel.of`."""

    factory: Callable[[], nn.Module]
    num_outputs: int

    def __call__(self) -> nn.Module:
        """Returns the network with an identity as its head."""
        return Appended(self.factory(), self.num_outputs)


@dataclass(frozen=True)
class Outline:
    """What one forward pass of made-up inputs shows about a network.

    Attributes:
        num_outputs: number of logits.
        head: dotted name of the last linear layer that ran and has as many outputs; None: there is no such layer.
        channels_last: whether its code takes images in channels-last layout; code that calls `view` often cannot.
    """

    num_outputs: int
    head: str | None
    channels_last: bool


def logits_of(output: Any) -> Tensor:
    """Returns the logits in what a network returned, with shape (N, classes).

    They are the output itself, its `logits` (an attribute or a key), or the first tensor in it.

    Raises:
        HoldfastError: if it holds no tensor.

    Example:
        >>> logits_of((torch.zeros(2, 5, 1, 1), "and more")).shape
        torch.Size([2, 5])
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) and isinstance(output, Mapping):
        logits = output.get("logits", next((v for v in output.values() if isinstance(v, Tensor)), None))
    elif not isinstance(logits, Tensor) and isinstance(output, Sequence):
        logits = next((v for v in output if isinstance(v, Tensor)), None)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise HoldfastError(
            f"The network returns {type(output).__name__} without logits; expected a tensor of shape (N, classes), or "
            "something that holds one (as `logits`, or first)."
        )
    return logits.flatten(1) if logits.dim() > 1 else logits[:, None]


def outline(network: nn.Module, input_shape: tuple[int, ...], name: str, *, ids: int | None = None) -> Outline:
    """Passes two made-up inputs through a copy of a network, in evaluation mode, and records which layers run.

    Args:
        network: left as it is.
        input_shape: of one input.
        name: for messages.
        ids: inputs are integers below this; None: they are numbers from 0 to 1.

    Raises:
        HoldfastError: if the network cannot be copied, cannot take such inputs, or returns no logits.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Softplus())
        >>> outline(network, (4,), "mine")
        Outline(num_outputs=3, head='2', channels_last=True)
    """
    count, device = 2 * torch.Size(input_shape).numel(), device_of(network)
    x = torch.linspace(0, 1, count) if ids is None else torch.arange(count, device=device).remainder(ids)
    x = x.view(2, *input_shape)
    try:
        if ids is not None:
            return _outline(network, x, False)
        x = x.to(device, dtype_of(network))
        if x.dim() != 4:
            return _outline(network, x, True)
        try:
            return _outline(network, x.contiguous(memory_format=torch.channels_last), True)
        except Exception:
            return _outline(network, x, False)
    except Exception as error:  # the user's code may raise anything
        raise HoldfastError(
            f"{name} cannot take inputs of shape {input_shape}: {first_line(error)}. For images, set the task's "
            "image_size and channels to what the model expects; for text, its length."
        ) from error


def _outline(network: nn.Module, x: Tensor, channels_last: bool) -> Outline:
    probe = duplicate(network).eval()
    if channels_last and x.dim() == 4:
        probe = probe.to(memory_format=torch.channels_last)  # the layout that weights will have decides that of outputs
    ran: list[tuple[str, int]] = []
    for dotted, layer in probe.named_modules():
        if dotted and is_head(layer):
            width = layer.weight.shape[0]  # `out_features` may be out of date
            layer.register_forward_hook(lambda *_, entry=(dotted, width): ran.append(entry))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        num_outputs = logits_of(probe(x)).shape[1]
    fitting = [dotted for dotted, width in ran if width == num_outputs]
    return Outline(num_outputs, fitting[-1] if fitting else None, channels_last)


def is_head(layer: nn.Module) -> TypeGuard[Head]:
    """Whether a layer can be a head: an `nn.Linear`, or an ungrouped 1x1 `nn.Conv2d`."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def blank_layer(like: Head, outputs: int, **changes: Any) -> Head:
    """Returns a layer of a head's kind and inputs with undefined values; it draws no random numbers.

    Args:
        like: the head.
        outputs: of the new layer.
        changes: `bias`, `device` or `dtype`, where they differ from the head's.
    """
    settings = {"bias": like.bias is not None, "device": like.weight.device, "dtype": like.weight.dtype, **changes}
    kind, kernel = (nn.Linear, ()) if isinstance(like, nn.Linear) else (nn.Conv2d, (1,))
    layer: Head = nn.utils.skip_init(kind, like.weight.shape[1], outputs, *kernel, **settings)  # type: ignore[no-untyped-call]
    return layer


def duplicate(module: M) -> M:
    """Returns a deep copy.

    Raises:
        HoldfastError: if its code does not allow one.
    """
    # Every module has many empty dictionaries and a set, most of them for hooks. Copying them here halves the time.
    empty = {
        id(value): type(value)()
        for each in module.modules()
        for value in vars(each).values()
        if type(value) in (dict, OrderedDict, set) and not value
    }
    try:
        return copy.deepcopy(module, empty)
    except Exception as error:
        raise HoldfastError(
            f"{type(module).__name__} cannot be copied (copy.deepcopy: {first_line(error)}), which every adversary "
            "needs; keep no tensors with a graph, open files or locks in the module."
        ) from error


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


_BOOKKEEPING = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def every_tensor(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor that a module holds, each once: parameters, buffers, and those in plain attributes.

    Lists, dictionaries and modules in attributes are searched too: `parameters()` does not yield the tensors of a
    network in a list, as it is not a sub-module.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.aside = [nn.Linear(2, 1, bias=False)]
        >>> [name for name, _ in every_tensor(layer)]
        ['weight', 'aside.0.weight']
    """
    seen: set[int] = set()

    def walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if id(value) in seen or not isinstance(value, Tensor | nn.Module | list | tuple | dict):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield name, value
            return
        inside: dict[Any, Any]
        if isinstance(value, nn.Module):
            plain = {n: v for n, v in vars(value).items() if n not in _BOOKKEEPING}
            inside = {**value._parameters, **value._buffers, **plain, **value._modules}
        else:
            inside = value if isinstance(value, dict) else dict(enumerate(value))
        for key, item in inside.items():
            yield from walk(f"{name}.{key}".removeprefix("."), item)

    yield from walk("", network)
