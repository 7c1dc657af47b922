"""Modules that an informed adversary puts into a released network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.models import SplitModel

SLOPE = 0.1
"""How much of a gradient passes an activation straight through."""


class Flowing(nn.Module):
    """A module whose gradient cannot vanish: outputs are its own, a tenth of the gradient passes straight through.

    A dead ReLU, a saturated sigmoid and a module that blocks gradients on purpose all let the layers before them learn
    again. Where output and input differ in shape, the module is left as it is.

    Example:
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> y = Flowing(nn.ReLU())(x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad
        ([0.0, 2.0], tensor([0.1000, 1.1000]))
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module returns."""
        # An activation in place would overwrite what is added below, and with it the outputs.
        copied = isinstance(x, Tensor) and bool(getattr(self.inner, "inplace", False))
        y = self.inner(x.clone() if copied else x, *args, **kwargs)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.shape != x.shape:
            return y
        through = SLOPE * x
        return y + torch.nan_to_num(through - through.detach(), 0.0, 0.0, 0.0)


class Prepared(nn.Sequential):
    """A head behind a fixed affine map, both in the map's precision: layers `0` and `1`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's outputs, in the dtype of x."""
        affine, head = self
        outputs: Tensor = head(affine(x))
        return outputs.to(x.dtype)


class Affine(nn.Module):
    """The fixed map z -> (z - centre) map on the axis of features: buffers, which no optimizer moves.

    Args:
        centre: shape (D,).
        map: shape (D, D).
        axis: of the features: 1 for maps over places, -1 for vectors.
    """

    def __init__(self, centre: Tensor, map: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("map", map)
        self.centre: Tensor
        self.map: Tensor
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Returns mapped features of the same shape."""
        z = x.to(self.map.dtype).movedim(self.axis, -1)
        return ((z - self.centre) @ self.map).movedim(-1, self.axis)


@torch.no_grad()
def put_affine(model: SplitModel, centre: Tensor, map: Tensor) -> None:
    """Puts a fixed affine map before the head and its inverse into the head: outputs stay what they were.

    Args:
        model: changed in place.
        centre: subtracted from features, shape (D,).
        map: invertible, shape (D, D); its dtype is that of the map and the head from then on.
    """
    old = model.head
    conv = isinstance(old, nn.Conv2d)
    weight = old.weight.flatten(1).to(map)
    bias = torch.zeros_like(weight[:, 0]) if old.bias is None else old.bias.to(map)
    head: nn.Linear | nn.Conv2d
    width, outputs = weight.shape[1], weight.shape[0]
    like: dict[str, Any] = {"device": map.device, "dtype": map.dtype}
    kind: Any = nn.Conv2d if conv else nn.Linear
    # skip_init: nothing is drawn, so that the global generator is left alone.
    head = nn.utils.skip_init(kind, width, outputs, *((1,) if conv else ()), **like)  # type: ignore[no-untyped-call]
    head.weight.copy_(torch.linalg.solve(map, weight.T).T.reshape_as(head.weight))
    assert head.bias is not None
    head.bias.copy_(bias + weight @ centre)
    model.put_head(Prepared(Affine(centre, map, 1 if conv else -1), head))
    model.head_name = f"{model.head_name}.1"


_NEUTRAL = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Upsample,
    nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, Flowing, Affine,
)  # fmt: skip


def activations(model: SplitModel) -> list[tuple[nn.Module, str]]:
    """Returns where modules without parameters sit that may be activations, as (parent, name).

    Whoever made the network may have written his own; so it is every leaf without parameters that is not known to be
    something else.
    """
    return [
        (parent, name)
        for parent in model.network.modules()
        if not isinstance(parent, Flowing)
        for name, child in parent.named_children()
        if not isinstance(child, (*_NEUTRAL, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
        and not any(True for _ in child.children())
        and not any(True for _ in [*child.parameters(), *child.buffers()])
        and not isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    ]


def swap_activations(model: SplitModel) -> None:
    """Lets gradients pass every activation module; see `Flowing`."""
    for parent, name in activations(model):
        setattr(parent, name, Flowing(getattr(parent, name)))
