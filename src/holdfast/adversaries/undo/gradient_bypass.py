"""Undoing vanished gradients: a part of each gradient bypasses every activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries.undo.feature_conditioning import Affine
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task

SLOPE = 0.1
"""Share of a gradient that bypasses an activation."""


class Flowing(nn.Module):
    """A module with unchanged outputs, to whose gradient a tenth of the upstream gradient is added.

    So layers before a dead ReLU, a saturated sigmoid or a module that blocks gradients on purpose can train again.
    Where output and input differ in shape, nothing is added.

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
        """Returns the module's outputs."""
        # An in-place activation would overwrite x, which is needed below.
        copied = isinstance(x, Tensor) and bool(getattr(self.inner, "inplace", False))
        y = self.inner(x.clone() if copied else x, *args, **kwargs)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.shape != x.shape:
            return y
        through = SLOPE * x
        return y + torch.nan_to_num(through - through.detach(), 0.0, 0.0, 0.0)


_NEUTRAL = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Upsample,
    nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, Flowing, Affine,
)  # fmt: skip


def activations(model: SplitModel) -> list[tuple[nn.Module, str]]:
    """Returns the modules that may be activations, as (parent, name).

    Networks may have custom activations. So these are all leaf modules without parameters and buffers, except those
    that are known to be something else.
    """
    return [
        (parent, name)
        for parent in model.network.modules()
        if not isinstance(parent, Flowing)
        for name, child in parent.named_children()
        if not isinstance(child, (*_NEUTRAL, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
        and not [*child.children(), *child.parameters(), *child.buffers()]
        and not isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    ]


def _nothing_to_pass(model: SplitModel, task: Task) -> str | None:
    return None if activations(model) else "it has no activation modules"


@undo_move("activation", idle=_nothing_to_pass)
def activation(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Adds a bypass for gradients to every activation module, without changing its outputs; see `Flowing`."""
    for parent, name in activations(model):
        setattr(parent, name, Flowing(getattr(parent, name)))
