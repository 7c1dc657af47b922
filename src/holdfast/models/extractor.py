"""A layer that a defense inserts between body and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from holdfast.models.introspection import Appended
from holdfast.runtime.devices import dtype_of


class ExtractedHead(nn.Sequential):
    """A head with a linear extractor, or an eraser, before it: layers `0` and `1`; see `SplitModel.insert_extractor`.

    Both compute in float64, whatever the network does: an extractor may be so badly conditioned, and is so on purpose,
    that float32 would change the benign outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's outputs, in the dtype of x."""
        extractor, head = self
        inside = extractor(x.to(dtype_of(extractor)))
        outputs: Tensor = head(inside.to(dtype_of(head)))
        return outputs.to(x.dtype)


@dataclass(frozen=True)
class AppendedFactory:
    """Builds a network anew and appends a head to it; see `SplitModel.of`."""

    factory: Callable[[], nn.Module]
    num_outputs: int

    def __call__(self) -> nn.Module:
        """Returns the network with an identity as its head."""
        return Appended(self.factory(), self.num_outputs)
